"""The page of scores: its colours and tables, hostile text, and how it is written."""

import base64
import hashlib
import math
import re
import weakref
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from trl_ext.errors import ConfigError, DataError
from trl_ext.gibbs_prm import page as module
from trl_ext.gibbs_prm.page import write_page
from trl_ext.gibbs_prm.page_drawing import ColourScale
from trl_ext.gibbs_prm.scored import GibbsScores, MonteCarloScores

VOID = {"meta", "input"}

# β = 0.5, so the tokens score 0.5, −1, 0, 0.2 and the steps −0.5, 0.2. The limits are the largest:
# ⌈0.98·4⌉ = 4 of 4 tokens and ⌈0.98·2⌉ = 2 of 2 steps.
GIBBS = GibbsScores(
    prompt="2 + 2?",
    completion="a\nb c d",
    steps=["a\nb", " c d"],
    step_ends=[2, 4],
    prefix_scores=[-0.5, -0.3],
    beta=0.5,
    tokens=["a\n", "b", " c", " d"],
    token_log_ratios=[1.0, -2.0, 0.0, 0.4],
)
ROLLED_OUT = MonteCarloScores(
    prompt=[{"role": "user", "content": "2 + 2?"}],
    completion="So 4.\nNo, 5.",
    steps=["So 4.\n", "No, 5."],
    step_ends=[4, 8],
    prefix_scores=[0.25, -0.75],
    beta=0.5,
    standard_errors=[0.125, 0.0],
    is_believed=[False, True],
    log_z=1.5,
    log_z_standard_error=0.25,
    notes=["Step 1 was rounded by 2 characters."],
)


class Element:
    def __init__(self, tag, attributes):
        self.tag, self.attributes = tag, dict(attributes)
        self.text, self.inside = "", []

    def __getitem__(self, name):
        return self.attributes[name]

    def all(self, tag, **attributes):
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}.items()
        return [
            each for each in self.inside if each.tag == tag and wanted <= each.attributes.items()
        ]

    def one(self, tag, **attributes):
        [found] = self.all(tag, **attributes)
        return found


class Parser(HTMLParser):
    """All elements, each with its whole text and with all that are inside it."""

    def __init__(self, text):
        super().__init__()
        self.root = Element("root", [])
        self.open = [self.root]
        self.feed(text)
        self.close()
        assert self.open == [self.root]

    def handle_starttag(self, tag, attrs):
        element = Element(tag, attrs)
        for outer in self.open:
            outer.inside.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        for element in self.open:
            element.text += data


@pytest.fixture
def page(tmp_path):
    """Write a page; its elements."""

    def write(*scores, **options):
        file = write_page(list(scores), tmp_path / "page.html", **options)
        return Parser(file.read_bytes().decode("utf-8")).root

    return write


def scored(tokens, log_ratios=None, **changes):
    """One step of these tokens, β = 1."""
    ratios = [0.0] * len(tokens) if log_ratios is None else log_ratios
    text = "".join(tokens)
    one = GibbsScores("p", text, [text], [len(tokens)], [sum(ratios)], 1.0)
    return replace(one, tokens=tokens, token_log_ratios=ratios, **changes)


def cells(row):
    return [cell.text for cell in row.all("td")]


@pytest.mark.parametrize(
    ("value", "colour"),
    [
        # Limit 2 and ten colours on either side of k: one for each 0.2, the nearest.
        (0.0, "k"),
        (0.09, "k"),
        (-0.09, "k"),
        (0.11, "l"),
        (-0.11, "j"),
        (0.25, "l"),  # 1.25 colours up
        (1.0, "p"),
        (-1.0, "f"),
        (2.0, "u"),
        (-2.0, "a"),
        (1e300, "u"),
        (math.inf, "u"),
        (-math.inf, "a"),
        (math.nan, "x"),
    ],
)
def test_a_value_has_the_nearest_colour(value, colour):
    assert ColourScale([2.0, -1.0]).colour(value) == colour


def test_half_way_the_stronger_colour():
    scale = ColourScale([10.0])
    assert [scale.colour(value) for value in (0.5, -0.5, 2.5, -2.5)] == ["l", "j", "n", "h"]


