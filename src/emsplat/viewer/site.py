"""What the live view answers, and to whom: a function of a request, whatever serves it.

Only who knows the token is answered. It comes once, in the address that is printed, and is traded for a cookie that
scripts cannot read and other sites cannot send. A request has to call this machine by a name of its own, lest a page of
elsewhere reach it by a name that it makes point here (DNS rebinding). Every folder is named by a key and every file by
a name of emsplat, both looked up and never put together into a path, except below a run, where `folders.inside` looks
where the way leads. Everything is read, nothing written: only GET and HEAD are known.
"""

from __future__ import annotations

import hashlib
import hmac
import html
import ipaddress
import json
import platform
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files as resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from emsplat.errors import InputError
from emsplat.run import files
from emsplat.run.pace import Paced
from emsplat.viewer.compared import compare, difference
from emsplat.viewer.folders import Walk, read_file
from emsplat.viewer.pictures import Pictures
from emsplat.viewer.watched import Watched, shown_name

_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
_STEP = 0.25  # seconds of a walk at a time
_EVERY = 3.0  # seconds between walks, and between looks at runs that are not at work
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".webp": "image/webp",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
# A report has its scripts within, and may have been made by somebody else: it gets no origin, and with it no cookie.
_POLICY_OF_REPORTS = (
    "sandbox allow-scripts allow-downloads; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_SENT = frozenset(
    {files.REPORT, files.EXPLORER, files.MOVIE}
    | {value for name, value in vars(files).items() if name.endswith("_FIGURE")}
    | {value.replace(".png", ".svg") for name, value in vars(files).items() if name.endswith("_FIGURE")}
)
_LARGEST = 2**28  # bytes of a page


@dataclass(frozen=True)
class Request:
    """``path`` is decoded; names of ``headers`` are in small letters."""

    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    cookies: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


