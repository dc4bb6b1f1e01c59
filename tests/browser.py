"""A headless Chromium by its DevTools protocol over a pipe, with the standard library alone."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# Chromium reads commands from descriptor 3 and writes to 4. The two are first moved out of the way.
LAUNCH = """
import fcntl, os, sys
pair = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]]
os.dup2(pair[0], 3), os.dup2(pair[1], 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""
KEY_CODES = {"Backspace": 8, "Enter": 13, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


class Browser:
    """One page of a headless Chromium. Raises TimeoutError where an answer takes longer than `patience`."""

    def __init__(self, program: str, folder: Path, url: str, patience: float = 20):
        self.patience, self.last, self.buffer, self.session = patience, 0, b"", {}
        self.requests: list[str] = []  # URLs
        reads, self.writer = os.pipe()
        self.reader, writes = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += ["--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}"]
        launch = [sys.executable, "-c", LAUNCH, str(reads), str(writes), program, *flags]
        self.process = subprocess.Popen(
            launch, pass_fds=(reads, writes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(reads), os.close(writes)
        target = self.send("Target.createTarget", url=url)["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        self.downloads = folder / "downloads"
        self.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))
        self.send("Network.enable")
        self.wait_for("location.href !== 'about:blank' && document.readyState === 'complete'")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.writer)  # Chromium ends when its pipe closes
        try:
            self.process.wait(self.patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.reader)

    def send(self, method: str, **params: Any) -> dict:
        """The result of a command."""
        self.last += 1
        message = {"id": self.last, "method": method, "params": params} | self.session
        os.write(self.writer, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + self.patience
        while True:
            while b"\0" not in self.buffer:
                if not select.select([self.reader], [], [], max(0, end - time.monotonic()))[0]:
                    raise TimeoutError(method)
                if not (part := os.read(self.reader, 1 << 16)):
                    raise EOFError(f"{method}: Chromium ended")
                self.buffer += part
            text, _, self.buffer = self.buffer.partition(b"\0")
            answer = json.loads(text)  # an event has no id
            if answer.get("method") == "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])
            if answer.get("id") == self.last:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def value(self, expression: str) -> Any:
        """The JSON value of a JavaScript expression."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"]["description"])
        return result["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Return once a JavaScript expression is true."""
        end = time.monotonic() + self.patience
        while not self.value(expression):
            if time.monotonic() > end:
                raise TimeoutError(expression)
            time.sleep(0.05)

    def reload(self, until: str) -> None:
        """Load the page anew until a JavaScript expression is true: in some reloads of a file a headless
        Chromium lacks the localStorage of the load before, and has it again in the next."""
        end = time.monotonic() + self.patience
        while True:
            self.value("window.former = true")
            self.send("Page.reload")
            self.wait_for("!window.former && document.readyState === 'complete'")
            if self.value(until):
                return
            if time.monotonic() > end:
                raise TimeoutError(until)

    def press(self, key: str, **more: Any) -> None:
        code = {"key": key, "code": key, "windowsVirtualKeyCode": KEY_CODES[key]}
        down = "keyDown" if "text" in more else "rawKeyDown"
        self.send("Input.dispatchKeyEvent", type=down, **code, **more)
        self.send("Input.dispatchKeyEvent", type="keyUp", **code)

    def downloaded(self, pattern: str) -> Path:
        """The first file of that name in the folder of downloads, once it is complete."""
        end = time.monotonic() + self.patience
        while not (files := list(self.downloads.glob(pattern))):
            if time.monotonic() > end:
                raise TimeoutError(pattern)
            time.sleep(0.05)
        return files[0]