@pytest.mark.parametrize(
    ("values", "limit", "beyond"),
    [
        # The 98th of 100 in size; two are larger.
        ([(-1) ** n * n for n in range(1, 101)], 98, 2),
        ([0.25, -4.0], 4, 0),
        ([0.0] * 99 + [-3.0], 3, 0),  # the quantile is 0: the largest
        ([0.0, 0.0], 1, 0),
        ([], 1, 0),
        ([2.0, math.inf, -math.inf], 2, 2),
    ],
)
def test_the_limit_is_a_quantile(values, limit, beyond):
    scale = ColourScale([*values, math.nan])
    assert (scale.limit, scale.count, scale.beyond) == (limit, len(values), beyond)
    assert scale.missing == 1
    assert scale.ticks == [-limit, -limit / 2, 0, limit / 2, limit]


@pytest.mark.equation("E23")
def test_tokens_have_colours_and_numbers(page):
    text = page(GIBBS).one("div", class_="text completion")
    tokens = text.all("i")
    assert [token.text for token in tokens] == GIBBS.tokens
    # Of ten colours: 0.5/1 the fifth above k, −1/1 the tenth below, 0 none, 0.2/1 the second.
    assert [token.attributes.get("class") for token in tokens] == ["p", "a", None, "m"]
    titles = ["1 / 0.5", "−2 / −1", "0 / 0", "0.4 / 0.2"]
    assert [token["title"] for token in tokens] == titles
    assert [step.text for step in text.all("span")] == GIBBS.steps
    assert [[t.text for t in step.all("i")] for step in text.all("span")] == [
        ["a\n", "b"],
        [" c", " d"],
    ]


def test_line_ends_are_marked_by_what_is_no_text(page):
    text = page(scored(["a\n\n", "b"])).one("div", class_="text completion")
    assert len(text.all("b")) == 2 and text.one("span").text == "a\n\nb"


def test_the_legends_have_numbers(page):
    tokens, steps = page(GIBBS).all("figure")
    assert [tick.text for tick in tokens.all("span")] == ["−1", "−0.5", "0", "0.5", "1"]
    assert [tick.text for tick in steps.all("span")] == ["−0.5", "−0.25", "0", "0.25", "0.5"]
    swatches = [i["class"] for i in tokens.one("div", class_="ramp").all("i")]
    assert swatches == list("abcdefghijklmnopqrstu")
    assert "0 of 4 lie beyond" in tokens.text and "not a number" not in tokens.text


def test_the_table_of_steps(page):
    first, second = page(GIBBS).one("article").one("tbody").all("tr")
    assert cells(first) == ["0 worst", "−0.5", "−0.5", "a\nb"]
    assert cells(second) == ["1", "0.2", "−0.3", "c d"]
    # Step rewards −0.5 of at most 0.5: the tenth colour below; 0.2: the fourth above.
    assert [row.all("td")[1]["class"] for row in (first, second)] == ["a", "o"]
    assert (first["data-r"], first["data-p"]) == (
        "-0.5",
        "-0.5",
    ) and "data-e" not in first.attributes
    assert float(second["data-r"]) == GIBBS.step_rewards[1]  # no digit is lost for sorting
    assert (first.attributes.get("class"), second.attributes.get("class")) == ("marked", None)


def test_places_are_linked_both_ways(page):
    root = page(GIBBS, ROLLED_OUT)
    places = [element.attributes.get("id") for element in root.inside]
    links = [link["href"] for link in root.all("a")]
    assert {"#c0s1", "#c0r1", "#c1s0", "#c1r0", "#c1"} <= set(links)
    assert all(places.count(link.removeprefix("#")) == 1 for link in links)


def test_rolled_out_steps_have_the_colours(page):
    article = page(ROLLED_OUT).one("article")
    text = article.one("div", class_="text completion")
    # Rewards 0.25 and −1, limit 1: 2.5 colours up is the third, and the tenth down.
    assert [step["class"] for step in text.all("span")] == ["step n", "step a"]
    assert [step["title"] for step in text.all("span")] == ["step reward 0.25", "step reward −1"]
    assert not text.all("i") and [step.text for step in text.all("span")] == ROLLED_OUT.steps


