"""The report in a real browser: it asks for nothing, complains of nothing, and can be used by mouse, keyboard, on a phone and on paper.

A headless Chromium is spoken to through the pipes of its DevTools protocol, so nothing needs to be installed but the browser.
"""

import base64
import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time

import pytest

from reverie.recipes import read
from reverie.report.render import render

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_SECONDS = 30
# The browser reads commands from descriptor 3 and answers on 4.
_LAUNCH = """import fcntl, os, sys
read, write = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(read, 3), os.dup2(write, 4)
os.execv(sys.argv[3], sys.argv[3:])"""


class Browser:
    """One page. `events` are what the browser told about it since it was opened."""

    def __init__(self, program):
        read, self._write = os.pipe()
        self._read, write = os.pipe()
        self._profile = tempfile.mkdtemp()
        # Without --no-sandbox it refuses to run as root.
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, str(read), str(write), program, *options, f"--user-data-dir={self._profile}"],
            pass_fds=(read, write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read)
        os.close(write)
        self._number, self._buffer, self._session, self.events = 0, b"", None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """The result of a command."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        os.write(self._write, json.dumps(message | ({"sessionId": self._session} if self._session else {})).encode() + b"\0")
        while (answer := self._message()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, file, *, width=1280, height=900, dark=False):
        """Loads the page and waits until it is whole."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        self.call(
            "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        )
        self.events.clear()
        self.call("Page.navigate", url=file.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message())

    def run(self, script):
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key):
        """A key by its name, such as `Tab` or `ArrowRight`."""
        number = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}[key]
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            more = text if kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=number, **more)

    def point_at(self, selector):
        """Moves the mouse onto the middle of the first such element, once the page stands still."""
        left, top = self.run(
            f"""(async () => {{
            const element = document.querySelector({selector!r});
            element.scrollIntoView({{ block: "center", behavior: "instant" }});
            await new Promise(then => requestAnimationFrame(() => requestAnimationFrame(then)));
            const box = element.getBoundingClientRect();
            return [box.left + box.width / 2, box.top + box.height / 2];
        }})()"""
        )
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=left, y=top)

    def pdf(self):
        """The page as it is printed."""
        return base64.b64decode(self.call("Page.printToPDF")["data"])

    def requests(self):
        """What was asked for, without the page itself."""
        asked = [
            event["params"]["request"]["url"] for event in self.events if event.get("method") == "Network.requestWillBeSent"
        ]
        return asked[1:]

    def complaints(self):
        """Errors, warnings and whatever else stands in the console."""
        bad = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [event["params"] for event in self.events if event.get("method") in bad]

    def close(self):
        """Ends the browser."""
        os.close(self._write)
        self._process.terminate()
        self._process.wait(_SECONDS)
        os.close(self._read)
        shutil.rmtree(self._profile, ignore_errors=True)

    def _message(self):
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], _SECONDS)
            assert ready, f"the browser was silent for {_SECONDS} seconds"
            self._buffer += os.read(self._read, 1 << 20)
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)


RECORD = {
    "versions": {"python": "3.11.7", "onnxruntime": "1.31.1", "threads": 2},
    "facts": {"network": "tiny", "options": {"weights": "<img src=x onerror=alert(1)>.pt"}, "seed": 0, "device": "cpu"},
}


@pytest.fixture(scope="module")
def browser():
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no browser found; install one of {', '.join(NAMES)}")
    opened = Browser(program)
    yield opened
    opened.close()


@pytest.fixture
def page(labelled, detailed):
    """A report with every section, in a file."""
    file = detailed / "report.html"
    file.write_text(render(labelled, read("adaround"), RECORD, detailed))
    return file


def tip(browser):
    return browser.run("tip.hidden ? null : tip.innerText")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_is_asked_for_nothing_complained_of_and_nothing_wider_than_the_window(browser, page, width, dark):
    browser.open(page, width=width, dark=dark)
    time.sleep(0.1)
    assert all(url.startswith("data:image/") for url in browser.requests())
    assert browser.complaints() == []
    assert browser.run("[document.documentElement.scrollWidth <= innerWidth, innerWidth]") == [True, width]
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", background))) < 64) == dark


def test_the_policy_stops_what_a_page_might_be_made_to_ask_for(browser, page):
    browser.open(page)
    browser.run("document.body.insertAdjacentHTML('beforeend', '<img src=http://127.0.0.1:9/x.png><img src=x onerror=done=1>')")
    refused = browser.run("fetch('http://127.0.0.1:9/').then(() => 'went out', () => 'refused')")
    time.sleep(0.2)
    assert refused == "refused"
    assert browser.run("typeof done") == "undefined"
    failed = [event["params"] for event in browser.events if event.get("method") == "Network.loadingFailed"]
    assert failed and all(one.get("blockedReason") == "csp" for one in failed)


def test_a_report_is_read_in_under_a_second(browser, page):
    browser.open(page)
    timing = browser.run(
        "(() => { const [n] = performance.getEntriesByType('navigation'); return n.loadEventEnd - n.startTime; })()"
    )
    assert timing < 1000
    assert page.stat().st_size < 5_000_000


