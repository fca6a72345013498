"""Completions cut into steps of whole tokens."""

import re
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_ext.errors import ConfigError, DataError
from trl_ext.gibbs_prm.encoding import Encoded
from trl_ext.gibbs_prm.steps import NAMES, check_steps, cut


def of(*tokens: str, end_text: str = "", turn_ends: tuple[int, ...] = ()) -> Encoded:
    """An encoded completion of these tokens."""
    ends = list(accumulate(map(len, tokens)))
    ids = list(range(len(tokens)))
    return Encoded(
        [1], ids, "".join(tokens), list(tokens), ends, [True] * len(ids), [*turn_ends], end_text
    )


def by_character(text: str, end_text: str = "") -> Encoded:
    """Every character a token, and the end-of-turn token."""
    return of(*text, *([end_text] if end_text else []), end_text=end_text)


def texts(text: str, steps) -> list[str]:
    return cut(by_character(text), steps).texts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nb", ["a\n", "b"]),
        ("a\n\n \t\n  b\n", ["a\n\n \t\n", "  b\n"]),
        ("a\r\n\r\nb\rc", ["a\r\n\r\n", "b\r", "c"]),
        ("\n\na\nb", ["\n\na\n", "b"]),
        ("a\nb\n \n  ", ["a\n", "b\n \n  "]),
        ("a b", ["a b"]),
        (" \n", [" \n"]),
    ],
)
def test_lines(text, expected):
    assert texts(text, "newline") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four… End", ["One. ", "Two! ", "Three? ", "Four… ", "End"]),
        ("It is 3.14 or 2. Yes.", ["It is 3.14 or 2. ", "Yes."]),
        ("See e.g. this, i.e. that.  Dr. No.", ["See e.g. this, i.e. that.  ", "Dr. No."]),
        ("Mr. A and Fig. 3 vs. B, cf. C.", ["Mr. A and Fig. 3 vs. B, cf. C."]),
        ("Pears, etc. are fruit etc. So", ["Pears, etc. are fruit etc. ", "So"]),
        ("It took 5 ms. Two configs. Then", ["It took 5 ms. ", "Two configs. ", "Then"]),
        ("He said “Go.” She (left.) Now", ["He said “Go.” ", "She (left.) ", "Now"]),
        ("What?! No... Yes", ["What?! ", "No... ", "Yes"]),
        ("一。二！三？四．五", ["一。", "二！", "三？", "四．五"]),
        ("四． 五", ["四． ", "五"]),
        ("No end\nTwo\n\n  Three.\n  Four", ["No end\n", "Two\n\n", "  Three.\n", "  Four"]),
        ("1. First. 2\n 2. Second\n3.\nx", ["1. First. ", "2\n", " 2. Second\n", "3.\n", "x"]),
        ("“4.” Go\n4.” Go", ["“4.” ", "Go\n", "4.” ", "Go"]),
        ("a.b.c and x.y", ["a.b.c and x.y"]),
        ("Version e.g.x. Y", ["Version e.g.x. ", "Y"]),
        ("", []),
    ],
)
def test_sentences(text, expected):
    assert texts(text, "sentence") == expected


def test_paragraphs():
    text = "a\nb\n\nc\r\n \r\n\n d\n\n"
    assert texts(text, "paragraph") == ["a\nb\n\n", "c\r\n \r\n\n", " d\n\n"]
    assert texts("\n\na\n\nb", "paragraph") == ["\n\na\n\n", "b"]


def test_tokens_whole_and_turns():
    encoded = of("a", "", " b", "\n", turn_ends=(1, 4))
    every = cut(encoded, "token")
    assert (every.texts, every.token_ends) == (["a", "", " b", "\n"], [1, 2, 3, 4])
    assert every.merged_into == [0, 1, 2, 3]
    assert cut(encoded, "whole").token_ends == [4]
    assert cut(encoded, "turn").texts == ["a", " b\n"]
    with pytest.raises(DataError, match="is a text, which has no turns"):
        cut(of("a"), "turn")