def test_standard_errors_and_who_believes_them(page):
    root = page(ROLLED_OUT)
    first, second = root.one("article").one("tbody").all("tr")
    assert cells(first) == ["0", "0.25", "0.25", "± 0.125 ?", "So 4."]
    assert cells(second) == ["1 worst", "−1", "−0.75", "± 0", "No, 5."]
    assert (first["data-e"], second["data-e"]) == ("0.125", "0.0")
    assert "too few effective samples" in first.one("abbr")["title"] and not second.all("abbr")
    text = root.one("article").text
    assert "log Z 1.5 ± 0.25 nats" in text and "Step 1 was rounded by 2 characters." in text


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({}, ["completion", "step", "reward", "prefix", "text"]),
        ({"labels": [True]}, ["completion", "step", "reward", "prefix", "label", "text"]),
    ],
)
def test_columns_of_the_overview(page, options, keys):
    assert [
        each["data-key"] for each in page(GIBBS, **options).one("table", id="steps").all("th")
    ] == (keys)
    if not options:
        with_errors = page(ROLLED_OUT, GIBBS).one("table", id="steps").all("th")
        assert [each["data-key"] for each in with_errors][4] == "error"


def test_labels_and_first_errors(page):
    root = page(
        *[GIBBS] * 5, labels=[True, False, 0.25, None, 1], first_errors=[-1, 1, 0, None, None]
    )
    articles = root.all("article")
    labels = ["correct", "incorrect", "reward 0.25", "", "reward 1"]
    assert [article["data-label"] for article in articles] == labels
    assert "no step is wrong" in articles[0].text and "first error" not in articles[0].text
    assert "worst step 0" in " ".join(articles[0].text.split())
    assert "numbered from 0" in " ".join(root.text.split())
    assert articles[1].one("li", class_="error").one("a")["href"] == "#c1s1"
    marks = [[row.all("td")[0].text for row in each.one("tbody").all("tr")] for each in articles]
    assert marks[1:3] == [["0 worst", "1 first error"], ["0 worst, first error", "1"]]
    assert "first error" not in articles[3].text and "no step is wrong" not in articles[3].text


@pytest.mark.parametrize(("asked", "step"), [(0, "0"), (1, "0"), (2, "1")])
def test_a_first_error_in_a_merged_step(page, asked, step):
    """Of three steps that were asked for, the first two are the first here."""
    root = page(replace(GIBBS, merged_into=[0, 0, 1]), first_errors=[asked])
    link = root.one("li", class_="error").one("a")
    assert (link["href"], link.text) == (f"#c0s{step}", f"step {step}")


def test_what_the_page_is_about(page):
    root = page(GIBBS, title="Five & more", about={"policy": "a<b", "β": 0.1}, ids=["row 7"])
    assert root.one("head").one("title").text == root.one("h1").text == "Five & more"
    about = root.one("table", class_="about")
    assert [th.text for th in about.all("th")] == ["policy", "β"] and cells(about) == ["a<b", "0.1"]
    assert root.one("article").one("span", class_="name").text == "row 7"


@pytest.mark.parametrize(("prompt", "is_open"), [("x" * 300, True), ("x" * 301, False)])
def test_a_long_prompt_is_closed(page, prompt, is_open):
    details = page(replace(GIBBS, prompt=prompt)).one("details", class_="prompt")
    assert ("open" in details.attributes) == is_open and prompt in details.text


def test_prompts_of_messages(page):
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a<b?"}]
    details = page(replace(GIBBS, prompt=prompt)).one("details", class_="prompt")
    assert [text.text for text in details.all("div")] == ["system Be brief.", "user a<b?"]
    assert [role.text for role in details.all("strong")] == ["system", "user"]
    odd = page(replace(GIBBS, prompt={"text": "x"})).one("details", class_="prompt")
    assert odd.one("div").text == "{'text': 'x'}"


def test_steps_of_one_token_have_no_numbers_between_them(page):
    tokens = ["a", "b"]
    by_token = scored(tokens, steps=tokens, step_ends=[1, 2], prefix_scores=[0.0, 0.0])
    assert not page(by_token).one("div", class_="text completion").all("a")
    assert [link.text for link in page(GIBBS).one("div", class_="text completion").all("a")] == [
        "0",
        "1",
    ]


