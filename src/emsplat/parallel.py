"""Several processes that share the particles out. Alone by default: the same code for one process and for many.

The processes are PyTorch's own (`torch.distributed`), started by ``torchrun``; nothing here starts any. The first of
them reads and writes the run folder and decides; the others compute their share. Whoever fails says so to all, and
whoever falls silent is missed: nobody waits for what will not come.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from emsplat.errors import EmsplatError, InputError, Interrupted

T = TypeVar("T")
_PIECE = 2**24  # numbers that are summed at a time, so that no copy of a whole volume is made
_MEETING = timedelta(minutes=5)  # until all processes are there
_COLLECTIVE = timedelta(days=2)  # waiting for others is no fault; a `_Watch` knows those that will not come
_BEAT = 1.0  # seconds between signs of life
_SILENCE = 25.0  # seconds without one after which a process counts as lost
_SUSPECT = 6.0  # the same once a connection has broken
_GRACE = 15.0  # seconds that the work may take to end after a loss, before the process is ended
_DONE = "done"
_SIGNALS = 128  # exit codes above it are of signals
_REMEDY = "go on with --resume, with any number of processes"


class Lost(EmsplatError):
    """Another process has failed, or is not there any more; which, and why. After a signal to one all end alike."""

    def __init__(self, text: str, code: int = 1) -> None:
        super().__init__(text)
        self.exit_code = code


@dataclass(frozen=True)
class World:
    """Who takes part, and which of them this process is."""

    rank: int = 0
    size: int = 1
    hosts: tuple[str, ...] = ()
    watch: _Watch | None = field(default=None, compare=False, repr=False)

    @property
    def first(self) -> bool:
        """Whether this process reads and writes the run folder, and decides."""
        return self.rank == 0

    @property
    def on_this_machine(self) -> int:
        """How many of the processes are on the same machine."""
        return self.hosts.count(self.hosts[self.rank]) if self.hosts else self.size

    @property
    def name(self) -> str:
        """This process, for messages."""
        return self.name_of(self.rank)

    def name_of(self, rank: int) -> str:
        """A process, for messages: "rank 1 of 4 (node3)"."""
        return _name(rank, self.size, self.hosts)

    def share(self, order: Int[Tensor, " n"], together: Int[Tensor, " n"] | None = None) -> Int[Tensor, " m"]:
        """The part of this process: neighbours stay together, as on disk, and so do those of one number in
        ``together``, such as all images of a particle."""
        if together is None or self.size == 1 or not len(order):
            return torch.tensor_split(order, self.size)[self.rank]
        _, group, count = torch.unique(together, return_inverse=True, return_counts=True)
        first = torch.full((len(count),), len(order)).scatter_reduce_(0, group, torch.arange(len(order)), "amin")
        appearance = torch.argsort(first)
        before = torch.empty_like(count)
        before[appearance] = torch.cumsum(count[appearance], 0) - count[appearance]
        return order[(before * self.size // len(order))[group] == self.rank]

    def turns(self, own: int) -> int:
        """How often the process with most to do goes round, where this one goes round ``own`` times."""
        most = torch.tensor([own])
        self.most_(most)
        return int(most)

    def in_step(self, items: Sequence[T]) -> Iterator[T | None]:
        """What this process has to do, then nothing as long as another has more to do: all go round equally often."""
        for turn in range(self.turns(len(items))):
            yield items[turn] if turn < len(items) else None

    def sum_(self, *tensors: Tensor) -> None:
        """Replaces tensors by their sums over all processes, the same bits in each. All give the same shapes in the
        same order; a tensor is contiguous, real or complex.

        Raises:
            Lost: another process will not come.
        """
        if self.size == 1:
            return
        import torch.distributed as distributed

        for piece in _pieces(tensors):
            self._wait(distributed.all_reduce, piece)

    def most_(self, tensor: Tensor) -> None:
        """As `sum_`, with the largest values."""
        if self.size == 1:
            return
        import torch.distributed as distributed

        self._wait(distributed.all_reduce, tensor, distributed.ReduceOp.MAX)

    def collect_(self, *tensors: Tensor) -> None:
        """As `sum_`, but the sums are in the first process alone, and the others go on from zero."""
        if self.size == 1:
            return
        import torch.distributed as distributed

        for piece in _pieces(tensors):
            self._wait(distributed.reduce, piece, 0)
            if not self.first:
                piece.zero_()

    def spread_(self, *tensors: Tensor, source: int = 0) -> None:
        """Replaces tensors by those of one process."""
        if self.size == 1:
            return
        import torch.distributed as distributed

        for piece in _pieces(tensors):
            self._wait(distributed.broadcast, piece, source)

    def gathered(self, own: Tensor, rows: Int[Tensor, " m"], count: int) -> Tensor:
        """What every process has for its own ``rows`` of ``count``, in all of them; no row is of two."""
        whole = own.new_zeros(count, *own.shape[1:])
        whole[rows] = own
        self.sum_(whole)
        return whole

    def spread_named(
        self, tensors: Mapping[str, Tensor], source: int = 0, device: torch.device | None = None
    ) -> dict[str, Tensor]:
        """The tensors that one process has, by their names, in all of them: on the CPU, or where they are not there
        on ``device``."""
        if self.size == 1:
            return dict(tensors)
        mine = self.rank == source
        shapes = [
            (name, list(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.device.type == "cpu")
            for name, tensor in (tensors.items() if mine else ())
        ]
        found = {name: tensor.contiguous() for name, tensor in tensors.items()} if mine else {}
        for name, shape, kind, on_cpu in json.loads(self.told(json.dumps(shapes), source)):
            if not mine:
                found[name] = torch.empty(shape, dtype=getattr(torch, kind), device="cpu" if on_cpu else device)
        self.spread_(*found.values(), source=source)
        return found

    def spread_packed(
        self,
        thing: T | None,
        pack: Callable[[T], tuple[dict[str, Any], Mapping[str, Tensor]]],
        unpack: Callable[[dict[str, Any], dict[str, Tensor]], T],
        source: int = 0,
        device: torch.device | None = None,
    ) -> T:
        """A thing that one process has, in all of them: as what JSON can hold of it and tensors by name."""
        if thing is not None and self.size == 1:
            return thing
        mine = thing if self.rank == source else None
        about, tensors = ({}, {}) if mine is None else pack(mine)
        about = json.loads(self.told(json.dumps(about), source))
        tensors = self.spread_named(tensors, source, device)
        return unpack(about, tensors) if mine is None else mine

    def apart(self, work: Callable[[], T], look: Callable[[], None]) -> T:
        """What ``work`` gives, which every process does for itself in a thread, however long it takes; until all are
        done they ``look`` together, now and then."""
        if self.size == 1:
            return work()
        found, failed, threads = list[T](), list[BaseException](), torch.get_num_threads()

        def run() -> None:
            torch.set_num_threads(threads)
            try:
                found.append(work())
            except BaseException as error:  # noqa: BLE001 (raised below)
                failed.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        while True:
            thread.join(_BEAT / 2)
            if failed:
                raise failed[0]
            if not self.agree(not found):
                return found[0]
            look()

    def agree(self, flag: bool) -> bool:
        """Whether any process says so. What all have to do together is never decided by the clock of one."""
        said = torch.tensor([int(flag)])
        self.sum_(said)
        return bool(said[0] > 0)

    def told(self, text: str, source: int = 0) -> str:
        """What one process says; the others' own texts do not count."""
        if self.size == 1:
            return text
        length = torch.tensor([len(text.encode())])
        self.spread_(length, source=source)
        said = torch.zeros(int(length), dtype=torch.uint8)
        if self.rank == source:
            said = torch.tensor(list(text.encode()), dtype=torch.uint8)
        self.spread_(said, source=source)
        return bytes(said.tolist()).decode()

    def here(self, text: str) -> str:
        """A text in which {rank}, {local_rank} and {host} stand for those of this process."""
        own = {"rank": str(self.rank), "local_rank": os.environ.get("LOCAL_RANK", "0")}
        own["host"] = platform.node().partition(".")[0]
        for name, value in own.items():
            text = text.replace(f"{{{name}}}", value)
        return text

    def texts(self, text: str) -> list[str]:
        """What each process says."""
        return [self.told(text, source) for source in range(self.size)]

    def require_same(self, facts: Mapping[str, str]) -> None:
        """
        Raises:
            InputError: a process knows another value than the first of something; it is named.
        """
        digest = hashlib.sha256(repr(sorted(facts.items())).encode()).digest()
        all_of_them = torch.zeros(self.size, dtype=torch.int64)
        all_of_them[self.rank] = int.from_bytes(digest[:7], "big")
        self.sum_(all_of_them)
        if bool((all_of_them == all_of_them[0]).all()):
            return
        for what, value in facts.items():
            said = self.texts(value)
            other = next((rank for rank, own in enumerate(said) if own != said[0]), None)
            if other is not None:
                raise InputError(
                    f"{self.name_of(other)} has another {what} than rank 0 ({said[other]}; expected {said[0]}); all "
                    "processes need the same program, options and particle files"
                )

    def _wait(self, collective: Any, *arguments: Any) -> None:
        """Does something together; a loss that becomes known meanwhile ends it."""
        if arguments[0].device.type != "cpu" or self.watch is None:
            collective(*arguments)
            return
        try:
            work = collective(*arguments, async_op=True)
            pause = 2e-5
            while not work.is_completed():
                self.watch.look()
                time.sleep(pause)
                pause = min(1.3 * pause, 5e-3)
            work.wait()
        except RuntimeError as error:
            raise self.watch.explain(error) from error


