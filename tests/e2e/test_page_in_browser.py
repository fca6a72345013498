"""The page of scores in a browser: sorting, filtering, addresses, and the console's silence.

The browser is driven by chromedriver's WebDriver protocol, https://www.w3.org/TR/webdriver2/.
"""

import json
import os
import re
import shutil
import subprocess
import urllib.request
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from trl_ext.gibbs_prm.page import write_page
from trl_ext.gibbs_prm.scored import GibbsScores, MonteCarloScores

MISSING = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING) and "CI" not in os.environ,
    reason=f"needs a browser: {' and '.join(MISSING)} not found. On Debian: apt-get install "
    "chromium chromium-driver",
)

OPTIONS = {
    "binary": shutil.which("chromium"),
    "args": [
        *(
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--window-size=1200,900",
        ),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND"),
    ],
}
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element, fixed by the standard
BACKSPACE, TAB, ENTER = "\ue003", "\ue004", "\ue007"


class Browser:
    """A WebDriver session."""

    def __init__(self, port: int):
        self.at = f"http://127.0.0.1:{port}/session"
        wanted = {"goog:chromeOptions": OPTIONS, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self.post("", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        self.at += f"/{session}"

    def post(self, path: str, body: dict | None = None, method: str = "POST") -> Any:
        data = None if method == "DELETE" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self.at + path, data, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, address: str) -> None:
        self.post("/url", {"url": "about:blank"})  # or another fragment would not load it anew
        self.post("/url", {"url": address})

    def run(self, script: str, *arguments: object) -> Any:
        return self.post("/execute/sync", {"script": script, "args": list(arguments)})

    def find(self, selector: str) -> str:
        found = self.post("/element", {"using": "css selector", "value": selector})
        return f"/element/{found[ELEMENT]}"

    def click(self, selector: str) -> None:
        self.post(self.find(selector) + "/click")

    def type(self, selector: str, text: str) -> None:
        self.post(self.find(selector) + "/value", {"text": text})

    def command(self, name: str, **parameters: object) -> Any:
        return self.post("/goog/cdp/execute", {"cmd": name, "params": parameters})

    def column(self, number: int) -> list[str]:
        """What the overview shows in a column, from the top."""
        rows = "[...document.querySelectorAll('#steps tbody tr')]"
        return self.run(f"return {rows}.map(r => r.cells[arguments[0]].textContent)", number)

    def sorted_by(self) -> list[list[str]]:
        script = "return [...document.querySelectorAll('[aria-sort]')]"
        return self.run(script + ".map(h => [h.dataset.key, h.getAttribute('aria-sort')])")

    def hash(self) -> str:
        return self.run("return location.hash")

    def complaints(self) -> list[dict]:
        return self.post("/se/log", {"type": "browser"})


@contextmanager
def chromedriver():
    with subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as driver:
        try:
            assert driver.stdout
            said = (re.search(r"successfully on port (\d+)", line) for line in driver.stdout)
            yield int(next(match[1] for match in said if match))
        finally:
            driver.terminate()


@pytest.fixture(scope="module")
def browser():
    assert not MISSING, f"CI must have {' and '.join(MISSING)}; install them in its image."
    with chromedriver() as port:
        session = Browser(port)
        try:
            yield session
        finally:
            session.post("", method="DELETE")


def one_token_steps(prefix_scores: list[float], texts: list[str]) -> GibbsScores:
    steps = list(range(1, len(texts) + 1))
    scores = GibbsScores("A prompt", "".join(texts), texts, steps, prefix_scores, 2.0)
    return replace(scores, tokens=texts, token_log_ratios=[0.5] * len(texts))


# Step rewards: of the first 2, −10, −1.5, 2; of the second 9, NaN, NaN; of the third −∞.
# As texts "−10" would come before "−1.5", and "9" before "10".
NAN = float("nan")
FIRST = one_token_steps([2.0, -8.0, -9.5, -7.5], ["<b>Two", " apples\n", "שלום", "\ud83d\x00"])
SECOND = MonteCarloScores(
    "p",
    "A pear. B. C.",
    ["A pear. ", "B. ", "C."],
    [3, 5, 7],
    [9.0, NAN, 10.0],
    1.0,
    [0.5, 0.25, 0.0],
)
THIRD = one_token_steps([-float("inf")], ["</script><script>window.hacked = 1</script>"])
# Places on the page, in its order: 0.0 0.1 0.2 0.3 1.0 1.1 1.2 2.0.
ASCENDING = ["−∞", "−10", "−1.5", "2", "2", "9", "NaN", "NaN"]
DESCENDING = ["9", "2", "2", "−1.5", "−10", "−∞", "NaN", "NaN"]


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("page") / "scores.html"
    write_page(
        [FIRST, SECOND, THIRD],
        file,
        ids=["x-1", "x-10", "x-2"],
        labels=[False, True, None],
        first_errors=[1, -1, None],
    )
    return file.as_uri()


@pytest.fixture
def page(browser, address):
    """The page, opened without a fragment; it has written nothing to the console in the end."""
    browser.complaints()
    browser.open(address)
    yield browser
    assert browser.complaints() == []


def test_the_worst_steps_come_first(page):
    assert page.sorted_by() == [["reward", "ascending"]]
    assert page.column(2) == ASCENDING
    # Equals stay in the page's order: both 2s are of the first completion, both NaNs of the second.
    steps = ["0 worst", "1 worst, first error", "2", "0", "3", "0 worst", "1", "2"]
    assert page.column(1) == steps
    assert page.run("return document.getElementById('found').value") == "8 of 8 steps"
    assert page.run("return document.getElementById('more').hidden") is True


def test_a_click_on_a_heading_sorts(page):
    page.click("th[data-key=reward] button")
    assert page.column(2) == DESCENDING and page.hash() == "#sort=reward,descending"
    assert [text.split()[0] for text in page.column(1)] == ["0", "0", "3", "2", "1", "0", "1", "2"]
    page.click("th[data-key=prefix] button")
    assert page.column(3) == ["−∞", "−9.5", "−8", "−7.5", "2", "9", "10", "NaN"]
    assert page.sorted_by() == [["prefix", "ascending"]] and page.hash() == "#sort=prefix,ascending"
    page.click("th[data-key=prefix] button")
    assert page.column(3) == ["10", "9", "2", "−7.5", "−8", "−9.5", "−∞", "NaN"]


@pytest.mark.parametrize(
    ("sort", "column", "shown"),
    [
        ("completion,descending", 0, ["2 x-2", *["1 x-10"] * 3, *["0 x-1"] * 4]),
        ("step,ascending", 1, ["0", "0", "0", "1", "1", "2", "2", "3"]),
        # Without an error, or a label: last in both directions.
        ("error,ascending", 4, ["± 0", "± 0.25", "± 0.5", *[""] * 5]),
        ("error,descending", 4, ["± 0.5", "± 0.25", "± 0", *[""] * 5]),
        ("label,ascending", 5, [*["correct"] * 3, *["incorrect"] * 4, ""]),
        ("label,descending", 5, [*["incorrect"] * 4, *["correct"] * 3, ""]),
    ],
)
def test_an_address_reproduces_a_view(page, address, sort, column, shown):
    page.open(f"{address}#sort={sort}")
    assert page.sorted_by() == [sort.split(",")]
    got = page.column(column)
    assert ([text.split()[0] for text in got] if column == 1 else got) == shown


def test_an_address_that_is_typed_changes_the_view(page):
    page.run("location.hash = 'sort=prefix,descending&filter=pear'")
    assert page.sorted_by() == [["prefix", "descending"]] and page.column(6) == ["A pear."]
    page.post("/back")
    assert page.sorted_by() == [["reward", "ascending"]] and page.column(2) == ASCENDING


def test_any_address_will_do(page, address):
    for odd in ("sort=", "sort=nothing,ascending", "sort=reward,sideways", "filter=%E0%A4%A&sort"):
        page.open(f"{address}#{odd}")
        assert page.sorted_by() == [["reward", "ascending"]]
    page.open(f"{address}#c1s0")
    assert page.column(2) == ASCENDING


def test_headings_by_keyboard(page):
    page.run("document.querySelector('#steps th[data-key=step] button').focus()")
    page.type("th[data-key=step] button", ENTER)
    assert page.hash() == "#sort=step,ascending"
    page.type("th[data-key=step] button", TAB)  # on to the next heading
    key = "return document.activeElement.closest('th').dataset.key"
    assert page.run(key) == "reward"


def test_the_filter(page):
    page.type("#filter", "APPLES")
    assert page.column(6) == ["apples"]
    assert page.hash() == "#sort=reward,ascending&filter=APPLES"
    assert page.run("return document.getElementById('found').value") == "1 of 8 steps"
    page.click("th[data-key=step] button")  # keeps the filter
    assert page.column(6) == ["apples"]
    page.type("#filter", BACKSPACE * len("APPLES"))
    assert len(page.column(6)) == 8 and page.hash() == "#sort=step,ascending"


@pytest.mark.parametrize(
    ("words", "count"),
    [("x-10", 3), ("incorrect", 4), ("first error", 1), ("<b>&=,%", 0), ("<b>", 1)],
)
def test_a_filtered_view_has_an_address(page, words, count):
    page.type("#filter", words)
    assert len(page.column(0)) == count
    address = page.run("return location.href")
    page.open(address)
    assert len(page.column(0)) == count
    assert page.run("return document.getElementById('filter').value") == words


def test_a_step_leads_to_its_place_and_back(page):
    page.click("th[data-key=prefix] button")
    page.click("#steps tbody tr:nth-child(2) td:nth-child(2) a")
    assert page.hash() == "#c0s2"
    assert page.run("return document.querySelector(':target').textContent") == "שלום"
    top = "const {top, bottom} = document.querySelector(':target').getBoundingClientRect();"
    assert page.run(top + "return top >= 0 && bottom <= innerHeight")
    assert page.sorted_by() == [["prefix", "ascending"]]  # the view is as it was
    page.post("/back")
    assert page.hash() == "#sort=prefix,ascending"


def test_text_stays_text(page):
    assert page.run("return window.hacked ?? null") is None
    text = page.run("return document.getElementById('c2s0').textContent")
    assert text == THIRD.tokens[0]
    assert page.run("return document.getElementById('c0s3').textContent") == "⟨U+D83D⟩⟨U+0000⟩"


def test_a_token_says_its_numbers(page):
    token = "document.querySelector('#c0s1 i')"
    assert page.run(f"return {token}.title") == "0.5 / 1"
    place = page.run(
        f"{token}.scrollIntoView(); const r = {token}.getBoundingClientRect();"
        "return [r.x + 5, r.y + 5].map(Math.round)"
    )
    move = {"type": "pointerMove", "duration": 0, "x": place[0], "y": place[1]}
    pointer = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}}
    page.post("/actions", {"actions": [{**pointer, "actions": [move]}]})
    assert page.run(f"return {token}.title") == '" apples\\n"\nlog-ratio 0.5 nats\nscore 1'


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_narrow_window(page, address, scheme):
    page.command(
        "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}]
    )
    size = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    page.command("Emulation.setDeviceMetricsOverride", **size)
    try:
        page.open(address)
        page.run(
            "for (const card of document.querySelectorAll('article'))"
            "  card.style.contentVisibility = 'visible'"
        )
        assert page.run("return innerWidth") == 400
        assert page.run("return document.documentElement.scrollWidth") <= 400
        background = page.run("return getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    finally:
        page.command("Emulation.clearDeviceMetricsOverride")
        page.command("Emulation.setEmulatedMedia", features=[])


def test_without_javascript_all_can_be_read(browser, address):
    browser.command("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(address)
        shown = browser.run("return document.body.innerText")
        is_hidden = browser.run("return document.getElementById('overview').hidden")
    finally:
        browser.command("Emulation.setScriptExecutionDisabled", value=False)
    assert is_hidden and "With JavaScript there is also one table" in shown
    for text in (
        "Completion 2",
        "first error step 1",
        "<b>Two apples",
        "1 worst, first error",
        "± 0.5",
    ):
        assert text in shown, text


def test_the_table_is_drawn_200_rows_at_a_time(page, tmp_path):
    """However many there are: here 5 steps of each of 100 completions."""
    steps, ends = ["a", "b", "c", "d", "e"], [2, 4, 6, 8, 10]
    first = MonteCarloScores("p", "", steps, ends, [], 0.1)
    scores = [replace(first, prefix_scores=[float(n), 0.0, 0.0, 0.0, -1.0]) for n in range(100)]
    page.open(write_page(scores, tmp_path / "large.html").as_uri())
    assert len(page.column(0)) == 200
    page.click("#more")
    assert len(page.column(0)) == 400
    assert page.run("return document.getElementById('more').textContent") == "Show more (100 left)"
    page.click("th[data-key=reward] button")
    assert page.column(2)[:2] == ["99", "98"] and len(page.column(0)) == 200