def test_a_long_table_is_closed_and_long_steps_are_cut_in_it(page):
    steps = ["y" * 161, *["x"] * 40]
    long = replace(
        ROLLED_OUT, steps=steps, step_ends=list(range(2, 84, 2)), prefix_scores=[0.0] * 41
    )
    article = page(replace(long, standard_errors=None, is_believed=[])).one("article")
    details = article.one("details", class_="table")
    assert "open" not in details.attributes
    assert cells(article.one("tbody").all("tr")[0])[-1] == "y" * 160 + "…"
    assert article.one("span", id="c0s0").text == "y" * 161
    assert "open" in page(GIBBS).one("details", class_="table").attributes


HOSTILE = {
    "<script>alert(1)</script>": "<script>alert(1)</script>",
    "</i></span><b>": "</i></span><b>",
    "\"'&amp;{{ 1 }}": "\"'&amp;{{ 1 }}",
    "\ud83d": "⟨U+D83D⟩",
    "a\x00\x1b[31m\x7f\x85": "a⟨U+0000⟩⟨U+001B⟩[31m⟨U+007F⟩⟨U+0085⟩",
    "\u202eevil\u2066": "⟨U+202E⟩evil⟨U+2066⟩",
    "\r\n\t": "⟨U+000D⟩\n\t",
    "שלום \u200f": "שלום \u200f",
    "😀é": "😀é",
}


def test_hostile_text_is_only_text(page):
    everywhere = "".join(HOSTILE)
    shown = "".join(HOSTILE.values())
    root = page(
        scored(list(HOSTILE), prompt=everywhere, notes=[everywhere]),
        replace(ROLLED_OUT, prompt=[{"role": everywhere, "content": everywhere}]),
        title=everywhere,
        about={everywhere: everywhere},
        ids=[everywhere] * 2,
    )
    tokens = root.one("span", id="c0s0").all("i")
    assert [token.text for token in tokens] == list(HOSTILE.values())
    assert len(root.all("script")) == 1 and root.inside[-1].tag == "script"
    assert root.one("h1").text == root.one("head").one("title").text == shown
    assert root.one("table", class_="about").text.strip() == shown * 2
    assert root.all("p", class_="note")[0].text == shown
    assert [article["data-name"] for article in root.all("article")] == [shown] * 2
    prompts = [details.one("div").text for details in root.all("details", class_="prompt")]
    assert prompts == [shown, f"{shown} {shown}"]


def test_numbers_that_are_none(page):
    odd = scored(["a", "b", "c", "d"], [math.nan, math.inf, -math.inf, 2.0])
    odd = replace(odd, steps=["ab", "cd"], step_ends=[2, 4], prefix_scores=[-math.inf, math.nan])
    root = page(odd)
    tokens = root.one("div", class_="text completion").all("i")
    assert [token["class"] for token in tokens] == ["x", "u", "a", "u"]
    titles = ["NaN / NaN", "∞ / ∞", "−∞ / −∞", "2 / 2"]
    assert [token["title"] for token in tokens] == titles
    assert "2 of 3 lie beyond" in root.all("figure")[0].text
    assert "Hatched: not a number (1)" in root.all("figure")[0].text
    first, second = root.one("article").one("tbody").all("tr")
    assert cells(first) == ["0 worst", "−∞", "−∞", "ab"] and cells(second) == [
        "1",
        "NaN",
        "NaN",
        "cd",
    ]
    assert (first["data-r"], second["data-r"]) == ("-Infinity", "NaN")


def test_a_step_without_a_reward_is_not_the_worst(page):
    """Rewards NaN, NaN and 0 − 1."""
    odd = replace(
        ROLLED_OUT,
        steps=["a", "b", "c"],
        step_ends=[2, 4, 6],
        prefix_scores=[math.nan, 1.0, 0.0],
        standard_errors=None,
        is_believed=[],
    )
    rows = page(odd).one("article").one("tbody").all("tr")
    assert [cells(row)[0] for row in rows] == ["0", "1", "2 worst"]


