"""A headless Chromium, spoken to over a pipe in its DevTools protocol: opens a page and says what a reader would see.

Debian's `chromium-headless-shell` is enough; nothing is downloaded and no driver is needed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
SECONDS_TO_LOAD = 30.0
PICTURES = """
(async () => {
  await document.fonts.ready;
  const size = (element) => { const box = element.getBoundingClientRect(); return Math.min(box.width, box.height); };
  const shapes = "path, line, circle, rect, polyline, polygon";
  const drawn = (svg) => [...svg.querySelectorAll(shapes)].some((shape) => {
    const box = shape.getBBox();
    return box.width > 0 || box.height > 0;
  });
  const plots = [...document.querySelectorAll("svg")].filter((svg) => !svg.closest("button, label, a, nav, header"));
  return {
    title: document.title,
    text: document.body.innerText.length,
    images: [...document.images].map((image) => ({name: image.src, drawn: image.complete && image.naturalWidth > 0})),
    plots: plots.map((svg, index) => ({name: `svg ${index}`, drawn: size(svg) > 0 && drawn(svg)})),
  };
})()
"""


def executable() -> str | None:
    """The path of a Chromium, if one is installed."""
    return next((path for path in map(shutil.which, NAMES) if path is not None), None)


@dataclass
class Seen:
    """What became of a page: its title, characters of text, pictures by whether they are drawn, and complaints."""

    title: str = ""
    text: int = 0
    images: dict[str, bool] = field(default_factory=dict)
    plots: dict[str, bool] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)  # console errors, exceptions, requests that failed
    requests: list[str] = field(default_factory=list)

    def faults(self, origin: str) -> list[str]:
        """Everything that is wrong with a page that should refer to nothing outside of `origin`."""
        return [
            *self.complaints,
            *(f"not drawn: {name}" for name, drawn in (self.images | self.plots).items() if not drawn),
            *(f"asks elsewhere: {url}" for url in self.requests if not url.startswith((origin, "data:", "blob:"))),
            *([] if self.text else ["the page is empty"]),
        ]


class Tab:
    """One page of the browser."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        return self._browser.ask(method, self._session, **parameters)

    def evaluate(self, expression: str) -> Any:
        """The value of an expression of JavaScript, awaited if it is a promise."""
        answer = self.ask("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_until(self, expression: str) -> None:
        """Wait for an expression to be true."""
        deadline = time.monotonic() + SECONDS_TO_LOAD
        while not self.evaluate(expression):
            assert time.monotonic() < deadline, f"never became true: {expression}"
            time.sleep(0.05)

    def open(self, url: str) -> Seen:
        """Load a page and everything that it asks for."""
        self._browser.events.clear()
        answer = self.ask("Page.navigate", url=url)
        assert "errorText" not in answer, f"{url}: {answer['errorText']}"
        self._browser.wait_for("Page.loadEventFired")
        found = self.evaluate(PICTURES)
        seen = Seen(found["title"], found["text"])
        seen.images = {picture["name"]: picture["drawn"] for picture in found["images"]}
        seen.plots = {picture["name"]: picture["drawn"] for picture in found["plots"]}
        for event in self._browser.events:
            _note(event["method"], event["params"], seen)
        return seen


class Browser:
    """A process of Chromium and the pipe to it."""

    def __init__(self, process: subprocess.Popen[bytes], to_it: int, from_it: int) -> None:
        self.events: list[dict[str, Any]] = []
        self._process, self._to, self._from = process, to_it, from_it
        self._number, self._rest = 0, b""

    def tab(self) -> Tab:
        """A new, empty page."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        return Tab(self, self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])

    def ask(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result; events that come meanwhile are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {} if session is None else {"sessionId": session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return dict(answer["result"])

    def wait_for(self, method: str) -> None:
        """Read until an event of this name came."""
        while all(event["method"] != method for event in self.events):
            self._read()

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._from, 1 << 20)
            assert part, f"the browser ended with exit code {self._process.wait()}"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        if "method" in answer:
            self.events.append(answer)
        return answer


def _note(method: str, event: dict[str, Any], seen: Seen) -> None:
    """What one event of the protocol says of the page."""
    if method == "Network.requestWillBeSent":
        seen.requests.append(event["request"]["url"])
    elif method == "Network.loadingFailed" and not event.get("canceled"):
        seen.complaints.append(f"request failed: {event['errorText']}")
    elif method == "Runtime.exceptionThrown":
        details = event["exceptionDetails"]
        seen.complaints.append(details.get("exception", {}).get("description") or details["text"])
    elif method == "Runtime.consoleAPICalled" and event["type"] in ("error", "assert"):
        seen.complaints.append(" ".join(str(word.get("value", word.get("description"))) for word in event["args"]))
    elif method == "Log.entryAdded" and event["entry"]["level"] == "error":
        seen.complaints.append(f"{event['entry']['text']} {event['entry'].get('url', '')}".strip())


@contextmanager
def browser(path: str, profile: Path) -> Iterator[Browser]:
    """Start the Chromium at `path` with a profile of its own, and end it."""
    its_input, to_it = os.pipe()
    from_it, its_output = os.pipe()
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe"]
    # The pipe is descriptors 3 and 4 of the browser; sh redirects no descriptor above 9.
    start = f'exec "$0" "$@" 3<&{its_input} 4>&{its_output}'
    command = ["bash", "-c", start, path, *flags, f"--user-data-dir={profile}"]
    process = subprocess.Popen(command, pass_fds=(its_input, its_output), stderr=subprocess.DEVNULL)
    os.close(its_input)
    os.close(its_output)
    try:
        yield Browser(process, to_it, from_it)
    finally:
        process.terminate()
        process.wait(timeout=10)
        os.close(to_it)
        os.close(from_it)
