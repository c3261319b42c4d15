"""A run as one HTML file: what is in it, and what a real browser does with it."""

from __future__ import annotations

import json
import re
import shutil
from base64 import b64encode
from dataclasses import replace
from hashlib import sha256
from html import escape
from itertools import combinations

import pytest

from specdec_engine.record.cycle_stats import budget
from specdec_engine.record.events import Cycle, Finished, SettingChanged, Started
from specdec_tui.export import export
from specdec_tui.frame import Frame
from specdec_tui.narrate import narrate
from specdec_tui.page import RunPage, html
from specdec_tui.page.told import told
from specdec_tui.pieces import StreamDecoder
from specdec_tui.streams import DEMO, read_frame

HOSTILE = ["</script><script>document.title = 'owned'</script>", "<img src=x onerror=\"document.title = 'owned'\">",
           "<!--", "{run}", "\x1b[2J", "‮evil", "&lt;", "'\"`", "]]>", "\ud83d"]  # fmt: skip


@pytest.fixture(scope="module")
def demo():
    return read_frame(DEMO)


def hostile() -> tuple[Frame, object]:
    """A run of hostile tokens, drafted, kept, rejected and recovered, and in its settings."""
    cycle = Cycle(0, "<b>x</b>", 3, (0, 1, 2), 1, (0, 3), "recovered", (0.9, 0.1, None), (0.5, 0.5, 0.5), (0.2, 0.9, None),
                  (0.8, 0.5, None), ((3, 0.6), (4, 0.4)), 0.001, 0.01, 0.001, 4)  # fmt: skip
    cycles = [replace(cycle, index=i, drafted=(i % 10, (i + 1) % 10, 2), emitted=(i % 10, 3)) for i in range(10)]
    settings = {"target": HOSTILE[1], "draft": HOSTILE[0], "k": 3, "temperature": 0.7, "rule": "token"}
    events = [Started(tuple(range(10)), settings, 1), SettingChanged(0, HOSTILE[1], 1, 2, HOSTILE[0]), *cycles]
    return Frame().plus([*events, Finished("length", 20, 10, 0.1)]), lambda token: HOSTILE[token]


def test_figures_and_sentences_are_those_of_the_screens(demo):
    frame, name = demo
    made = told(frame, name)
    assert len(made["cycles"]) == len(frame.cycles)
    for cycle, shown in zip(frame.cycles, made["cycles"], strict=True):
        assert shown["said"] == narrate(cycle, name, frame.rule)
        assert [one["kind"] for one in shown["drafted"]] == [cycle.fate(i) for i in range(len(cycle.drafted))]
        for at, one in enumerate(shown["drafted"]):
            assert [value for _, value, _, _ in one["scales"][:2]] == [cycle.q[at], cycle.p[at]]
            assert bool(one["left"]) == (at == cycle.rejected and bool(cycle.residual))
    speedup = budget(frame.summary(), frame.plain_s).speedup
    assert made["headline"][0] == f"{speedup:.2f}×" == made["cycles"][-1]["figures"][0][1]
    text = "".join(text for cycle in made["cycles"] for text, _ in cycle["text"])
    assert text == "".join(map(StreamDecoder(name), (token for c in frame.cycles for token in c.emitted)))


def test_a_page_is_one_small_file_that_allows_nothing_but_itself(demo, tmp_path):
    frame, name = demo
    export(frame, name, tmp_path / "run.html")
    page = (tmp_path / "run.html").read_text("utf-8")
    assert len(page.encode()) < 200_000
    [policy] = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        [inside] = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert b64encode(sha256(inside.encode()).digest()).decode() in policy
    assert not re.search(r"https?://|<link|<img|@import|url\(|innerHTML|\beval\b|document\.write", page)


def test_hostile_text_stays_text():
    frame, name = hostile()
    page = html(frame, name)
    assert page.count("<script") == 2
    assert "<img" not in page
    assert "<b>x" not in page
    [data] = re.findall(r'<script type="application/json" id="run">(.*?)</script>', page, re.DOTALL)
    assert "<" not in data
    assert json.loads(data)["cycles"][0]["drafted"][1]["text"] == HOSTILE[1]


def test_a_run_in_a_notebook_is_a_frame_of_its_own(demo):
    frame, name = demo
    made = RunPage(frame.events(), name)._repr_html_()
    assert made.startswith('<iframe sandbox="allow-scripts" srcdoc="&lt;!doctype html&gt;')
    assert escape(html(frame, name), quote=True) in made


@pytest.mark.parametrize("cut", ["nothing", "unknown", "plain"])
def test_what_is_not_known_is_a_dash_or_left_out(demo, cut):
    frame, name = demo
    match cut:
        case "nothing":
            frame = Frame().plus([Started((1,), {}, None)])
        case "unknown":
            cycle = Cycle(0, "x", None, (None, None), 1, (None, None), "recovered", (None, None), (None, None), (None, None),
                          (None, None), (), None, None, None, None, exactness="inferred")  # fmt: skip
            frame = Frame().plus([Started((None,), {}, None, observer="vLLM"), cycle])
        case _:
            cycle = Cycle(0, "none", 0, (), 0, (5,), "plain", (), (), (), (), (), 0.0, 0.01, 0.0, 1)
            frame = Frame().plus([Started((1,), {}, None), cycle])
    made = told(frame, name)
    assert made["headline"] == ["–" if cut == "nothing" else f"{len(frame.cycles[0].emitted):.2f}", "tokens a cycle"]
    if cut == "unknown":
        assert [text for _, _, text, _ in made["cycles"][0]["drafted"][0]["scales"]] == ["–"] * 3
        assert made["facts"][-1] == "vLLM, inferred"
    assert html(frame, name)