class Site:
    """The answers about the runs below ``root``, for a machine that is called by ``names`` beside those of this
    process's own machine; ``everywhere``: also by its addresses, which no name can be made to point to."""

    def __init__(self, root: Path, names: frozenset[str] = frozenset(), everywhere: bool = False) -> None:
        self.root = root.resolve()
        self.token, self._session = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
        # Cookies know no ports: two views on one machine have two names.
        self.cookie = f"emsplat-view-{hashlib.blake2b(self._session.encode(), digest_size=4).hexdigest()}"
        self._names = _LOCAL | {name.lower() for name in names}
        if everywhere:
            self._names |= {platform.node().lower(), platform.node().lower().partition(".")[0]} - {""}
        self._everywhere = everywhere
        self._runs: dict[str, Watched] = {}
        self._rows: dict[str, dict[str, Any]] = {}  # of the list, of runs that are not at work
        self._new: deque[Watched] = deque()
        self._again: deque[Watched] = deque()
        self._walk = Walk(self.root)
        self._walked = self._cut = False  # whether once to its end, and whether there is more than that
        self._walking, self._looking = Paced(_EVERY), Paced(_EVERY)
        self._pictures = Pictures()
        self._assets = {
            one.name: one.read_bytes() for one in (resources("emsplat.viewer") / "assets").iterdir() if one.is_file()
        }

    def answer(self, request: Request) -> Answer:
        """What a request gets, with the headers that keep it from others."""
        found = self._answer(request)
        headers = {
            "Content-Security-Policy": _POLICY,
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
        }
        return Answer(found.status, found.body, headers | dict(found.headers))

    def _answer(self, request: Request) -> Answer:
        if not self.is_called(request.headers.get("host", "")):
            return _refusal(
                403,
                "This address does not belong to the live view. It answers to its own machine alone, since a page of "
                "elsewhere could otherwise read what is shown here. Reach it through an ssh tunnel, by localhost or "
                "127.0.0.1; emsplat view --host NAME lets it be called NAME, and then whoever reaches that machine and "
                "knows the token can read every run below its folder.",
            )
        if request.method not in ("GET", "HEAD"):
            return _refusal(405, "Nothing can be changed here: only GET and HEAD are known.", {"Allow": "GET, HEAD"})
        if request.path == "/favicon.ico":  # browsers ask for it beside every page
            return _sent("icon.svg", self._assets["icon.svg"])
        if "token" in request.query:
            return self._welcome(request.query["token"])
        # Another server of this machine is the same site: the cookie comes with what its pages load, as from no other.
        elsewhere = request.headers.get("sec-fetch-site") in ("cross-site", "same-site")
        navigates = request.headers.get("sec-fetch-mode") == "navigate"
        if elsewhere and not navigates:
            return _refusal(403, "Pages of elsewhere may lead here, and load nothing from here.")
        if not _equal(request.cookies.get(self.cookie, ""), self._session):
            # A link from elsewhere comes without the cookie at first, and with it where a page of ours leads on.
            way = quote(request.path, errors="surrogateescape")
            return _onward(way, 403) if elsewhere else _refusal(403, _LOST)
        try:
            return self._page(request)
        except InputError as error:
            return _json({"error": shown_name(str(error).replace(f"{self.root}/", ""))}, 404)

    def is_called(self, host: str) -> bool:
        """Whether a Host header names this machine; the port may be that of a tunnel's other end."""
        name = host.strip().lower()
        if name.startswith("["):
            name, closed, port = name[1:].partition("]")
            if not closed or (port and not (port.startswith(":") and port[1:].isdigit())):
                return False
        elif ":" in name:
            name, _, port = name.partition(":")
            if not port.isdigit():
                return False
        if name.removesuffix(".") in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return self._everywhere

    def _welcome(self, token: str) -> Answer:
        """The cookie for the token. A page that goes on by itself, not a redirection: after one from elsewhere
        browsers would hold back a cookie that is strict, and this way the token is gone from the address."""
        if not _equal(token, self.token):
            return _refusal(403, _LOST)
        cookie = f"{self.cookie}={self._session}; Path=/; HttpOnly; SameSite=Strict"
        return _onward("/", 200, {"Set-Cookie": cookie})

    def _page(self, request: Request) -> Answer:
        match request.path.split("/")[1:]:
            case [""]:
                return _sent("index.html", self._assets["index.html"])
            case ["assets", name] if name in self._assets and name != "index.html":
                return _sent(name, self._assets[name])
            case ["api", "runs"]:
                return self._state(request, self._list)
            case ["api", "run", key]:
                return self._state(request, self._run(key).detail)
            case ["api", "compare", one, other]:
                return self._state(request, lambda: compare(self._run(one), self._run(other)))
            case ["api", "difference", one, other]:
                return _json({"remarks": difference(self._run(one), self._run(other)).remarks})
            case ["difference", one, other]:
                return _sent(".png", difference(self._run(one), self._run(other)).picture)
            case ["slices", key]:
                run = self._run(key)
                picture = self._pictures.slices(self.root, run.folder, request.query.get("map", ""))
                # The address has the version of the file.
                return _sent(".png", picture, {"Cache-Control": "private, max-age=86400"})
            case ["files", key, *below, name] if name in _SENT:
                return self._file(key, below, name)
            case ["files", *_]:
                return _refusal(
                    404, "Only pages and figures of runs are shown here; other files lie in the run folder."
                )
        return _refusal(404, "There is no such page. The list of runs is at /.")

    def _file(self, key: str, below: list[str], name: str) -> Answer:
        """A page or figure of a run, or of one below it."""
        if any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in below):
            return _refusal(404, "There is no such page. The list of runs is at /.")
        body = read_file(self.root, *filter(None, (self._run(key).folder, *below)), name, most=_LARGEST)
        policy = {"Content-Security-Policy": _POLICY_OF_REPORTS} if name.endswith((".html", ".svg")) else {}
        return _sent(name, body, policy)

    def _state(self, request: Request, tell: Callable[[], Any]) -> Answer:
        """What changes, or a word that it has not since the answer whose mark the request names."""
        body = json.dumps(tell(), allow_nan=False, separators=(",", ":")).encode("ascii")
        mark = f'"{hashlib.blake2b(body, digest_size=12).hexdigest()}"'
        if request.headers.get("if-none-match") == mark:
            return Answer(304, headers={"ETag": mark})
        return Answer(200, body, {"Content-Type": "application/json", "ETag": mark, "Cache-Control": "no-cache"})

    # The runs

    def _run(self, key: str) -> Watched:
        """
        Raises:
            InputError: there is no such run.
        """
        if key not in self._runs:
            self._look()
        if key not in self._runs:
            raise InputError("no such run below this folder; expected one of the list; was it moved or removed?")
        run = self._runs[key]
        run.refresh()
        return run

    def _look(self) -> None:
        """Looks for runs that are new or gone, and at those that are known: at what is new and at what is at work
        always, at the others now and then; some time at a time, so that thousands of runs keep nobody waiting."""
        if not self._walked or self._walking.due():
            self._look_for_runs()
        if self._new or self._looking.due():
            with self._looking.doing():
                self._look_at(self._new)
                if not self._new:
                    self._again = self._again or deque(run for run in self._runs.values() if not run.is_open)
                    self._look_at(self._again)
        for run in self._runs.values():
            if run.is_open:
                run.refresh()

    def _look_at(self, waiting: deque[Watched]) -> None:
        end = time.monotonic() + _STEP
        while waiting:
            run = waiting.popleft()
            run.refresh()
            self._rows[run.key] = run.row()
            if time.monotonic() > end:
                return

    def _look_for_runs(self) -> None:
        """Some steps of a walk. What is new is there at once, what has gone is noticed at its end."""
        with self._walking.doing():
            if self._walk.ended:
                self._walk = Walk(self.root)
            self._walk.go_on(_STEP)
            known = {run.folder: run for run in self._runs.values()}
            found = dict.fromkeys(self._walk.runs if self._walk.ended else (*known, *self._walk.runs))
            self._new.extend(Watched(self.root, folder) for folder in found if folder not in known)
            known |= {run.folder: run for run in self._new}
            self._runs = {known[folder].key: known[folder] for folder in found}
            if self._walk.ended:
                self._walked, self._cut = True, self._walk.cut

    def _list(self) -> dict[str, Any]:
        """The runs, those at work before the others and the latest first."""
        self._look()
        rows = [run.row() if run.is_open else self._rows.get(run.key) for run in self._runs.values()]
        seen = [row for row in rows if row is not None]
        seen.sort(key=lambda row: (row["status"] != "running", -(row["began"] or row["changed"] or 0), row["name"]))
        return {
            "folder": shown_name(str(self.root)),
            "runs": seen[:_ROWS],
            "left_out": max(len(seen) - _ROWS, 0),
            "cut": self._cut,
            "looking": not self._walked or len(seen) < len(rows),
        }


