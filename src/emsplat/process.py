"""The process that emsplat runs in: threads, memory, streams, signals, what libraries read at their start.

A library leaves its process alone: `threads` puts back what it changes. The command line owns its process: `run`
settles everything before the heavy imports, and ends it with one line whatever happens. Nothing heavy is imported here,
so that Ctrl-C during the imports is caught as well.
"""

from __future__ import annotations

import atexit
import codecs
import gc
import io
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NoReturn, TextIO

from emsplat.errors import EmsplatError, InputError, OutputError
from emsplat.granted import granted_cores

_IMPORTED = time.monotonic()
_STOPPING = ("SIGTERM", "SIGHUP", "SIGUSR1")
# Letters of the field, and lines that tables and help texts are framed with, where a terminal has only ASCII.
_PLAIN = {
    **{"×": "x", "·": "*", "−": "-", "–": "-", "—": "-", "≤": "<=", "≥": ">=", "≈": "~", "±": "+-", "→": "->"},
    **{"°": "deg", "µ": "u", "μ": "u", "σ": "sigma", "λ": "lambda", "γ": "gamma", "π": "pi", "τ": "tau", "√": "sqrt"},
    **{digit: f"^{number}" for number, digit in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
    **dict.fromkeys("─━═╌┄╸╺•", "-"),
    **dict.fromkeys("│┃║╎┆", "|"),
    **dict.fromkeys("╭╮╰╯┌┐└┘├┤┬┴┼╔╗╚╝", "+"),
    **dict.fromkeys("‘’", "'"),
    **dict.fromkeys("“”", '"'),
}


@contextmanager
def threads(wanted: int | None) -> Iterator[None]:
    """Within this block PyTorch, and with it the kernels, has so many threads; by default one per granted core.

    Raises:
        InputError: below 1, or many times more than this machine has cores.
    """
    import torch

    most = max(64, 4 * (os.cpu_count() or 1))
    if wanted is not None and not 1 <= wanted <= most:
        raise InputError(
            f"--threads {wanted}: expected from 1 to {most}; leave it out for the {granted_cores().cores} that this "
            "process was granted"
        )
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or granted_cores().cores)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def side_by_side(count: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """A `map` of ``count`` things that takes them at a time, with a share of the threads each: what is short gains less
    from more threads. Where there are too few threads it takes one after the other."""
    from concurrent.futures import ThreadPoolExecutor

    import torch

    available = torch.get_num_threads()
    if not 1 < count <= available:
        yield map
        return
    share = available // count
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(share,)) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(available)  # some libraries have one number for all threads


def go_on_alone(wanted: int | None, processes: int) -> None:
    """Of so many processes on this machine, each with ``wanted`` `threads`, the others are done: their threads are this
    one's until its own end, as far as so many cores were granted."""
    import torch

    if processes > 1:
        rest = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # torchrun sets it
        each = wanted or granted_cores().cores
        torch.set_num_threads(max(each, min(processes * each, granted_cores(rest).cores)))


def shared_out(tasks: Sequence[Callable[[], str]], processes: int) -> list[str]:
    """What each task gives, with so many processes at work on them; tasks are few (at most 255) and take long.

    The others are copies of this one (fork), so that nothing is imported or read again; where the system cannot do
    that safely, and for what a copy has failed at, the tasks are done here.
    """
    done: dict[int, str] = {}
    helpers = min(processes, len(tasks)) - 1 if sys.platform == "linux" else 0
    with ExitStack() as open_files:
        # Who wants a task reads its number; at the end of the pipe there is none left.
        give, take = os.pipe()
        open_files.callback(os.close, give)
        os.write(take, bytes(range(len(tasks))))
        os.close(take)

        def work() -> Iterator[tuple[int, str]]:
            while number := os.read(give, 1):
                yield number[0], tasks[number[0]]()

        results = [open_files.enter_context(tempfile.TemporaryFile()) for _ in range(max(helpers, 0))]
        children = [_copied(work, result) for result in results]
        try:
            done |= dict(work())
        finally:
            for child in children:
                os.waitpid(child, 0)
        for result in results:
            result.seek(0)
            done |= dict(map(json.loads, result))
    return [done[number] if number in done else task() for number, task in enumerate(tasks)]


def _copied(work: Callable[[], Iterator[tuple[int, str]]], result: IO[bytes]) -> int:
    """A copy of this process that works and writes what it has done as lines; returns its number."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    child = os.fork()
    if child:
        return child
    try:
        for number, text in work():
            result.write(json.dumps([number, text]).encode() + b"\n")
            result.flush()
    finally:
        os._exit(0)  # nothing of the other process is to be ended here


def describe_threads(wanted: int | None) -> str:
    """What `threads` takes, as "4 threads", and what holds it down."""
    granted = granted_cores()
    count = wanted or granted.cores
    limit = f" (limited by {granted.source})" if granted.source and wanted is None else ""
    return f"{count} thread{'s' * (count > 1)}{limit}"


@contextmanager
def imports() -> Iterator[None]:
    """For what a command imports at its start: objects that stay, among which Python need not look for garbage."""
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collected:
            gc.enable()


def started() -> float:
    """When this process began, on the clock of `time.monotonic`; where the system does not say, when emsplat did."""
    try:
        # The second field, in parentheses, may hold blanks; the start is the 22nd, in ticks since the boot.
        ticks = int(Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return _IMPORTED
    return min(time.monotonic() - age, _IMPORTED)


class Stopped(KeyboardInterrupt):
    """The system asked the program to end. Like Ctrl-C it passes where errors are caught."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Output(io.TextIOWrapper):
    """Standard output that says so where it cannot be written, as no other error of the system does."""

    def write(self, text: str) -> int:
        with _as_output_error():
            return super().write(text)

    def flush(self) -> None:
        with _as_output_error():
            super().flush()