@pytest.mark.parametrize("steps", [{"regex": r"Step \d+:|;"}, re.compile(r"Step \d+:|;")])
def test_a_step_ends_behind_each_match(steps):
    assert texts("x;Step 12: y;", steps) == ["x;", "Step 12:", " y;"]


def test_a_regex_may_match_an_empty_place():
    # Behind "a", where "b" follows; and at the beginning, where no step can end.
    found = cut(by_character("abab"), {"regex": r"^|(?=b)"})
    assert (found.texts, found.merged_into) == (["a", "ba", "b"], [0, 1, 2])
    # The second match is empty, at the place where the first ends.
    twice = cut(by_character("ab"), {"regex": r"a|(?<=a)"})
    assert (twice.texts, twice.merged_into) == (["a", "b"], [0, 1])


@pytest.mark.parametrize("steps", [*NAMES, {"regex": "x"}, [], ()])
def test_an_empty_completion_has_no_steps(steps):
    empty = cut(of(), steps)
    assert (empty.texts, empty.token_ends, empty.notes, empty.merged_into) == ([], [], [], [])


def test_the_end_of_turn_belongs_to_the_last_step():
    encoded = by_character("a\nb. \n", "<|im_end|>")
    assert cut(encoded, "newline").texts == ["a\n", "b. \n<|im_end|>"]
    assert cut(encoded, "sentence").texts == ["a\n", "b. \n<|im_end|>"]
    assert cut(encoded, ["a", "b."]).texts == ["a\n", "b. \n<|im_end|>"]
    assert cut(encoded, [2, 6]).texts == ["a\n", "b. \n<|im_end|>"]
    assert cut(encoded, "token").texts[-1] == "<|im_end|>"
    only = by_character("", "<|im_end|>")
    assert cut(only, "newline").texts == ["<|im_end|>"]
    assert cut(only, []).texts == []


def test_a_boundary_inside_a_token_is_rounded_to_its_end():
    # The first line ends with the second character of the token "b\nc".
    rounded = cut(of("a", "b\nc", "d"), "newline")
    assert (rounded.texts, rounded.token_ends) == (["ab\nc", "d"], [2, 3])
    assert rounded.notes == ["step 0 was rounded by 1 character, to the end of 'b\\nc'"]
    assert rounded.merged_into == [0, 1]
    by_two = cut(of("ab;cd", "e"), {"regex": ";"})
    assert by_two.notes == ["step 0 was rounded by 2 characters, to the end of 'ab;cd'"]


def test_a_space_stays_with_the_word_that_it_opens():
    spaced = cut(of("One", ".", " Two", ".", " ", " Three"), "sentence")
    assert spaced.texts == ["One.", " Two. ", " Three"]
    assert (spaced.token_ends, spaced.notes) == ([2, 5, 6], [])
    assert cut(of("One", ".", " Two"), ["One.", "Two"]).texts == ["One.", " Two"]
    # Nothing would be left of the step of one space.
    blank = cut(of("a", " \nb"), {"regex": "[a ]"})
    assert (blank.texts, blank.merged_into) == (["a", " \nb"], [0, 1, 1])


def test_steps_that_share_a_token_count_as_one():
    shared = cut(of("a\n", "b\nc\n", "d"), "newline")
    assert (shared.texts, shared.token_ends) == (["a\n", "b\nc\n", "d"], [1, 2, 3])
    assert shared.merged_into == [0, 1, 1, 2]
    assert shared.notes == ["steps 1 and 2 share the token 'b\\nc\\n' and count as one"]
    three = cut(of("a\nb\nc\nd"), "newline")
    assert three.merged_into == [0, 0, 0, 0]
    assert three.notes == ["steps 0, 1, 2 and 3 share the token 'a\\nb\\nc\\nd' and count as one"]


