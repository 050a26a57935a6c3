"""Look at the built site as a reader does: every page, wide and narrow, light and dark, without a network.

    python scripts/screenshots.py OUTPUT [page ...]

Needs ``chromium`` and ``chromedriver``; a tool for authors, not a test. For every page it stores four pictures and
prints console errors, formulas that failed, a page wider than the screen, and a menu that does not open on a phone.
"""

import base64
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

SITE = Path(__file__).resolve().parent.parent / "_build" / "html"
FLAGS = [
    *(
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-sync",
    ),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
    "--host-resolver-rules=MAP * ~NOTFOUND",  # no network
]
SETTLED = """
const [done] = [arguments[arguments.length - 1]];
const wait = () => document.readyState === "complete" && (!window.MathJax || MathJax.startup?.promise)
  ? Promise.resolve(window.MathJax?.startup?.promise).then(() => setTimeout(done, 300))
  : setTimeout(wait, 50);
wait();
"""
FACTS = """
const all = (css) => document.querySelectorAll(css);
return {
  width: document.documentElement.scrollWidth,
  math: all("span.math, div.math").length,
  rendered: all("mjx-container").length,
  failed: all("mjx-merror, [data-mml-node=merror]").length,
};
"""
MENU = """
const button = document.querySelector(".primary-toggle");
button.click();
const box = document.querySelector("#pst-primary-sidebar, .bd-sidebar-primary").getBoundingClientRect();
return box.width > 100 && box.right > 50;
"""


class Browser:
    """A session of chromedriver, through its HTTP interface."""

    def __init__(self, profile: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.process = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL)
        self.url = f"http://127.0.0.1:{port}/session"
        options = {"args": [*FLAGS, f"--user-data-dir={profile}"]}
        wish = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        for _ in range(50):
            try:
                session = self.post("", {"capabilities": {"alwaysMatch": wish}})
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        self.url += f"/{session['sessionId']}"

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Send one command."""
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers)) as reply:
            return json.load(reply)["value"]

    def devtools(self, command: str, **params: Any) -> Any:
        """Send one command of the developer tools."""
        return self.post("/goog/cdp/execute", {"cmd": command, "params": params})

    def script(self, text: str, wait: bool = False) -> Any:
        """Run JavaScript in the page."""
        return self.post("/execute/async" if wait else "/execute/sync", {"script": text, "args": []})

    def look(self, page: Path, width: int, theme: str) -> None:
        """Open a page in a window of a width and a theme, and wait for its formulas."""
        phone = width < 600
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": phone}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        self.post("/url", {"url": page.as_uri()})
        self.script(SETTLED, wait=True)

    def save(self, path: Path, whole: bool = True) -> None:
        """Store a picture, of the whole page or of the window."""
        picture = self.devtools("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(picture["data"]))

    def console(self) -> list[str]:
        """What the page complained about since the last call."""
        entries = self.post("/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]

    def close(self) -> None:
        """Stop the browser."""
        self.process.terminate()
        self.process.wait()


def inspect(browser: Browser, page: Path, output: Path) -> list[str]:
    """Take the pictures of one page; return what is wrong with it."""
    name, wrong = page.relative_to(SITE).with_suffix("").as_posix().replace("/", "-"), []
    for width in (1300, 420):
        for theme in ("light", "dark"):
            browser.look(page, width, theme)
            browser.save(output / f"{name}-{width}-{theme}.png")
            facts = browser.script(FACTS)
            wrong += [f"console: {message}" for message in browser.console()]
            wrong += [f"{facts['width']} px wide at {width}"] if facts["width"] > width else []
            wrong += [f"{facts['failed']} formulas failed"] if facts["failed"] else []
            wrong += ["formulas not rendered"] if facts["rendered"] < facts["math"] else []
    if not browser.script(MENU):
        wrong.append("the menu does not open at 420 px")
    time.sleep(0.5)
    browser.save(output / f"{name}-420-menu.png", whole=False)
    return list(dict.fromkeys(wrong))


def main() -> int:
    """Run the command line."""
    unusable = len(sys.argv) < 2 or any(argument.startswith("-") for argument in sys.argv[1:])
    if unusable or not shutil.which("chromedriver") or not (SITE / "index.html").exists():
        print(__doc__)
        return 2
    output = Path(sys.argv[1])
    output.mkdir(parents=True, exist_ok=True)
    pages = [SITE / name for name in sys.argv[2:]] or sorted((SITE / "book").glob("*.html"))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(profile)
        try:
            found = {page.name: inspect(browser, page, output) for page in pages}
        finally:
            browser.close()
    for name, wrong in found.items():
        print(f"{name}: {'; '.join(wrong) or 'nothing wrong'}")
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())
