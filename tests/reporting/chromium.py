"""
A headless Chromium that tests steer, by its DevTools protocol over two pipes: no driver and no package is needed.

    with Chromium() as browser:
        browser.open(path); browser.click("a"); browser.text("h2"); browser.messages
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find_chromium() -> str | None:
    """The browser's path, `CHROMIUM` in the environment first; None if there is none."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Chromium:
    """A browser with one page. Messages on its console, errors of scripts and refused loads stand in `messages`."""

    def __init__(self, path: str, timeout: float = 60.0) -> None:
        self._timeout, self._number, self._left = timeout, 0, b""
        self.messages: list[str] = []
        self._loaded = False
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        read_in, self._out = os.pipe()
        self._in, write_out = os.pipe()

        def place_pipes() -> None:
            # The pipes must be 3 and 4 in the browser; the copies may not close one another.
            a, b = os.dup(read_in), os.dup(write_out)
            os.dup2(a, 3)
            os.dup2(b, 4)

        # Copies above 4, so that place_pipes cannot overwrite one before it is used.
        while min(read_in, write_out) < 5:
            read_in, write_out = os.dup(read_in), os.dup(write_out)
        command = [
            path, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
            "--no-first-run", "--disable-extensions", "--disable-background-networking", "--remote-debugging-pipe",
            f"--user-data-dir={self._profile.name}", "about:blank",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            command, preexec_fn=place_pipes, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(read_in), os.close(write_out)
        self._session = None
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        self.requests: list[str] = []

    def close(self) -> None:
        """End the browser."""
        try:
            self._session = None
            self._send("Browser.close", {})
            self._process.wait(10)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._in), os.close(self._out)
        self._profile.cleanup()

    # ---- what a reader does

    def open(self, address: Path | str) -> None:
        """Load a file or an address, and wait until its scripts have run once."""
        self._loaded, self.requests = False, []
        url = address.resolve().as_uri() if isinstance(address, Path) else address
        self._call("Page.navigate", url="about:blank")
        self._wait(lambda: self._loaded)
        self._loaded = False
        self._call("Page.navigate", url=url)
        self._wait(lambda: self._loaded)

    def click(self, selector: str, place: int = 0) -> None:
        """Click the middle of an element as the mouse does; it is scrolled into view first."""
        box = self.run(
            f"(() => {{ const e = document.querySelectorAll({json.dumps(selector)})[{place}];"
            "e.scrollIntoView({block: 'center', inline: 'center'}); const b = e.getClientRects()[0];"
            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        self.click_at(*box)

    def click_at(self, x: float, y: float) -> None:
        """Move the mouse to a point of the window and press its left button."""
        self.move_to(x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.settle()

    def move_to(self, x: float, y: float) -> None:
        """Move the mouse to a point of the window."""
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.settle()

    def press(self, key: str) -> None:
        """Press a key such as "ArrowRight", "Escape" or "t"."""
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        codes = {"Enter": 13, "Tab": 9, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39}
        named = {"key": key, "windowsVirtualKeyCode": codes.get(key, ord(key[0].upper()))}
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, **named, **(text if kind == "keyDown" else {}))
        self.settle()

    def settle(self) -> None:
        """Wait until what was asked is on the screen."""
        self.run("new Promise(done => requestAnimationFrame(() => setTimeout(done, 0)))")

    def wait_for(self, condition: str, seconds: float = 20.0) -> None:
        """Wait until an expression in the page is true."""
        self.run(
            f"new Promise((done, fail) => {{ const end = performance.now() + {1000 * seconds};"
            f"const look = () => ({condition}) ? done() : performance.now() > end ? fail(Error('never true'))"
            " : setTimeout(look, 20); look(); })"
        )

    # ---- what a reader sees

    def run(self, expression: str) -> object:
        """The value of an expression in the page."""
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise AssertionError(found["exceptionDetails"].get("exception", found["exceptionDetails"]))
        return found["result"].get("value")

    def text(self, selector: str = "main") -> str:
        """The text of the first such element; empty if there is none."""
        return str(self.run(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    def texts(self, selector: str) -> list[str]:
        """The texts of all such elements."""
        return self.run(f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.innerText)")

    def look(self, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Set the window's size and the reader's colours."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = "dark" if dark else "light"
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.settle()

    def picture(self, path: Path, whole: bool = False) -> None:
        """Write what is seen, or the whole page, as PNG."""
        found = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    # ---- what it costs

    def measure_work(self) -> None:
        """From now on [`work`] counts."""
        self._call("Performance.enable", timeDomain="threadTicks")

    def work(self) -> float:
        """Seconds that the page's thread has worked on a processor: scripts, layout, styles, reading the file."""
        metrics = self._call("Performance.getMetrics")["metrics"]
        return next(float(entry["value"]) for entry in metrics if entry["name"] == "TaskDuration")

    # ---- the protocol

    def _call(self, method: str, **given: object) -> dict:
        number = self._send(method, given)
        answer: dict = {}

        def arrived() -> bool:
            return bool(answer)

        self._wait(arrived, number, answer)
        if "error" in answer:
            raise AssertionError(f"{method}: {answer['error']}")
        return answer["result"]

    def _send(self, method: str, given: dict) -> int:
        self._number += 1
        message = {"id": self._number, "method": method, "params": given}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        return self._number

    def _wait(self, done, number: int | None = None, answer: dict | None = None) -> None:
        end = time.monotonic() + self._timeout
        while not done():
            ready, _, _ = select.select([self._in], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise AssertionError(f"Chromium did not answer within {self._timeout:g} s.")
            chunk = os.read(self._in, 1 << 20)
            if not chunk:
                raise AssertionError("Chromium has ended.")
            *whole, self._left = (self._left + chunk).split(b"\0")
            for text in whole:
                message = json.loads(text)
                if number is not None and message.get("id") == number:
                    answer.update(message)
                self._note(message)

    def _note(self, message: dict) -> None:
        method, given = message.get("method"), message.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.consoleAPICalled":
            self.messages.append(" ".join(str(item.get("value", item.get("description"))) for item in given["args"]))
        elif method == "Runtime.exceptionThrown":
            details = given["exceptionDetails"]
            self.messages.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Log.entryAdded":
            self.messages.append(given["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(given["request"]["url"])


@contextmanager
def chromium() -> Iterator[Chromium]:
    """A browser, ended at the end."""
    browser = Chromium(find_chromium() or "chromium")
    try:
        yield browser
    finally:
        browser.close()
