"""Serving the live view with Tornado, on this machine and for as long as the command runs."""

from __future__ import annotations

import asyncio
import errno
import getpass
import ipaddress
import logging
import os
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from tornado.httpserver import HTTPServer
from tornado.iostream import StreamClosedError
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler

from emsplat.errors import InputError, OutputError
from emsplat.run.log import counted
from emsplat.viewer.folders import Walk
from emsplat.viewer.site import Request, Site

_PORTS = range(8765, 8785)  # tried one after the other, then any that is free
_TAKEN = (errno.EADDRINUSE, errno.EACCES)


class _Handler(RequestHandler):
    """Hands each request to the site, in a thread of its own: one picture is drawn at a time, on one core."""

    def initialize(self, site: Site, worker: ThreadPoolExecutor) -> None:
        self._site, self._worker = site, worker

    async def prepare(self) -> None:
        given = self.request
        request = Request(
            given.method or "",
            _decoded(given.path),
            {name: values[-1].decode("utf-8", "replace") for name, values in given.query_arguments.items()},
            {name.lower(): value for name, value in given.headers.items()},
            {name: morsel.value for name, morsel in given.cookies.items()},
        )
        answer = await asyncio.get_running_loop().run_in_executor(self._worker, self._site.answer, request)
        self.clear()
        self.clear_header("Server")
        self.clear_header("Content-Type")
        self.set_status(answer.status)
        for name, value in answer.headers.items():
            self.set_header(name, value)
        with suppress(StreamClosedError):  # the browser has gone
            await self.finish(answer.body or None)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """What Tornado refuses by itself: unknown methods, and what is no HTTP."""
        self.clear_header("Server")
        self.finish(f"{status_code}")

    def compute_etag(self) -> None:
        """The site has marks of its own."""

    def data_received(self, chunk: bytes) -> None:
        """Nothing is sent here."""


def _decoded(path: str) -> str:
    from urllib.parse import unquote

    return unquote(path, "utf-8", "surrogateescape")


def serve(folder: Path, port: int | None, host: str, say: Callable[[str], None]) -> None:
    """Serves the runs below ``folder`` until it is interrupted; ``say`` tells the address.

    ``port``: without it 8765, or the next that is free. ``host``: the address or name of this machine to listen on.

    Raises:
        InputError: not a folder, not an address of this machine, or a port that cannot be.
        OutputError: the port is in use.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: not a folder; expected one with runs of emsplat in it or below it")
    if port is not None and not 0 < port < 65536:
        raise InputError(f"--port {port}: expected a number from 1 to 65535; leave it out for one that is free")
    sockets = _bound(port, host)
    number = sockets[0].getsockname()[1]
    local = is_local(host)
    site = Site(folder, frozenset({host}), everywhere=not local)
    walk = Walk(site.root)
    walk.go_on(0.25)
    many = "" if walk.ended else " so far; the page goes on looking"
    say(f"{counted(len(walk.runs), 'run')} below {site.root}{many}")
    if not walk.runs and walk.ended:
        say("  it waits for a folder with a journal, as every run has; runs that begin later appear by themselves")
    if port is None and number != _PORTS[0]:
        say(f"port {_PORTS[0]} is in use; --port chooses another than {number}")
    shown = f"[{host}]" if ":" in host else platform.node() if host in ("0.0.0.0", "::") else host
    if not local:
        say(
            f"Warning: {host} is not local. Whoever reaches this machine at port {number} and has the address below, "
            "and whoever listens on the way (it is not encrypted), can read every run below the folder. Without --host "
            "only users of this machine could try, and an ssh tunnel brings the page elsewhere"
        )
    say(f"http://{shown}:{number}/?token={site.token}")
    if local:
        say("from another machine: open a tunnel there, then the address above there")
        say(f"  ssh -N -L {number}:127.0.0.1:{number} {_user()}{platform.node()}")
    say("Ctrl-C ends it")
    _be_modest()
    asyncio.run(_serve(site, sockets))


def is_local(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _user() -> str:
    try:
        return f"{getpass.getuser()}@"
    except (OSError, KeyError, ImportError):
        return ""


def _bound(port: int | None, host: str) -> list[Any]:
    """Sockets that listen.

    Raises:
        InputError: not an address of this machine.
        OutputError: the port is in use.
    """
    for number in [port] if port is not None else [*_PORTS, 0]:
        try:
            return bind_sockets(number, host)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise InputError(
                    f"--host {host}: cannot be listened on ({error.strerror or error}); expected an address or name of "
                    "this machine"
                ) from error
            if port is not None:
                why = "is in use" if error.errno == errno.EADDRINUSE else "may not be used"
                raise OutputError(f"--port {port}: {why}; choose another, or leave it out") from error
    raise OutputError(f"{host}: no port is free")


async def _serve(site: Site, sockets: list[Any]) -> None:
    logging.getLogger("tornado").setLevel(logging.CRITICAL)
    with suppress(OSError), ThreadPoolExecutor(1) as worker:
        application = Application([(r".*", _Handler, {"site": site, "worker": worker})])
        server = HTTPServer(application, max_header_size=2**15, max_body_size=2**10, idle_connection_timeout=300)
        server.add_sockets(sockets)
        await asyncio.Event().wait()


def _be_modest() -> None:
    """Those who compute come first."""
    with suppress(OSError):
        os.nice(10)
