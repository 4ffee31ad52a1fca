"""A headless Chromium that tests steer, by the DevTools protocol over two pipes (--remote-debugging-pipe)."""

import base64
import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graft.bench.lab import SLOWNESS, Lab


class Browser:
    """One page in one browser."""

    def __init__(self, read: int, write: int) -> None:
        self.read = os.fdopen(read, "rb", buffering=0)
        self.write = os.fdopen(write, "wb", buffering=0)
        self.number = 0
        self.session = ""
        self.buffer = b""
        self.told: list[dict[str, Any]] = []  # events: what the page has complained of is among them

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command, and return its result. Raises AssertionError with the browser's error."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.write.write(json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                data = self.read.read(1 << 16)
                assert data, "the browser has ended"
                self.buffer += data
            text, _, self.buffer = self.buffer.partition(b"\0")
            answer = json.loads(text)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer["error"]
                result: dict[str, Any] = answer["result"]
                return result
            self.told.append(answer)

    def open(self, address: str) -> None:
        """Open @address in a new page."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Runtime.enable")
        self.call("Page.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=1200, height=800, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=address)

    def value(self, expression: str) -> Any:
        """What the page makes of @expression, as JSON. Raises AssertionError if it throws."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str) -> Any:
        """Wait until @expression is true, at most 20 s."""
        until = time.monotonic() + 20 * SLOWNESS
        while not (found := self.value(f"!!({expression})")):
            assert time.monotonic() < until, f"{expression} is never true: {self.value('document.body.innerText')}"
            time.sleep(0.02)
        return found

    def click(self, selector: str) -> None:
        """Move the mouse to the middle of what @selector finds, and click."""
        x, y = self.value(f"(r => [r.x + r.width / 2, r.y + r.height / 2])(document.querySelector({selector!r}).getBoundingClientRect())")
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def complaints(self) -> list[dict[str, Any]]:
        """What went wrong in the page: exceptions, and what the console has as an error."""
        kinds = ("Runtime.exceptionThrown", "Log.entryAdded")
        return [t for t in self.told if t.get("method") in kinds]

    def picture(self, path: Path) -> None:
        """Write what is seen as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def browser(lab: Lab) -> Iterator[Browser]:
    """A browser in the laboratory's host."""
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    profile = lab.work / "chromium"
    options = ("--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--remote-debugging-pipe", "--no-first-run")
    command = ("bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "-", "chromium", *options)
    process = subprocess.Popen(
        lab.in_host(*command), pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
    )
    os.close(theirs_in)
    os.close(theirs_out)
    one = Browser(ours_in, ours_out)
    try:
        yield one
    finally:
        one.read.close()
        one.write.close()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