ALONE = World()


@dataclass(frozen=True, eq=False)
class Portion:
    """Which ``rows`` of ``count`` a process has, where it does not have all of them (None)."""

    world: World = ALONE
    rows: Int[Tensor, " m"] | None = None
    count: int = 0

    def of(self, whole: Tensor) -> Tensor:
        """The own rows of what is there for all."""
        return whole if self.rows is None else whole[self.rows]

    def whole(self, own: Tensor) -> Tensor:
        """What all processes have, each for its own rows, in all of them."""
        return own if self.rows is None else self.world.gathered(own, self.rows, self.count)

    def total(self, own: int) -> int:
        """How many rows there are, where this process has so many."""
        return own if self.rows is None else self.count


EVERYTHING = Portion()


def started_together() -> bool:
    """Whether ``torchrun`` has started this process as one of several."""
    return "MASTER_ADDR" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ


@contextmanager
def joined(facts: Mapping[str, str] | None = None) -> Iterator[World]:
    """The world that ``torchrun`` has started this process into, or `ALONE` where it has not.

    Sums go over NCCL between GPUs (each process takes that of its local rank) and over Gloo between CPUs, and between
    processes that have to share a GPU. ``facts`` are what all processes have to agree on (`World.require_same`).

    An error that ends the block ends all processes, each with one line on standard error; those that would say what the
    first says keep silent.

    Raises:
        InputError: not all processes have come.
    """
    if not started_together():
        yield ALONE
        return
    import torch.distributed as distributed
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        hosts_store, rank, size = next(rendezvous("env://", timeout=_MEETING))
        watch = _Watch(hosts_store.clone(), rank, size)
        world = World(rank, size, watch.hosts, watch)
        on_gpus = watch.all_say("gpu", str(int(_own_gpu()))) == ["1"] * size
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
            store=PrefixStore("emsplat", hosts_store),
            rank=rank,
            world_size=size,
            timeout=_COLLECTIVE,
        )
    except (RuntimeError, OSError) as error:
        raise InputError(
            f"the processes that torchrun has started do not find each other ({str(error).splitlines()[0]}); can every "
            "machine reach MASTER_ADDR and MASTER_PORT, and are all of them running?"
        ) from error
    try:
        watch.begin()
        world.require_same(facts or {})
        yield world
    except BaseException as error:  # noqa: BLE001 (whatever it is, the others have to know)
        _leave(world, watch, error)
    watch.end()
    watch.close()
    distributed.destroy_process_group()