def test_the_picture_of_the_prefix_scores(page):
    # From 0 over 1 to −1, 120 wide and 24 high: the middle, the top, the bottom.
    up_and_down = replace(GIBBS, prefix_scores=[1.0, -1.0])
    picture = page(up_and_down).one("svg")
    assert [path["d"] for path in picture.all("path")] == ["M0,12H120", "M0,12L60,0L120,24"]
    assert (picture.one("circle")["cx"], picture.one("circle")["cy"]) == ("120", "24")
    assert picture.one("title").text == "Prefix scores between −1 and 1"
    gap = page(replace(GIBBS, prefix_scores=[math.nan, 1.0])).one("svg")
    assert [path["d"] for path in gap.all("path")] == ["M0,24H120", "M0,24M120,0"]


def test_the_picture_has_standard_errors(page):
    # Between 1 + 1 and −1 − 1: a score is 6 pixels.
    sure = replace(ROLLED_OUT, prefix_scores=[1.0, -1.0], standard_errors=[1.0, math.nan])
    zero, ranges, line = page(replace(sure, standard_errors=[1.0, 1.0])).one("svg").all("path")
    assert ranges["d"] == "M60,12L60,0M120,24L120,12" and line["d"] == "M0,12L60,6L120,18"
    assert zero["d"] == "M0,12H120"
    assert "M120" not in page(sure).one("svg").all("path")[1]["d"]


def test_empty_completions_and_empty_pages(page):
    empty = GibbsScores("p", "", [], [], [], 0.5)
    article = page(empty, GIBBS).all("article")[0]
    assert "The completion is empty." in article.text and "score 0" in article.text
    assert not article.all("table") and not article.all("svg")
    assert "There are no completions." in page().text and not page().all("figure")


def test_nothing_from_elsewhere(page):
    root = page(GIBBS, ROLLED_OUT)
    assert not [e for e in root.inside if {"src", "style", "onclick"} & e.attributes.keys()]
    assert not root.all("link")
    assert all(link["href"].startswith("#") for link in root.all("a"))
    assert not re.search(r"url\(|@import|https?:", root.one("style").text + root.one("script").text)
    [policy] = [m["content"] for m in root.all("meta") if "http-equiv" in m.attributes]
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    for kind in ("style", "script"):
        digest = hashlib.sha256(root.one(kind).text.encode()).digest()
        assert f"{kind}-src 'sha256-{base64.b64encode(digest).decode()}'" in policy


def luminance(colour):
    parts = [part / 255 for part in colour]
    parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def hexadecimal(text):
    return [int(pair, 16) for pair in re.findall("..", text * 2 if len(text) == 3 else text)]


def test_text_is_read_on_every_colour(page):
    """WCAG 2: contrast (L₁ + 0.05)/(L₂ + 0.05) of at least 4.5 between text and background."""
    style = page(GIBBS).one("style").text
    schemes = re.findall(r"--up: (.*?); --down: (.*?);\s*--ink: #(\w+);.*?--card: #(\w+);", style)
    assert len(schemes) == 2  # light and dark
    rules = re.findall(r"\.(\w)\{background:rgba\(var\(--(up|down)\),([\d.]+)\)", style)
    assert [name for name, _, _ in rules] == list("abcdefghijklmnopqrstu")
    assert [float(part) for _, _, part in rules] == [abs(n) / 10 for n in range(-10, 11)]
    assert [side for _, side, _ in rules] == ["down"] * 11 + ["up"] * 10
    for up, down, ink, card in schemes:
        ends = {"up": up, "down": down}
        for _, side, part in rules:
            end = [int(channel) for channel in ends[side].split(",")]
            mixed = [
                float(part) * e + (1 - float(part)) * c
                for e, c in zip(end, hexadecimal(card), strict=True)
            ]
            lights = sorted([luminance(mixed), luminance(hexadecimal(ink))])
            assert (lights[1] + 0.05) / (lights[0] + 0.05) >= 4.5, (side, part)


def test_a_token_costs_few_bytes(tmp_path):
    sizes = []
    for count in (1000, 3000):
        ratios = [(-1) ** n * 0.0123 * (n % 100) for n in range(count)]
        file = write_page([scored(["a"] * count, ratios)], tmp_path / "page.html")
        sizes.append(file.stat().st_size)
    # <i class=a title="−0.123 / −0.123">a</i> has 42 bytes of 38 characters, a minus being 3 of
    # them; the step's brief text grows no more. So a thousand completions of 300 tokens: 13 MB.
    assert (sizes[1] - sizes[0]) / 2000 <= 42