_ROWS = 500  # of the list
_HEAD = '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>emsplat view</title>'
_LOST = (
    "This page needs the address with the token that emsplat view has printed where it was started, "
    "http://127.0.0.1:PORT/?token=... . Each start makes a new one."
)


def _equal(given: str, expected: str) -> bool:
    """Compared in a time that does not tell how much of it is right."""
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), expected.encode())


def _sent(name: str, body: bytes, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(200, body, {"Content-Type": _TYPES[f".{name.rpartition('.')[2]}"], **(headers or {})})


def _json(value: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(value).encode("ascii"), {"Content-Type": "application/json"})


def _refusal(status: int, text: str, headers: Mapping[str, str] | None = None) -> Answer:
    body = f"{_HEAD}<p>{html.escape(text)}</p>"
    return Answer(status, body.encode(), {"Content-Type": _TYPES[".html"], **(headers or {})})


def _onward(path: str, status: int, headers: Mapping[str, str] | None = None) -> Answer:
    """A page that leads on to a path of this site at once."""
    there = html.escape("/" + path.lstrip("/"), quote=True)
    body = f'{_HEAD}<meta http-equiv="refresh" content="0; url={there}"><p><a href="{there}">Go on</a></p>'
    return Answer(status, body.encode(), {"Content-Type": _TYPES[".html"], **(headers or {})})
