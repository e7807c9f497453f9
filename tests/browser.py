"""A real browser for tests: chromium by way of chromedriver, spoken to as the W3C's WebDriver standard says."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
MISSING = None if CHROMIUM and DRIVER else "chromium and chromedriver, which show the page, are not both installed"
FLAGS = (  # without a screen or a graphics card, and asking nobody for updates
    *("--headless", "--no-sandbox", "--no-first-run", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"),
    *("--disable-background-networking", "--disable-component-update", "--force-device-scale-factor=1"),
    *("--window-size=900,700",),
)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the standard's key for an element
SHIFT = "\ue008"


class Browser:
    """One window. Numbers are CSS pixels."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.options = {"binary": CHROMIUM, "args": [*FLAGS]}

    def begin(self, profile: Path) -> None:
        self.options["args"].append(f"--user-data-dir={profile}")
        wanted = {"goog:chromeOptions": self.options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self.ask("", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        self.address += f"/{session}"

    def ask(self, command: str, body: dict | None = None, method: str | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.address + command, data, {"Content-Type": "application/json"}, method=method)
        with urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def open(self, page: Path) -> None:
        self.go(page.resolve().as_uri())

    def go(self, address: str) -> None:
        self.ask("/url", {"url": address})

    def resize(self, width: int, height: int) -> None:
        """Of the page, however narrow; the window itself has a least width."""
        wanted = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.ask("/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": wanted})

    def give(self, selector: str, *files: Path) -> None:
        """Files to an <input type=file>, as a person would choose them."""
        found = self.ask("/element", {"using": "css selector", "value": selector})
        self.ask(f"/element/{found[ELEMENT]}/value", {"text": "\n".join(str(file.resolve()) for file in files)})

    @contextmanager
    def inside(self, selector: str) -> Iterator[None]:
        """Of an iframe: what is asked for in the block is asked of its page."""
        self.ask("/frame", {"id": self.ask("/element", {"using": "css selector", "value": selector})})
        try:
            yield
        finally:
            self.ask("/frame", {"id": None})

    def picture(self, file: Path) -> None:
        """What the window shows, as a PNG file."""
        file.write_bytes(base64.b64decode(self.ask("/screenshot")))

    def run(self, script: str, *arguments: Any) -> Any:
        """What the body of a function returns; it sees the page's own names."""
        return self.ask("/execute/sync", {"script": script, "args": arguments})

    def later(self, script: str, *arguments: Any) -> Any:
        """What the body of a function hands to its last argument, a callback."""
        return self.ask("/execute/async", {"script": script, "args": arguments})

    def click(self, selector: str) -> None:
        found = self.ask("/element", {"using": "css selector", "value": selector})
        self.ask(f"/element/{found[ELEMENT]}/click", {})

    def drag(self, start: tuple[int, int], by: tuple[int, int], shift: bool = False) -> None:
        """A real mouse's, its left button down."""
        move = [
            {"type": "pointerMove", "duration": 0, "x": start[0], "y": start[1]},
            {"type": "pointerDown", "button": 0},
        ]
        move += [{"type": "pointerMove", "duration": 50, "x": start[0] + by[0], "y": start[1] + by[1]}]
        move += [{"type": "pointerUp", "button": 0}]
        mouse = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": move}
        pauses = [{"type": "pause"}] * (len(move) - 2)
        keys = [{"type": "keyDown", "value": SHIFT}, *pauses, {"type": "keyUp", "value": SHIFT}]
        hand = [{"type": "key", "id": "keys", "actions": keys}] if shift else []
        self.ask("/actions", {"actions": [*hand, mouse]})

    def wheel(self, at: tuple[int, int], pixels: int) -> None:
        turn = {"type": "scroll", "duration": 0, "x": at[0], "y": at[1], "deltaX": 0, "deltaY": pixels}
        self.ask("/actions", {"actions": [{"type": "wheel", "id": "wheel", "actions": [turn]}]})

    def complaints(self) -> list[str]:
        """Errors and warnings on the console since the last call."""
        return [row["message"] for row in self.ask("/se/log", {"type": "browser"}) if row["level"] != "INFO"]


@contextmanager
def browser() -> Iterator[Browser]:
    """Started, and ended with all that it started."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            line = next(line for line in driver.stdout if "started successfully on port" in line)
            port = int(line.rstrip(".\n").split()[-1])
            window = Browser(f"http://127.0.0.1:{port}/session")
            window.begin(Path(profile))
            try:
                yield window
            finally:
                window.ask("", method="DELETE")
        finally:
            driver.terminate()
            driver.wait(30)
            driver.stdout.close()
