"""A headless Chromium that tests drive through its own protocol (Chrome DevTools Protocol)."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

from httpx_ws import connect_ws

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or "chromium"
SECONDS = 30
NAVIGATED = "Inspected target navigated or closed"


class Browser:
    """One browser process; each `page` is a tab with storage of its own."""

    def __init__(self, profile: Path) -> None:
        self.profile = profile
        self.ids = itertools.count()
        self.pages: dict[str, Page] = {}

    def __enter__(self) -> Browser:
        self.process = subprocess.Popen(
            [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
             "--disable-background-networking", "--remote-debugging-port=0", "--hide-scrollbars",
             f"--user-data-dir={self.profile}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.stack = ExitStack()
        found = self.profile / "DevToolsActivePort"
        lines = until(lambda: found.read_text().split() if found.is_file() else [])
        address = f"ws://127.0.0.1:{lines[0]}{lines[1]}"
        self.socket = self.stack.enter_context(connect_ws(address, max_message_size_bytes=1 << 28))
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()
        self.process.terminate()
        self.process.wait(30)

    def page(self, width: int = 1400, *, dark: bool = False, phone: bool = False) -> Page:
        """A new tab, ``width`` CSS pixels wide."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = {"url": "about:blank", "browserContextId": context}
        target = {"targetId": self.call("Target.createTarget", target)["targetId"]}
        session = self.call("Target.attachToTarget", {**target, "flatten": True})["sessionId"]
        page = self.pages[session] = Page(self, session, target["targetId"])
        for domain in ("Page", "Runtime", "Log"):
            page.call(f"{domain}.enable")
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": phone}
        page.call("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", {"features": [scheme]})
        return page

    def call(self, method: str, params: dict | None = None, session: str | None = None) -> dict:
        """A command's result. Events that come meanwhile go to their pages."""
        id = self.send(method, params, session)
        while True:
            got = json.loads(self.socket.receive_text(timeout=SECONDS))
            if got.get("id") == id:
                if got.get("error", {}).get("message") == NAVIGATED:
                    raise NavigatedError
                assert "error" not in got, (method, got)
                return got["result"]
            page = self.pages.get(got.get("sessionId"))
            if page is not None and "method" in got:
                page.hear(got["method"], got["params"])

    def send(self, method: str, params: dict | None = None, session: str | None = None) -> int:
        """Send a command and wait for nothing; its id."""
        message = {"id": next(self.ids), "method": method, "params": params or {}}
        if session is not None:
            message["sessionId"] = session
        self.socket.send_text(json.dumps(message))
        return message["id"]


class NavigatedError(Exception):
    """The page that was asked is gone: another one is being opened."""


class Page:
    """A tab: what it says in the console, and what can be done in it."""

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self.browser = browser
        self.session = session
        self.target = target
        self.console: list[str] = []
        self.password: str | None = None  # for a server that asks the browser itself

    def hear(self, event: str, params: dict) -> None:
        match event:
            case "Runtime.exceptionThrown":
                self.console.append(json.dumps(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled":
                self.console.append(" ".join(str(a.get("value")) for a in params["args"]))
            case "Log.entryAdded":
                self.console.append(params["entry"]["text"])
            case "Fetch.requestPaused":
                asked = {"requestId": params["requestId"]}
                self.browser.send("Fetch.continueRequest", asked, self.session)
            case "Fetch.authRequired":
                answer = {"response": "ProvideCredentials", "username": "me"}
                answer["password"] = self.password
                asked = {"requestId": params["requestId"], "authChallengeResponse": answer}
                self.browser.send("Fetch.continueWithAuth", asked, self.session)

    def call(self, method: str, params: dict | None = None) -> dict:
        return self.browser.call(method, params, self.session)

    def close(self) -> None:
        del self.browser.pages[self.session]
        self.browser.call("Target.closeTarget", {"targetId": self.target})

    def answer_login(self, password: str) -> None:
        """Give this password where the browser asks for one."""
        self.password = password
        self.call("Fetch.enable", {"handleAuthRequests": True})

    def open(self, url: str) -> None:
        # Not waiting for the answer's end: it may ask for a password first.
        self.call("Runtime.evaluate", {"expression": f"location.href = {json.dumps(url)}"})
        there = f"location.href === {json.dumps(url)} && document.readyState === 'complete'"
        until(lambda: self.arrived(there), lambda: f"never: {there}; {self.text()}")

    def arrived(self, there: str) -> bool:
        """Whether an expression is true; not yet where the old page ended while it was asked."""
        try:
            return bool(self.value(there))
        except NavigatedError:
            return False

    def value(self, expression: str) -> object:
        """A JavaScript value; promises are waited for."""
        params = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        got = self.call("Runtime.evaluate", params)
        assert "exceptionDetails" not in got, got
        return got["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until the expression is true."""
        guarded = f"(() => {{ try {{ return Boolean({expression}) }} catch {{}} }})()"
        until(lambda: self.value(guarded), lambda: f"never: {expression}; {self.text()}")

    def text(self, selector: str = "body") -> str:
        """Visible text with single spaces."""
        shown = f"document.querySelector({json.dumps(selector)}).innerText"
        return " ".join(str(self.value(shown)).split())

    def shows(self, words: str, selector: str = "body") -> None:
        """Wait until the text holds these words."""
        until(
            lambda: words in self.text(selector),
            lambda: f"{words!r} not in {self.text(selector)!r}",
        )

    def click(self, selector: str) -> None:
        self.value(f"document.querySelector({json.dumps(selector)}).click()")

    def fill(self, selector: str, text: str) -> None:
        """Put the text into a field, as typing does."""
        self.value(f"document.querySelector({json.dumps(selector)}).select()")
        self.call("Input.insertText", {"text": text})

    def press(self, key: str) -> None:
        """Press and let go of a named key such as Tab."""
        code = {"Tab": 9, "Enter": 13}[key]
        named = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        typed = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", {"type": "keyDown", **named, **typed})
        self.call("Input.dispatchKeyEvent", {"type": "keyUp", **named})

    def picture(self, path: Path) -> None:
        """A PNG of the whole page."""
        params = {"captureBeyondViewport": True}
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        params["clip"] = {**size, "scale": 1}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", params)["data"]))


def until(ask, complaint=lambda: "it never came"):
    """What ``ask`` gives once it is true."""
    deadline = time.monotonic() + SECONDS
    while not (found := ask()):
        assert time.monotonic() < deadline, complaint()
        time.sleep(0.02)
    return found
