"""A minimal Chromium driver for tests, over the DevTools protocol's pipe."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
INSTALLED = Path.home() / ".cache/ms-playwright"  # where `playwright install chromium` puts it
FOUND = (
    os.environ.get("CHROMIUM"),
    *map(shutil.which, NAMES),
    *map(str, INSTALLED.glob("chromium-*/chrome-linux*/chrome")),
)
BINARY = next(filter(None, FOUND), None)
WHY_NOT = "no chromium here: pages were not looked at in a browser"
# the only reason to skip: a browser that does not start is a failure
in_a_browser = pytest.mark.skipif(BINARY is None, reason=WHY_NOT)
PATIENCE = 60.0
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39}


class Browser:
    """A headless browser with access to this machine only, which opens one page at a time.

    `events` holds all messages without an id, in order: console lines, requests, CSP violations.
    """

    def __enter__(self) -> Browser:
        assert BINARY is not None
        self.home = tempfile.mkdtemp(prefix="chromium-")
        to_child, self._out = os.pipe()
        self._in, from_child = os.pipe()

        command = [
            BINARY, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            f"--user-data-dir={self.home}", "--remote-debugging-pipe", "about:blank",
        ]  # fmt: skip
        # the pipes must be descriptors 3 and 4 in the child
        script = f'exec 3<&{to_child} 4>&{from_child}; exec "$@"'
        self.process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command],
            pass_fds=(to_child, from_child),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_child)
        os.close(from_child)
        self._buffer = b""
        self._next = 0
        self.session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.session = None
        with contextlib.suppress(RuntimeError, OSError):
            self.send("Browser.close")
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._out)
        os.close(self._in)
        shutil.rmtree(self.home, ignore_errors=True)

    # ---- the protocol ---------------------------------------------------------------------------------------------

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method and wait for its result. Events that arrive meanwhile are kept."""
        self._next += 1
        message: dict[str, Any] = {"id": self._next, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + PATIENCE
        while True:
            answer = self._read(end)
            if answer.get("id") == self._next:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])

    def _read(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise TimeoutError("chromium does not answer")
            got = os.read(self._in, 1 << 20)
            if not got:
                raise RuntimeError("chromium has gone")
            self._buffer += got
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if "id" not in message:
            self.events.append(message)
        return message

    # ---- pages ----------------------------------------------------------------------------------------------------

    def open(
        self, path: Path | str, *, width: int = 1280, height: int = 900, dark: bool = False, media: str = ""
    ) -> None:
        """Open a file or local address in a window of the given size, and wait until it is loaded."""
        self.events.clear()
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", media=media, features=features)
        self.send("Page.navigate", url=path if isinstance(path, str) else path.resolve().as_uri())
        self.loaded()

    def darken(self) -> None:
        """Switch the open page to dark mode."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])

    def loaded(self) -> None:
        """Wait until the requested page is loaded."""
        end = time.monotonic() + PATIENCE
        while not any(e["method"] == "Page.loadEventFired" for e in self.events):
            self._read(end)

    def run(self, script: str) -> Any:
        """Evaluate a script in the page through the protocol, which the page's CSP does not restrict."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(str(result["exceptionDetails"])[:800])
        return result["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key."""
        more = {"text": "\r"} if key == "Enter" else {"text": key} if len(key) == 1 else {}
        self.send(
            "Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=KEYS.get(key, 0), **more
        )
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=KEYS.get(key, 0))

    def wait(self, script: str, why: str = "") -> Any:
        """Wait until a script's value is truthy, and return it."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            with contextlib.suppress(RuntimeError):  # fails between two pages
                # htmx attaches handlers to inserted content when it settles, 20 ms later
                if found := self.run(f"document.querySelector('.htmx-settling') ? null : ({script})"):
                    return found
            time.sleep(0.03)
        raise TimeoutError(why or script)

    def picture(self, target: Path, *, whole: bool = False) -> None:
        """A PNG of the viewport, or of the whole page."""
        extra: dict[str, Any] = {"captureBeyondViewport": whole}
        if whole:
            size = self.send("Page.getLayoutMetrics")["cssContentSize"]
            extra["clip"] = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 16000), "scale": 1}
        target.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png", **extra)["data"]))

    def pdf(self, target: Path) -> None:
        """The page printed as PDF."""
        target.write_bytes(base64.b64decode(self.send("Page.printToPDF", printBackground=True)["data"]))

    def requests(self) -> list[str]:
        """URLs requested since the page was opened."""
        return [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        """Console lines, uncaught errors and CSP violations since the page was opened."""
        found = []
        for e in self.events:
            if e["method"] == "Log.entryAdded":
                found.append(str(e["params"]["entry"].get("text")))
            elif e["method"] == "Runtime.consoleAPICalled":
                found.append(str([a.get("value") for a in e["params"]["args"]]))
            elif e["method"] == "Runtime.exceptionThrown":
                found.append(str(e["params"]["exceptionDetails"])[:600])
        return found