def test_shared_and_rounded():
    both = cut(of("a;b;c", "d;", "e"), {"regex": ";"})
    # "a;", "b;" and the beginning of "cd;" lie in the first token.
    assert (both.texts, both.merged_into) == (["a;b;c", "d;", "e"], [0, 0, 1, 2])
    assert both.notes == [
        "steps 0 and 1 share the token 'a;b;c' and count as one",
        "step 1 was rounded by 1 character, to the end of 'a;b;c'",
    ]


def test_parts_of_a_character_belong_to_the_step_that_it_opens():
    # "a", and then four tokens of which the last completes one character.
    encoded = of("a", "", "", "", "😀", "b")
    assert cut(encoded, [1, 2, 3]).token_ends == [1, 5, 6]
    # Behind the last character: the last step's.
    assert cut(of("a", "b", ""), [1, 2]).token_ends == [1, 3]
    assert cut(of("a", "b\n", "", ""), ["a", "b"]).token_ends == [1, 4]
    assert cut(of("", ""), "whole").token_ends == [2]
    shared = cut(of("a;b", ""), {"regex": ";"})
    assert (shared.texts, shared.token_ends, shared.merged_into) == (["a;b"], [2], [0, 0])


def test_given_texts():
    found = cut(by_character(" a\n\n b c \n"), ["a", "b c"])
    assert (found.texts, found.notes, found.merged_into) == ([" a\n\n ", "b c \n"], [], [0, 1])
    # A step that is given with its indentation keeps it.
    assert texts("a\n\n  b", ["a", "  b"]) == ["a\n\n", "  b"]
    assert texts("a\n\n  b", ["a\n", "\n  b"]) == ["a\n", "\n  b"]
    assert texts("aa b", ["aa", "\n\t b"]) == ["aa ", "b"]
    # The same text twice is found twice.
    assert texts("a a b", ["a", "a", "b"]) == ["a ", "a ", "b"]
    assert cut(by_character("ab"), ("a", "b")).texts == ["a", "b"]


def test_given_steps_without_text_are_part_of_others():
    found = cut(by_character("a b", "<eos>"), ["", "a", " ", "b", "\n", ""])
    assert found.texts == ["a ", "b<eos>"]
    assert found.merged_into == [0, 0, 0, 1, 1, 1]
    assert found.notes == [
        f"step {step} is empty and counts as part of its neighbour" for step in (0, 2, 4, 5)
    ]
    # The space between the steps is part of a word, and the empty step goes with it.
    spaced = cut(of("a", ".", " b"), ["a.", "", "b"])
    assert (spaced.texts, spaced.merged_into) == (["a.", " b"], [0, 0, 1])


@pytest.mark.parametrize(
    ("text", "steps", "error", "says"),
    [
        ("a b", ["a", "c"], DataError, r"Step 1 \(from 0\), 'c', .* character 2: 'b'"),
        ("a x b", ["a", "b"], DataError, r"Step 1 .* character 2: 'x b'"),
        ("a b c", ["a", "b"], DataError, "end at character 3 .* goes on with ' c'"),
        ("a", [], DataError, "0 steps are given for the completion 'a'"),
        ("", ["a"], DataError, "1 steps are given for the completion ''"),
        ("", [""], DataError, "1 steps are given"),
        ("abc", [2, 2, 3], DataError, "2 follows 2, and the completion has 3 characters"),
        ("abc", [0, 3], DataError, "0 follows 0"),
        ("abc", [1, 4], DataError, "from at least 1 to at most 3"),
        ("abc", [1, 2], DataError, "end at character 2 .* goes on with 'c'"),
        ("abc", [["abc"]], ConfigError, "steps of several completions"),
    ],
)
def test_given_steps_are_of_this_completion(text, steps, error, says):
    with pytest.raises(error, match=says):
        cut(by_character(text), steps)


def test_the_end_may_be_given():
    short = cut(by_character("ab \n"), [1, 2])
    assert (short.texts, short.notes) == (["a", "b \n"], [])
    assert cut(by_character("ab", "<eos>"), [1, 7]).texts == ["a", "b<eos>"]