@contextmanager
def _as_output_error() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(
            f"standard output: cannot be written ({error.strerror or error}); send it to a file with room"
        ) from error


def run(program: str, command: Callable[[], int]) -> int:
    """Runs a command line as the whole of this process, and returns its exit code.

    ``command`` does its own imports. Whatever ends it early is one line on standard error: an error of emsplat, output
    that cannot be written (exit code 2; 141 without a word where the reader has gone), Ctrl-C or a kill (128 and the
    signal's number, as shells have it).
    """
    settle()
    code, text = 0, ""
    try:
        code = command()
        sys.stdout.flush()
    except EmsplatError as error:
        code, text = error.exit_code, str(error)
    except KeyboardInterrupt as stop:
        # Whoever asks twice does not want to wait for the end of other threads.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        number = getattr(stop, "number", signal.SIGINT)
        code, text = 128 + number, "interrupted" if number == signal.SIGINT else f"stopped by {stop}"
    except BrokenPipeError:
        code = 141
    except OSError as error:
        where = error.filename or "a file"
        code, text = 2, f"{where}: cannot be used ({error.strerror or error}); is there space, and permission?"
    except SystemExit as leaving:  # the help, or a complaint about an option
        code = leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
    if text:
        with suppress(OSError, OutputError):
            print(f"{program}: {text}", file=sys.stderr, flush=True)
    for stream in (sys.stdout, sys.stderr):
        if _is_broken(stream):  # what Python still wants to write at its end goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # during the rest nobody could catch it
    return code


def leave(code: int) -> NoReturn:
    """Ends this process after `run`: does what was registered for its end, and no more.

    Python would take PyTorch apart as well, in half a second in which a signal finds no handler.
    """
    for name in ("SIGINT", *_STOPPING):
        signal.signal(getattr(signal, name), lambda *_: os._exit(code))  # with what its work came to
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, OutputError):
            stream.flush()
    os._exit(code)


def settle() -> None:
    """Streams, signals, and the environment of the libraries that are imported later, for the command line."""
    # A descriptor that a daemon has closed would be given to the next file, and be written into by who prints.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    codecs.register_error("emsplat.plain", _plain)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123 (until the end)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="emsplat.plain")
    if isinstance(sys.__stdout__, io.TextIOWrapper) and sys.stdout is sys.__stdout__:
        same = {name: getattr(sys.stdout, name) for name in ("encoding", "errors", "line_buffering", "write_through")}
        sys.stdout = Output(sys.stdout.buffer, **same)

    def stop(number: int, _: object) -> None:
        raise Stopped(number)

    for name in _STOPPING:
        if signal.getsignal(getattr(signal, name)) == signal.SIG_DFL:  # nohup ignores the end of the terminal
            signal.signal(getattr(signal, name), stop)
    # Threads that wait for others shall sleep: where they spin, a step takes many times as long beside other programs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # PyTorch asks for large pages then: a box of 320 took a fifth less processor time than in pages of 4 kB.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Every library that counts cores by itself goes by this: PyTorch where --threads does not reach, OpenBLAS, FINUFFT.
    os.environ["OMP_NUM_THREADS"] = str(granted_cores().cores)
    # A notebook's own back end, which `!emsplat` inherits, need not be installed here; figures go to files.
    os.environ["MPLBACKEND"] = "agg"
    # What connections between processes say when they break: emsplat says who is gone.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    _find_caches()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # those of other libraries, about their own insides
    for library in ("matplotlib", "torch"):
        logging.getLogger(library).setLevel(logging.ERROR)


def _find_caches() -> None:
    """A temporary folder for caches of fonts and kernels, where there is no home folder to write to."""
    own = os.environ.get
    places = {
        "MPLCONFIGDIR": (own("XDG_CACHE_HOME") or "~/.cache", own("XDG_CONFIG_HOME") or "~/.config"),
        "TRITON_CACHE_DIR": (own("TRITON_HOME") or "~/.triton",),
    }
    missing = [
        name
        for name, folders in places.items()
        if name not in os.environ and not all(_can_be_written(Path(folder).expanduser()) for folder in folders)
    ]
    if missing:
        with suppress(OSError):  # no temporary folder either: the libraries say themselves what they miss
            folder = tempfile.mkdtemp(prefix="emsplat-")
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            os.environ.update(dict.fromkeys(missing, folder))


def _can_be_written(folder: Path) -> bool:
    """Whether a folder can be written to, or made."""
    there = next((place for place in (folder, *folder.parents) if place.exists()), folder)
    return folder.is_absolute() and there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _plain(error: UnicodeError) -> tuple[str, int]:
    """An encoding error handler: letters of the field in ASCII, accents left off, other characters as "?"."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = "".join(map(_plain_character, error.object[error.start : error.end]))
    return text, error.end


def _plain_character(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte of a file name that is no letter in this locale
        return f"\\x{ord(character) - 0xDC00:02x}"
    decomposed = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return _PLAIN.get(character) or decomposed or "?"


def _is_broken(stream: TextIO | None) -> bool:
    """Whether what is still to be written cannot be."""
    try:
        if stream is not None:
            stream.flush()
    except (OSError, ValueError, OutputError):
        return True
    return False