def _leave(world: World, watch: _Watch, error: BaseException) -> None:
    """Ends this process with one line; at once, since destructors would wait for those that are gone."""
    _on_the_end(signal.SIG_IGN)  # torchrun ends the others when one has failed: the line is said before
    code, text = 1, str(error) or type(error).__name__
    if isinstance(error, EmsplatError):
        code = error.exit_code
    elif isinstance(error, SystemExit):
        code, text = error.code if isinstance(error.code, int) else 1, ""
    elif isinstance(error, KeyboardInterrupt):
        code = 128 + getattr(error, "number", 2)
        lost = watch.missed()  # torchrun ends the others when one has failed
        code = lost.exit_code if lost is not None and lost.exit_code > _SIGNALS else code
        text = str(lost or (f"stopped by {text}" if code != 130 else "interrupted"))
    elif isinstance(error, OSError):
        code, text = 2, f"{error.filename or 'a file'}: cannot be used ({error.strerror or error})"
    else:
        import traceback

        traceback.print_exception(error)
    if isinstance(error, Interrupted | SystemExit):
        text = text if world.first else ""  # all have agreed on it
        watch.end()
    elif not isinstance(error, Lost):
        watch.fail(text, code)
    if text and not watch.is_said_by_first(text):
        with suppress(OSError):
            who = "" if world.first and not isinstance(error, Lost) else f", {world.name}"
            print(f"emsplat{who}: {text}", file=sys.stderr, flush=True)
    with suppress(Exception):
        sys.stdout.flush()
    _on_the_end(lambda *_: os._exit(code))
    watch.linger()
    os._exit(code)