class Fresh:
    """Scores that are made anew in each walk, and how many of them were alive at once."""

    def __init__(self, count):
        self.count, self.walks, self.made, self.most = count, 0, [], 0

    def __iter__(self):
        self.walks += 1
        for place in range(self.count):
            one = replace(GIBBS, prompt=f"Prompt {place}")
            self.made.append(weakref.ref(one))
            self.most = max(self.most, sum(ref() is not None for ref in self.made))
            yield one


def test_scores_are_walked_not_held(tmp_path):
    fresh = Fresh(20)
    text = write_page(fresh, tmp_path / "page.html").read_text()
    assert fresh.walks == 2 and "Prompt 19" in text
    # One in the hand of the reader, one in the template's, one being made.
    assert fresh.most <= 3


def test_an_iterator_will_do(tmp_path):
    file = write_page(iter([GIBBS, ROLLED_OUT]), tmp_path / "page.html")
    assert file.read_text().count("<article") == 2


class Broken(Fresh):
    """Ends in the middle of the second walk."""

    def __iter__(self):
        for place, one in enumerate(super().__iter__()):
            if self.walks == 2 and place == 10:
                raise KeyboardInterrupt
            yield one


def test_an_interrupted_write_leaves_what_was_there(tmp_path):
    file = tmp_path / "folder" / "page.html"
    assert write_page([GIBBS], str(file)) == file
    before = file.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        write_page(Broken(20), file)
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]
    write_page([GIBBS, GIBBS], file)
    assert file.read_text().count("<article") == 2 and list(file.parent.iterdir()) == [file]


def test_a_page_is_written_piece_by_piece(tmp_path, monkeypatch):
    """The first card is out before the last scores are asked for."""
    fresh, asked = Fresh(20), []

    def write(path, chunks):
        for chunk in chunks:
            if "Prompt 0" in chunk:
                asked.append(len(fresh.made) - fresh.count)

    monkeypatch.setattr(module, "_write_whole", write)
    write_page(fresh, tmp_path / "page.html")
    assert asked and asked[0] <= 2


@pytest.mark.parametrize(
    ("one", "says"),
    [
        (replace(GIBBS, prefix_scores=[0.0]), "Completion 1 has 2 steps, but 1 prefix scores"),
        (replace(GIBBS, step_ends=[4]), "2 steps, but 1 step ends"),
        (replace(GIBBS, tokens=["a"]), "but 1 tokens up to token 4"),
        (replace(GIBBS, token_log_ratios=[]), "but 0 log-ratios up to token 4"),
        (replace(GIBBS, step_ends=[2, 3]), "but 4 tokens up to token 3, 4 log-ratios"),
        (replace(ROLLED_OUT, standard_errors=[]), "but 0 standard errors"),
        (replace(ROLLED_OUT, is_believed=[True]), "but 1 marks whether they are believed"),
    ],
)
def test_parts_that_do_not_fit(page, one, says):
    with pytest.raises(DataError, match=re.escape(says)):
        page(GIBBS, one)


@pytest.mark.parametrize(
    "options", [{"labels": [True]}, {"first_errors": [0, 0, 0]}, {"ids": []}], ids=str
)
def test_what_is_known_must_be_known_of_each(page, options):
    [(name, values)] = options.items()
    with pytest.raises(DataError, match=f"`{name}` has {len(values)} entries for 2 scored"):
        page(GIBBS, GIBBS, **options)


@pytest.mark.parametrize("first_error", [2, -2])
def test_a_first_error_is_a_step(page, first_error):
    with pytest.raises(DataError, match=f"completion 0 is step {first_error}, but it has 2 steps"):
        page(GIBBS, first_errors=[first_error])
    with pytest.raises(DataError, match="step 3, but it has 3 steps"):
        page(replace(GIBBS, merged_into=[0, 0, 1]), first_errors=[3])


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ConfigError, match="is a folder; name a file"):
        write_page([GIBBS], tmp_path)


def test_a_label_that_is_a_text(page):
    with pytest.raises(
        DataError, match=r"A label is 'right'; .* 'right' is a text: write true for"
    ):
        page(GIBBS, labels=["right"])