@pytest.mark.parametrize(
    "steps",
    [*NAMES, {"regex": "x"}, {"regex": "x*y"}, {"regex": "(?=Step)"}, {"regex": "$"},
     {"regex": r"[\s\S]"}, re.compile("x"), ["a"], [1], [], [["a"], [1, 2], []], (("a",),)],
)  # fmt: skip
def test_ways_to_cut(steps):
    check_steps(steps)


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ("newlines", r"steps is 'newlines'.* Did you mean 'newline'\? Take 'newline', 'sentence'"),
        ("zzz", "which is no way to cut. Take"),
        (None, "steps is None, a NoneType. Take"),
        (3, "steps is 3, a int"),
        ({"regex": "("}, r"the regex '\(' is wrong: missing \)"),
        ({"regex": 3}, 'a mapping must be {"regex"'),
        ({"regexp": "x"}, 'a mapping must be {"regex"'),
        ({"regex": "x", "flags": 1}, 'a mapping must be {"regex"'),
        ({"regex": "x*"}, "matches the empty text everywhere.*with [+] in place of"),
        (re.compile(r"\n*"), "matches the empty text everywhere"),
        ({"regex": ""}, "matches the empty text everywhere"),
        (re.compile(b"x"), "pattern of bytes"),
        ([True], "list that holds True"),
        (["a", 1], "list that holds 'a'"),
        ([["a", 1]], r"list that holds \['a', 1\]"),
        ([["a"], "b"], "list that holds 'b'"),
    ],
)
def test_what_is_no_way_to_cut(steps, says):
    with pytest.raises(ConfigError, match=says):
        check_steps(steps)
    with pytest.raises(ConfigError, match=says):
        cut(of("a"), steps)


TOKENS = st.lists(st.text(alphabet="ab. \n;。1é", max_size=4), max_size=12)


@given(
    TOKENS,
    st.sampled_from(["newline", "sentence", "paragraph", "whole", {"regex": ";|(?=a)"}]),
    st.sampled_from(["", "<eos>"]),
)
def test_steps_are_whole_tokens_of_the_completion(tokens, steps, end_text):
    encoded = of(*tokens, *([end_text] if end_text else []), end_text=end_text)
    check_cut(encoded, cut(encoded, steps))


@given(TOKENS, st.data())
def test_given_steps_are_whole_tokens_too(tokens, data):
    encoded = of(*tokens)
    if not encoded.text:
        return
    places = st.integers(1, len(encoded.text) - 1) if len(encoded.text) > 1 else st.nothing()
    inner = sorted(data.draw(st.sets(places)))
    ends = [*inner, len(encoded.text)]
    found = cut(encoded, ends)
    check_cut(encoded, found)
    assert len(found.merged_into) == len(ends)
    assert found.merged_into[0] == 0
    assert all(b - a in (0, 1) for a, b in pairwise(found.merged_into))
    steps = [encoded.text[a:b] for a, b in pairwise([0, *ends])]
    by_text = cut(encoded, steps)
    check_cut(encoded, by_text)
    assert len(by_text.merged_into) == len(ends)
    # A boundary at the end of a token stays.
    for step, end in zip(found.merged_into, ends, strict=True):
        if end in encoded.token_ends:
            assert sum(map(len, found.texts[: step + 1])) == end


def check_cut(encoded: Encoded, found) -> None:
    assert "".join(found.texts) == encoded.text
    assert len(found.texts) == len(found.token_ends)
    assert all(a < b for a, b in pairwise([0, *found.token_ends]))
    total = len(encoded.tokens)
    assert (found.token_ends or [0])[-1] == total
    starts = pairwise([0, *found.token_ends])
    assert found.texts == ["".join(encoded.tokens[a:b]) for a, b in starts]
    assert sorted(set(found.merged_into)) == list(range(len(found.texts)))