def _on_the_end(handler: Callable[..., Any] | signal.Handlers) -> None:
    with suppress(ValueError):  # handlers belong to the main thread
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, handler)


def _name(rank: int, size: int, hosts: tuple[str, ...]) -> str:
    return f"rank {rank} of {size}" + (f" ({hosts[rank]})" if hosts else "")


def _own_gpu() -> bool:
    """Whether this process has a GPU of its own; it takes that of its local rank, or shares one."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if count:
        torch.cuda.set_device(local % count)
    return count >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _pieces(tensors: tuple[Tensor, ...]) -> Iterator[Tensor]:
    for tensor in tensors:
        flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).view(-1)
        yield from torch.split(flat, _PIECE)


class _Watch:
    """Signs of life of all processes, in the store that torchrun keeps for them; and what ended one of them.

    A thread gives this process's own sign and looks at those of others: the first process at all, the others at the
    first and at what is known of a loss.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._ours = "TORCHELASTIC_USE_AGENT_STORE" not in os.environ and rank == 0  # it goes when this process goes
        self.hosts = tuple(self.all_say("host", platform.node()))
        self._lock = threading.Lock()
        self._state = ""  # of this process, in the place of a number of beats
        self._failure: str | None = None  # of this process
        self._code = 1  # with which it ends
        self._published = threading.Event()
        self._suspicious = False
        self._said_by_first: str | None = None
        self._seen: dict[int, tuple[str, float]] = {}
        self._contact = time.monotonic()
        self._lost: Lost | None = None
        self._since = 0.0
        self._over = False
        self._wake = threading.Event()
        self._threads: list[threading.Thread] = []

    def all_say(self, what: str, text: str) -> list[str]:
        """A word of each process, in the order of ranks; before there are collectives."""
        self._store.set(f"{what}/{self._rank}", text)
        return [self._store.get(f"{what}/{rank}").decode() for rank in range(self._size)]

    def begin(self) -> None:
        """From here on all are expected to live."""
        now = time.monotonic()
        self._contact = now
        self._seen = dict.fromkeys(range(self._size), ("", now))
        self._store.set_timeout(timedelta(seconds=_SUSPECT))
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._judge)]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """This process has done its part, and nobody is to miss it."""
        self._publish(_DONE)

    def close(self) -> None:
        """No more signs; threads would be in the way of the end of the process."""
        self._over = True
        self._wake.set()
        for thread in self._threads:
            thread.join(_SUSPECT)

    def fail(self, text: str, code: int) -> None:
        """This process ends; the others will know why."""
        self._failure, self._code = text, code
        self._publish("failed")

    def look(self) -> None:
        """
        Raises:
            Lost: another process has failed or is gone.
        """
        if self._lost is not None:
            raise self._lost

    def explain(self, error: RuntimeError) -> Lost:
        """Why a connection has broken."""
        found = self.missed()
        return found or Lost(f"the connection between the processes has broken ({error}); {_REMEDY}")

    def missed(self) -> Lost | None:
        """Who is not there any more: looks more closely for a while, until all have given a sign."""
        began = time.monotonic()
        self._suspect()
        while time.monotonic() - began < _SUSPECT + 4 * _BEAT:
            if self._lost is not None:
                return self._lost
            with self._lock:
                seen = [when for rank, (_, when) in self._seen.items() if rank != self._rank]
            if seen and min(seen) > began + _BEAT:
                break
            time.sleep(0.1)
        return None

    def is_said_by_first(self, text: str) -> bool:
        """Whether the first process ends with the same words."""
        if self._rank == 0:
            return False
        until = time.monotonic() + 3 * _BEAT
        while time.monotonic() < until and self._said_by_first is None and self._lost is None:
            time.sleep(0.05)
        return self._said_by_first == text

    def linger(self) -> None:
        """Stays until the others know."""
        if self._rank == 0:
            time.sleep(3 * _BEAT if self._ours else 0.0)
            return
        until = time.monotonic() + 5 * _BEAT  # when one goes, torchrun ends the others; the first may still be writing
        while time.monotonic() < until and self._seen[0][0] not in (_DONE, "failed"):
            time.sleep(0.05)

    def _publish(self, state: str) -> None:
        self._state = state
        self._wake.set()
        self._published.wait(3 * _BEAT)

    def _beat(self) -> None:
        count = 0
        while not self._over:
            count += 1
            state = self._state
            try:
                if self._failure is not None:
                    said = f"{self._rank} {self._code} {self._failure}"
                    self._store.set(f"failure/{self._rank}", self._failure)
                    if not self._store.check(["failure"]):
                        self._store.set("failure", said)
                if self._suspicious:
                    self._store.set("suspicious", "1")
                self._store.set(f"beat/{self._rank}", state or str(count))
                if state:
                    self._published.set()
                self._read()
                self._contact = time.monotonic()
            except (RuntimeError, OSError):
                # The store is gone, and with it whoever keeps it.
                self._suspect()
                if state:
                    self._published.set()
            self._wake.wait(_BEAT)
            self._wake.clear()

    def _read(self) -> None:
        """What is new of others."""
        if self._store.check(["failure"]):
            rank, code, text = self._store.get("failure").decode().split(" ", 2)
            if int(rank) != self._rank:
                told = f"{_name(int(rank), self._size, self.hosts)} has ended: {text}"
                self._lose(told, int(code) if int(code) > _SIGNALS else 1)
        if self._rank and self._store.check(["failure/0"]):
            self._said_by_first = self._store.get("failure/0").decode()
        if not self._suspicious and self._store.check(["suspicious"]):
            self._suspect()
        whom = range(self._size) if self._rank == 0 or self._suspicious else (0,)
        for rank in whom:
            key = f"beat/{rank}"
            if not self._store.check([key]):
                continue
            beat = self._store.get(key).decode()
            with self._lock:
                if beat != self._seen[rank][0] or beat == _DONE:
                    self._seen[rank] = (beat, time.monotonic())

    def _suspect(self) -> None:
        """From now on looks at all. Of those that it has not looked at before nothing was missed so far."""
        with self._lock:
            if not self._suspicious and self._rank:
                now = time.monotonic()
                self._seen = {rank: (beat, now if rank else when) for rank, (beat, when) in self._seen.items()}
            self._suspicious = True

    def _judge(self) -> None:
        """By this process's own clock, whatever the store does. Where it was itself asleep it has missed nobody."""
        last = time.monotonic()
        while not self._over:
            time.sleep(_BEAT / 4)
            now = time.monotonic()
            asleep, last = now - last - _BEAT / 4, now
            if asleep > _BEAT:
                with self._lock:
                    self._contact += asleep
                    self._seen = {rank: (beat, when + asleep) for rank, (beat, when) in self._seen.items()}
            if self._state:
                continue
            if self._lost is not None:
                if now - self._since > _GRACE:
                    print(f"emsplat, {_name(self._rank, self._size, self.hosts)}: {self._lost}", file=sys.stderr)
                    sys.stderr.flush()
                    os._exit(self._lost.exit_code)
                continue
            patience = _SUSPECT if self._suspicious else _SILENCE
            if now - self._contact > patience:
                self._lose(_silent(0, self._size, self.hosts, now - self._contact))
                continue
            with self._lock:
                silent = {rank: now - when for rank, (_, when) in self._seen.items() if rank != self._rank}
            if self._rank and not self._suspicious:
                silent = {0: silent[0]}
            worst = max(silent, key=lambda rank: silent[rank])
            if silent[worst] > patience:
                self._lose(_silent(worst, self._size, self.hosts, silent[worst]))

    def _lose(self, text: str, code: int = 1) -> None:
        if self._lost is None and not self._state:
            self._since = time.monotonic()
            remedy = "" if "--resume" in text else f"; {_REMEDY}"
            self._lost = Lost(f"{text}{remedy}", code)


def _silent(rank: int, size: int, hosts: tuple[str, ...], seconds: float) -> str:
    return (
        f"{_name(rank, size, hosts)} has given no sign of life for {seconds:.0f} s: it was killed (by the queue, or "
        "for want of memory?), or its machine or the network is gone"
    )
