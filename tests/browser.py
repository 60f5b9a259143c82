"""A headless Chromium that tests drive over the DevTools protocol, through a pair of pipes and without a library."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "google-chrome", "chromium-browser")
# Chromium reads commands from descriptor 3 and writes to 4; copies far above them survive each other's dup2.
_LAUNCH = (
    "import os, sys; ends = [os.dup(int(text)) for text in sys.argv[1:3]]; far = [os.dup2(e, 90 + i) for i, e in "
    "enumerate(ends)]; os.dup2(far[0], 3); os.dup2(far[1], 4); os.execvp(sys.argv[3], sys.argv[3:])"
)


def find_browser() -> str:
    """A browser on PATH; the test is skipped where there is none."""
    browser = next((found for found in map(shutil.which, NAMES) if found), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(NAMES)} is on PATH")
    return browser


class Moved(AssertionError):
    """The page went elsewhere before it could answer."""


class Page:
    """One open page: commands in, answers and events out."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, os.fdopen(answers, "rb", buffering=0)
        self._numbers, self._left, self._session = itertools.count(1), b"", ""
        self.problems: list[str] = []  # errors of scripts, of the console and of the policy
        target = next(one for one in self.send("Target.getTargets")["targetInfos"] if one["type"] == "page")
        self._session = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command; events that come before it are looked at for problems."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                if "navigated" in str(answer.get("error")):
                    raise Moved(answer["error"])
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            chunk = self._answers.read(1 << 20)
            assert chunk, "the browser has gone"
            self._left += chunk
        text, _, self._left = self._left.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        method, found = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(found["exceptionDetails"]))
        if method == "Runtime.consoleAPICalled" and found["type"] in ("error", "assert"):
            self.problems.append(json.dumps(found["args"]))
        if method == "Log.entryAdded" and found["entry"]["level"] == "error":
            self.problems.append(found["entry"]["text"])
        return message

    def open(self, path: Path | str) -> None:
        """A file or an address, until its scripts have run and it was drawn."""
        address = path if isinstance(path, str) else path.as_uri()
        self.send("Page.navigate", url=address)
        protocol = json.dumps(address.partition(":")[0] + ":")
        self.wait(f"document.readyState === 'complete' && location.protocol === {protocol}")

    def evaluate(self, script: str) -> Any:
        """The value of an expression, awaited where it is a promise."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until it holds, of this page or of one that it leads on to."""
        while True:
            with suppress(Moved):
                if self.evaluate(condition):
                    return
                self.evaluate("new Promise((done) => setTimeout(done, 20))")

    def frames(self, count: int = 2) -> None:
        """Lets some frames be drawn."""
        self.evaluate(
            f"new Promise((done) => {{ let left = {count};"
            " const step = () => (left-- > 0 ? requestAnimationFrame(step) : done()); step(); })"
        )

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        """``kind`` is moved, pressed or released."""
        button = {"button": "left", "clickCount": 1} if kind != "moved" else {}
        held = {"buttons": 1} if more.pop("held", kind == "pressed") else {}
        self.send("Input.dispatchMouseEvent", type=f"mouse{kind.capitalize()}", x=x, y=y, **button, **held, **more)

    def click(self, x: float, y: float) -> None:
        self.mouse("moved", x, y)
        self.mouse("pressed", x, y)
        self.mouse("released", x, y)

    def key(self, key: str) -> None:
        text = {"text": key} if len(key) == 1 else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key)

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Left, top, width and height on the screen."""
        left, top, width, height = self.evaluate(
            f"(() => {{ const b = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            " return [b.left, b.top, b.width, b.height]; })()"
        )
        return left, top, width, height

    def picture(self, selector: str | None = None) -> bytes:
        """PNG of the window, or of one element."""
        clip = {}
        if selector is not None:
            left, top, width, height = self.box(selector)
            clip = {"clip": {"x": left, "y": top, "width": width, "height": height, "scale": 1}}
        return base64.b64decode(self.send("Page.captureScreenshot", **clip)["data"])

    def size(self, width: int, height: int, *, dark: bool = False) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])


@contextmanager
def browsing(profile: Path, width: int = 1400, height: int = 900) -> Iterator[Page]:
    """A page in a browser of its own: offline, drawing in software."""
    browser = find_browser()
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-unsafe-swiftshader", "--no-first-run"]
    options += [
        "--remote-debugging-pipe",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        "--hide-scrollbars",
    ]
    options += [f"--user-data-dir={profile}", f"--window-size={width},{height}", "about:blank"]
    (read_commands, commands), (answers, write_answers) = os.pipe(), os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", _LAUNCH, str(read_commands), str(write_answers), browser, *options],
        pass_fds=(read_commands, write_answers),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(read_commands)
    os.close(write_answers)
    try:
        page = Page(commands, answers)
        page.size(width, height)
        yield page
        with suppress(AssertionError):
            page.send("Browser.close")
    finally:
        os.close(commands)
        process.terminate()
        process.wait()
