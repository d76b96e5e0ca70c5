"""A headless Chromium that a test drives by the WebDriver protocol, without a network."""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

import pytest

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip


class Browser:
    """One window of Chromium."""

    def __init__(self, port: int, profile: Path, *, script: bool = True) -> None:
        self.base = f"http://127.0.0.1:{port}"
        options: dict[str, Any] = {
            "binary": shutil.which("chromium"),
            "args": [*FLAGS, f"--user-data-dir={profile}"],
        }
        if not script:
            options["prefs"] = {"profile.managed_default_content_settings.javascript": 2}
        capabilities = {
            "browserName": "chrome", "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }  # fmt: skip
        session = self._send("/session", {"capabilities": {"alwaysMatch": capabilities}})
        self.base += f"/session/{session['sessionId']}"

    def open(self, address: str) -> None:
        # From a blank page: a change of the fragment alone would not load the page again.
        self._send("/url", {"url": "about:blank"})
        self._send("/url", {"url": address})

    def run(self, script: str) -> Any:
        """Run the body of a function in the page and return its value."""
        return self._send("/execute/sync", {"script": script, "args": []})

    def resize(self, width: int, height: int) -> None:
        """Set the size of the page, which may be that of a phone."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", metrics)

    def set_media(self, **features: str) -> None:
        """Set media features, such as prefers_color_scheme="dark"."""
        named = [{"name": k.replace("_", "-"), "value": v} for k, v in features.items()]
        self.devtools("Emulation.setEmulatedMedia", {"features": named})

    def devtools(self, command: str, parameters: dict[str, Any]) -> Any:
        return self._send("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def screenshot(self, path: Path, *, complete: bool = False) -> None:
        """Write a picture of what the window shows, or of the complete page."""
        shot = self.devtools("Page.captureScreenshot", {"captureBeyondViewport": complete})
        path.write_bytes(base64.b64decode(shot["data"]))

    def errors(self) -> list[str]:
        """Return what the page logged on the console since the last call."""
        return [entry["message"] for entry in self._send("/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """Return the addresses that pages asked for since the last call."""
        entries = self._send("/se/log", {"type": "performance"})
        messages = [json.loads(entry["message"])["message"] for entry in entries]
        return [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]

    def close(self) -> None:
        self._send("", None, "DELETE")

    def _send(self, path: str, content: Any, method: str = "POST") -> Any:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(
            self.base + path, data, {"Content-Type": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except HTTPError as error:
            raise AssertionError(error.read().decode()[:2000]) from None


@contextmanager
def browsers(folder: Path) -> Iterator[Any]:
    """Yield a function that opens a browser; skip if Chromium is not installed.

    Chromium is a package of the system, which a fresh clone does not bring: so this skips also
    where the environment has CI=true.
    """
    driver = shutil.which("chromedriver")
    if driver is None or shutil.which("chromium") is None:
        pytest.skip("needs chromium and chromedriver (Debian: apt install chromium-driver)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    opened: list[Browser] = []

    def open_browser(**options: bool) -> Browser:
        opened.append(Browser(port, folder / f"profile-{len(opened)}", **options))
        return opened[-1]

    try:
        for _ in range(300):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=5):
                    break
            except URLError:
                time.sleep(0.1)
        yield open_browser
    finally:
        for browser in opened:
            browser.close()
        process.terminate()
        process.wait()