def test_a_table_is_sorted_by_its_heads_in_both_directions(browser, page):
    browser.open(page)
    head = "document.querySelectorAll('#tensors th[scope=col]')[3]"
    cells = "[...document.querySelectorAll('#tensors tbody tr')].map(row => Number(row.cells[3].textContent))"
    before = browser.run(cells)
    browser.run(f"{head}.querySelector('button').click()")
    assert browser.run(f"{head}.getAttribute('aria-sort')") == "ascending"
    assert browser.run(cells) == sorted(before) != before
    browser.run(f"{head}.querySelector('button').focus()")
    browser.press("Enter")
    assert browser.run(f"{head}.getAttribute('aria-sort')") == "descending"
    assert browser.run(cells) == sorted(before, reverse=True)
    assert browser.run("document.querySelectorAll('#tensors th[aria-sort]').length") == 1
    assert "descending" in browser.run("said.textContent")


def test_names_are_sorted_as_names_with_their_numbers_in_order(browser, page):
    browser.open(page)
    browser.run("document.querySelector('#tensors thead button').click()")
    names = browser.run("[...document.querySelectorAll('#tensors tbody th')].map(cell => cell.textContent)")
    assert names == ["layer1", "layer2", "layer10", "relu"]


def test_pointing_at_an_image_tells_what_the_network_takes_it_for(browser, page):
    browser.open(page)
    assert tip(browser) is None
    browser.point_at(".thumb[data-number='1']")
    told = tip(browser)
    assert "zeroq, made for class 1" in told and "class 2" in told and "60.0 %" in told
    browser.point_at("h1")
    assert tip(browser) is None


def test_images_are_one_tab_stop_and_arrows_go_from_one_to_the_next(browser, page):
    browser.open(page)
    assert browser.run("document.querySelectorAll('.thumb[tabindex=\"0\"]').length") == 1
    browser.run("document.querySelector('.thumb').focus()")
    browser.press("ArrowRight")
    assert "real, of class 0" in tip(browser)
    browser.press("ArrowLeft")
    assert "zeroq, made for class 0" in tip(browser)
    browser.press("ArrowDown")
    assert browser.run("document.activeElement.dataset.number") == "1"
    assert browser.run("document.activeElement.getAttribute('aria-label')") == (
        "zeroq image made for class 1; the network says class 2, 60.0 %"
    )
    assert "60.0 %" in tip(browser)
    browser.press("Escape")
    assert tip(browser) is None


def test_the_first_tab_stop_skips_to_the_verdict_and_what_has_focus_shows_it(browser, page):
    browser.open(page)
    browser.press("Tab")
    assert browser.run("document.activeElement.hash") == "#verdict"
    assert browser.run("document.activeElement.getBoundingClientRect().top") > 0
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_a_mark_of_a_chart_says_what_it_is(browser, page):
    browser.open(page)
    browser.point_at("#spread .dot")
    assert tip(browser) == "class 0"
    assert browser.run("document.querySelectorAll('[data-plane].lit .dot.on').length") == 2
    browser.run("document.querySelector('svg.lines').focus()")
    browser.press("ArrowRight")
    assert tip(browser) == browser.run("said.textContent") == "zeroq, conv1: 0.1"


def test_the_colours_can_be_changed_by_hand(browser, page):
    browser.open(page)
    light = browser.run("getComputedStyle(document.body).backgroundColor")
    assert browser.run("theme.textContent") == "Dark colours"
    browser.run("theme.click()")
    assert browser.run("theme.textContent") == "Light colours"
    assert browser.run("getComputedStyle(document.body).backgroundColor") != light


@pytest.mark.parametrize("dark", [False, True])
def test_letters_stand_out_from_what_is_behind_them(browser, page, dark):
    browser.open(page, dark=dark)
    low = browser.run(CONTRAST)
    assert low == []


def test_on_paper_nothing_is_folded_away(browser, page):
    browser.open(page)
    assert browser.run("document.querySelectorAll('details').length") > 0
    browser.run(
        "window.open_on_paper = -1; addEventListener('beforeprint', () => "
        "{ open_on_paper = document.querySelectorAll('details:not([open])').length; }); 0"
    )
    printed = browser.pdf()
    assert printed.startswith(b"%PDF")
    assert browser.run("open_on_paper") == 0
    assert browser.run("document.querySelectorAll('details[open]').length") == 0


# Texts whose contrast is below WCAG AA (4.5, of large ones 3), with the ratio. Colours are read from a canvas, whatever their notation.
CONTRAST = """(() => {
  const canvas = document.createElement('canvas'); canvas.width = canvas.height = 1;
  const paint = canvas.getContext('2d', { willReadFrequently: true });
  const over = (layers) => {
    paint.clearRect(0, 0, 1, 1);
    for (const layer of layers) { paint.fillStyle = layer; paint.fillRect(0, 0, 1, 1); }
    return [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (colour) => colour.map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [];
  for (const each of document.querySelectorAll('body *')) {
    const own = [...each.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!own || !each.checkVisibility() || each.matches('script, style, .hidden, .skip')) continue;
    const layers = [];
    for (let at = each; at; at = at.parentElement) layers.unshift(getComputedStyle(at).backgroundColor);
    const style = getComputedStyle(each);
    const letters = each instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [light(over(layers)), light(over([...layers, letters]))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.66 && style.fontWeight >= 700);
    const who = `${each.tagName} ${each.className.baseVal ?? each.className}: ${each.textContent.trim().slice(0, 30)}`;
    if (ratio < (large ? 3 : 4.5)) found.push(`${who} ${ratio.toFixed(2)}`);
  }
  return found;
})()"""