@pytest.fixture(scope="module")
def browser():
    """Chromium without a screen."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("there is no Chromium with its driver here")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield opened
    opened.quit()


class Opened:
    """A page in the browser, by what a reader sees and does."""

    def __init__(self, browser, path):
        self.browser = browser
        browser.get(path.as_uri())

    def press(self, *keys):
        from selenium.webdriver import ActionChains, Keys

        for key in keys:
            ActionChains(self.browser).send_keys(getattr(Keys, key, key)).perform()

    def click(self, name):
        self.browser.find_element("css selector", f'[data-is="{name}"]').click()

    def said(self, name="said"):
        return self.browser.find_element("css selector", f'[data-is="{name}"]').text

    def cycle(self):
        """The number of the current one, 0 before the first."""
        found = self.browser.find_elements("css selector", ".ladder button[aria-current] .number")
        return int(found[0].text) if found else 0

    def run(self, script):
        return self.browser.execute_script(script)


@pytest.fixture
def page(browser, demo, tmp_path):
    frame, name = demo
    export(frame, name, tmp_path / "run.html")
    return Opened(browser, tmp_path / "run.html")


def test_it_steps_by_key_mouse_slider_and_touch(page, demo):
    frame, name = demo
    page.press("HOME")
    assert page.cycle() == 0
    assert page.said().startswith("Press →")
    page.press("ARROW_RIGHT", "ARROW_RIGHT")
    assert page.cycle() == 2
    assert page.said().endswith(narrate(frame.cycles[1], name))
    page.click("forward")
    page.click("back")
    assert page.cycle() == 2
    page.browser.find_elements("css selector", ".ladder button")[8].click()
    assert page.cycle() == 9
    page.press("END")
    assert page.cycle() == len(frame.cycles)
    assert page.said("words").startswith(name(frame.cycles[0].emitted[0]))
    page.press("ARROW_RIGHT")
    assert page.cycle() == len(frame.cycles)
    page.run(
        """const s = document.querySelector('[data-is="slider"]'); s.value = 5; s.dispatchEvent(new Event('input'))"""
    )
    assert page.cycle() == 5
    swipe = """const at = (x) => new Touch({identifier: 1, target: document.body, clientX: x, clientY: 100});
      for (const [kind, x] of [['touchstart', FROM], ['touchend', TO]])
        document.body.dispatchEvent(new TouchEvent(kind, {changedTouches: [at(x)], bubbles: true}))"""
    page.run(swipe.replace("FROM", "300").replace("TO", "100"))
    assert page.cycle() == 6
    page.run(swipe.replace("FROM", "100").replace("TO", "300"))
    assert page.cycle() == 5
    page.press("HOME", "!")
    assert frame.cycles[page.cycle() - 1].rejected is not None


def test_the_decision_is_the_one_of_the_token_pointed_at(page, demo):
    frame, _ = demo
    number = next(i for i, c in enumerate(frame.cycles) if c.accepted and c.rejected is not None and c.residual)
    cycle = frame.cycles[number]
    page.browser.find_elements("css selector", ".ladder button")[number].click()
    assert f"{cycle.p[cycle.rejected]:.3f}" in page.said("decision")
    assert "× rejected" in page.said("decision")
    assert "max(0, p − q)" in page.said("decision")
    page.press("ARROW_UP")
    assert f"drafted token {cycle.rejected} of {len(cycle.drafted)}" in page.said("decision")
    assert "✓ kept" in page.said("decision")
    page.browser.find_elements("css selector", '[data-is="tokens"] button')[-1].click()
    assert "the target's own" in page.said("decision")
    widths = page.run("return [...document.querySelectorAll('.fill')].map((bar) => bar.style.width)")
    assert all(re.fullmatch(r"[\d.]+(e-\d+)?%", width) for width in widths)


def test_nothing_leaves_the_page_and_nothing_goes_wrong_in_it(page):
    page.press("HOME", "ARROW_RIGHT", "END", " ", "ARROW_LEFT")
    requests = [json.loads(entry["message"])["message"] for entry in page.browser.get_log("performance")]
    asked = [r["params"]["request"]["url"] for r in requests if r["method"] == "Network.requestWillBeSent"]
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}
    assert page.run("return performance.getEntriesByType('resource').length") == 0
    assert page.browser.get_log("browser") == []


def test_hostile_text_does_nothing_in_a_browser(browser, tmp_path):
    frame, name = hostile()
    export(frame, name, tmp_path / "run.html")
    page = Opened(browser, tmp_path / "run.html")
    for _ in range(12):
        page.press("ARROW_RIGHT", "ARROW_DOWN")
    assert "owned" not in browser.title or browser.title.startswith("<")
    assert page.run("return document.images.length + document.querySelectorAll('script').length") == 2
    assert HOSTILE[1] in page.said("words")
    assert page.browser.get_log("browser") == []


def test_a_notebooks_frame_steps_too(browser, demo, tmp_path):
    frame, name = demo
    host = tmp_path / "notebook.html"
    host.write_text(f"<!doctype html><p>before</p>{RunPage(frame.events(), name)._repr_html_()}", "utf-8")
    page = Opened(browser, host)
    browser.switch_to.frame(0)
    page.click("forward")
    assert page.cycle() == 1
    browser.switch_to.default_content()


@pytest.mark.parametrize("size", [(360, 740), (1920, 1080)])
def test_no_width_cuts_anything(page, size):
    page.browser.set_window_size(*size)
    page.press("END")
    assert page.run("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    boxes = page.run("""return [...document.querySelectorAll('section')].map((section) => {
      const box = section.getBoundingClientRect(); return [box.left, box.top, box.right, box.bottom]; })""")
    for (left, top, right, bottom), other in combinations(boxes, 2):  # none lies on another
        assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
    page.browser.set_window_size(1200, 900)
