"""The matrix in a real Chromium, driven over its debugging pipe: no driver, no port, no network."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from polyradix_conformance.matrix.model import build
from polyradix_conformance.matrix.page import page
from polyradix_conformance.report import today

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe")


class Browser:
    """One tab. Its profile lives in `folder`. Raises RuntimeError where there is no Chromium."""

    def __init__(self, folder: Path) -> None:
        found = next(filter(None, map(shutil.which, NAMES)), None)
        if found is None:
            raise RuntimeError(f"none of {', '.join(NAMES)} is installed; expected one of them")
        theirs_in, self._in = map(_high, os.pipe())
        self._out, theirs_out = map(_high, os.pipe())
        command = [found, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
        wire = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", wire, "bash", *command], pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer, self._id, self._session = b"", 0, ""
        page = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        self.errors: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._session = ""
        self.call("Browser.close")
        self._process.wait(60)
        os.close(self._in)
        os.close(self._out)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the DevTools protocol, and its result. Page errors seen meanwhile go to `errors`."""
        self._id += 1
        message = {"id": self._id, "method": method, "params": params}
        os.write(
            self._in, json.dumps(message | ({"sessionId": self._session} if self._session else {})).encode() + b"\0"
        )
        while (answer := self._read()).get("id") != self._id:
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.errors.append(json.dumps(answer["params"]))
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, url: str) -> None:
        self.call("Page.navigate", url="about:blank")  # a new fragment alone would not load the page again
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def js(self, expression: str) -> Any:
        out = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        return out["result"].get("value")

    def until(self, expression: str) -> None:
        end = time.monotonic() + 60
        while not self.js(expression):
            if time.monotonic() > end:
                raise TimeoutError(expression)
            time.sleep(0.02)

    def size(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)

    def dark(self, on: bool) -> None:
        value = "dark" if on else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": value}])

    def key(self, name: str) -> None:
        codes = {"Enter": 13, "Escape": 27, "ArrowDown": 40, "ArrowLeft": 37}
        text = {"text": "\r"} if name == "Enter" else {}
        down = {"type": "keyDown", "key": name, "code": name, "windowsVirtualKeyCode": codes[name], **text}
        self.call("Input.dispatchKeyEvent", **down)
        self.call("Input.dispatchKeyEvent", **{**down, "type": "keyUp"})

    def click(self, selector: str) -> None:
        """A mouse click in the middle of the element, where a person would aim."""
        where = f"document.querySelector({json.dumps(selector)})"
        self.js(f"{where}.scrollIntoView({{block: 'center'}})")
        self.js("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(0))))")  # drawn
        x, y = self.js(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({where}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            data = os.read(self._out, 1 << 16)
            if not data:
                raise RuntimeError("Chromium has gone")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(line)
        return message


def _high(fd: int) -> int:
    """A copy above the numbers that the pipe takes."""
    out = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(fd)
    return out


HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
FAILED = "L1/attend/decode/softcap/float32"
RATIOS = {FAILED: 7.5, "L1/attend/heads-mha/float32": 1.3, "L1/attend/heads-mqa/float32": 3.0}
ATTEND = "L1-attend.numpy"
TEXTS = (
    ".matrix th, .matrix td a, .more, .count, .symbol, .tag, .facts, .verdict, .legend li, .why, .device, .date, .how"
)
# The lowest contrast of a text that is shown, by the formula of WCAG 2.
CONTRAST = """(() => {
  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const back = (e) => {
    const color = numbers(getComputedStyle(e).backgroundColor);
    return color[3] === 0 ? back(e.parentElement) : color;
  };
  const all = [...document.querySelectorAll(%s)].map((e) => {
    const [a, b] = [light(numbers(getComputedStyle(e).color)), light(back(e))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  });
  return [all.length, Math.min(...all)];
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    out = Browser(tmp_path_factory.mktemp("profile"))
    yield out
    out.close()


@pytest.fixture
def url(tmp_path: Path, good: dict[str, Any]) -> str:
    """Twelve columns. In each, a case failed with a hostile text, one is waived, and the window is declined."""
    for case in good["cases"]:
        case["error_to_floor"] = RATIOS.get(case["id"], 1.25)
        if case["id"] == FAILED:
            case.update(status="fail", detail=HOSTILE)
        if "window" in case["needs"]["features"]:
            case.update(status="unsupported", error_to_floor=None)
        if case["id"] == "L2/moved/float32":
            waiver = {"reason": HOSTILE, "link": "https://example.org/1", "device": "numpy", "expires": "2999-01-01"}
            case.update(status="waived", waiver=waiver)
    others = [{**good, "backend": f"b{n:02}", "emulated": n % 2 == 0, "device": HOSTILE} for n in range(11)]
    path = tmp_path / "matrix.html"
    path.write_text(page(build([("x", r) for r in (good, *others)], today())))
    return path.as_uri()


def shown(browser: Browser) -> Any:
    """The title of the open panel, None when none is."""
    return browser.js("document.querySelector('dialog[open] h2')?.textContent.trim()")


def test_a_fragment_opens_the_cases_of_its_cell(browser: Browser, url: str, good: dict[str, Any]) -> None:
    browser.open(f"{url}#{ATTEND}")
    assert shown(browser) == "attend on numpy"
    cases = [c for c in good["cases"] if c["id"].startswith("L1/attend/")]
    ids = browser.js("[...document.querySelectorAll('#panel tbody code')].map((e) => e.textContent)")
    assert sorted(ids) == sorted(c["id"] for c in cases)
    assert ids[0] == FAILED  # what is wrong comes first
    assert HOSTILE in browser.js("document.querySelector('#panel tbody tr').textContent")
    bars = browser.js("[...document.querySelectorAll('#panel svg .count')].map((e) => Number(e.textContent))")
    ratios = [c["error_to_floor"] for c in cases if c["error_to_floor"] is not None]
    assert bars == [len(ratios) - 3, 1, 1, 1]  # 1.25, 1.3, 3 and 7.5
    heights = browser.js("[...document.querySelectorAll('#panel rect')].map((e) => Number(e.getAttribute('height')))")
    assert [n for n, tall in enumerate(heights) if tall] == [4, 5, 11, 12]  # a bar holds its upper bound
    assert browser.js("window.hacked") is None
    assert browser.errors == []


def test_mouse_and_keyboard(browser: Browser, url: str) -> None:
    browser.open(url)
    browser.size(1400, 900)
    assert shown(browser) is None
    browser.click(f"[id='{ATTEND}']")
    assert shown(browser) == "attend on numpy"
    browser.key("Escape")
    browser.until("!document.querySelector('dialog[open]')")
    assert browser.js("document.activeElement.id") == ATTEND
    assert browser.js("location.hash") == ""
    browser.key("ArrowLeft")
    browser.key("ArrowDown")
    browser.key("Enter")
    assert shown(browser) == "embed on b10 emulated"
    browser.click("dialog button")
    browser.until("!document.querySelector('dialog[open]')")
    browser.click("[id='L2-moved.numpy']")
    assert shown(browser) == "moved on numpy"
    assert HOSTILE in browser.js("document.querySelector('#panel .detail').textContent")
    browser.js("history.back()")
    browser.until("!document.querySelector('dialog[open]')")
    assert browser.js("window.hacked") is None
    assert browser.errors == []


@pytest.mark.parametrize("width", [390, 1400])
def test_only_the_table_scrolls_sideways_and_its_heads_stay(browser: Browser, url: str, width: int) -> None:
    browser.size(width, 844)
    browser.open(url)
    assert browser.js("document.scrollingElement.scrollWidth") <= width
    corner = "(r => [r.x, r.y])(document.querySelector('.matrix thead th').getBoundingClientRect())"
    side = "document.querySelector('.matrix tbody tr:last-child th').getBoundingClientRect().x"
    before = browser.js(corner), browser.js(side)
    browser.js("document.querySelector('.scroll').scrollTo(200, 600)")
    assert browser.js("document.querySelector('.scroll').scrollTop") == 600
    assert (browser.js(corner), browser.js(side)) == before
    browser.open(f"{url}#{ATTEND}")
    panel = browser.js("(r => [r.left, r.right])(document.querySelector('dialog').getBoundingClientRect())")
    assert 0 <= panel[0] < panel[1] <= width
    assert browser.js("(d => d.scrollWidth <= d.clientWidth)(document.querySelector('dialog'))")


@pytest.mark.parametrize("dark", [False, True])
def test_every_text_can_be_read_in_both_schemes(browser: Browser, url: str, dark: bool) -> None:
    browser.dark(dark)
    browser.open(f"{url}#{ATTEND}")
    back = browser.js("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, back.strip("rgb()").split(","))) < 384) == dark
    count, lowest = browser.js(CONTRAST % json.dumps(TEXTS))
    assert count > 500
    assert lowest >= 4.5


def test_the_table_needs_no_script(browser: Browser, url: str) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(f"{url}#{ATTEND}")
        assert shown(browser) is None
        assert browser.js("document.querySelectorAll('.matrix td a').length") > 12 * 40
        assert browser.js("document.querySelector('noscript').getBoundingClientRect().height") > 0
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
