"""Prompts and completions as token ids, and where each token ends in the text."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, ByT5Tokenizer

from tests.tiny import save_byte_llama
from trl_ext.errors import ConfigError, DataError
from trl_ext.gibbs_prm.encoding import encode
from trl_ext.oracle import tabular_tokenizer

USER = {"role": "user", "content": "2+2?"}
FOUR = {"role": "assistant", "content": "4"}
TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>\n{% endfor %}"
OPENED = TURNS + "{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory) -> Any:
    return AutoTokenizer.from_pretrained(save_byte_llama(tmp_path_factory.mktemp("bytes")))


@pytest.fixture
def with_template(byte_tokenizer):
    """Sets the chat template for one test."""
    before = byte_tokenizer.chat_template

    def set_template(template):
        byte_tokenizer.chat_template = template
        return byte_tokenizer

    yield set_template
    byte_tokenizer.chat_template = before


def test_prompt_and_completion_are_tokenised_apart():
    tokenizer = tabular_tokenizer(4)  # <eos> 0, a 1, b 2, c 3
    encoded = encode("ab", "ca", tokenizer)
    assert encoded.prompt_ids == [1, 2]
    assert encoded.completion_ids == [3, 1]
    assert (encoded.text, encoded.tokens, encoded.token_ends) == ("ca", ["c", "a"], [1, 2])
    assert encoded.is_own == [True, True]
    assert (encoded.turn_ends, encoded.end_text) == ([], "")


def test_special_tokens_are_the_prompts_alone():
    tokenizer = ByT5Tokenizer()  # ends every text with </s>, 1; a byte b is b + 3
    encoded = encode("a", "b", tokenizer)
    assert encoded.prompt_ids == [ord("a") + 3, 1]
    assert encoded.completion_ids == [ord("b") + 3]


def test_append_eos():
    tokenizer = tabular_tokenizer(4)
    added = encode("a", "b", tokenizer, append_eos=True)
    assert added.completion_ids == [2, 0]
    assert (added.text, added.token_ends, added.end_text) == ("b<eos>", [1, 6], "<eos>")
    assert added.is_own == [True, True]
    assert encode("a", "", tokenizer, append_eos=True).completion_ids == [0]
    kept = encode("a", "b", tokenizer, completion_ids=[2], append_eos=True)
    assert kept.completion_ids == [2]


def test_an_end_that_is_there_is_not_appended_again(byte_tokenizer):
    encoded = encode("a", "b<eos>", byte_tokenizer, append_eos=True)
    assert encoded.completion_ids == encode("a", "b<eos>", byte_tokenizer).completion_ids
    assert encoded.text == "b<eos>"
    assert encoded.end_text == "<eos>"


def test_append_eos_needs_one():
    tokenizer = tabular_tokenizer(4)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        encode("a", "b", tokenizer, append_eos=True)


@pytest.mark.parametrize("completion", ["", []])
def test_an_empty_completion_has_no_tokens(byte_tokenizer, completion):
    encoded = encode("a" if completion == "" else [USER], completion, byte_tokenizer)
    assert (encoded.completion_ids, encoded.text, encoded.tokens) == ([], "", [])
    assert (encoded.token_ends, encoded.is_own, encoded.turn_ends) == ([], [], [])


def test_a_character_belongs_to_the_token_that_completes_it(byte_tokenizer):
    # UTF-8: a 1 byte, é 2, 😀 4, and the accent that combines with e 2.
    encoded = encode("p", "aé😀e\u0301", byte_tokenizer)
    assert encoded.tokens == ["a", "", "é", "", "", "", "😀", "e", "", "\u0301"]
    assert encoded.token_ends == [1, 1, 2, 2, 2, 2, 3, 4, 4, 5]
    assert encoded.is_own == [True] * 10


def test_ids_as_generated_give_the_same_tokens(byte_tokenizer):
    text = "aé😀e\u0301 b"
    encoded = encode("p", text, byte_tokenizer)
    again = encode("p", "", byte_tokenizer, completion_ids=encoded.completion_ids)
    assert again == encoded


def test_ids_that_end_within_a_character(byte_tokenizer):
    ids = encode("p", "a😀b", byte_tokenizer).completion_ids
    # The first three of four bytes of 😀, decoded: one replacement character.
    cut = encode("p", "", byte_tokenizer, completion_ids=ids[:4])
    assert (cut.text, "".join(cut.tokens)) == ("a\ufffd", "a\ufffd")
    # 😀 without its last byte and then b: b is a token of its own.
    broken = encode("p", "", byte_tokenizer, completion_ids=[*ids[:4], ids[5]])
    assert (broken.text, broken.tokens[-1]) == ("a\ufffdb", "b")


def test_a_slow_tokenizer_is_decoded():
    encoded = encode("p", "aé😀b", ByT5Tokenizer())
    assert encoded.completion_ids == [b + 3 for b in "aé😀b".encode()]
    assert encoded.tokens == ["a", "", "é", "", "", "", "😀", "b"]
    assert encoded.token_ends == [1, 1, 2, 2, 2, 2, 3, 4]


class Capitals:
    """A decoder in which a token (0) changes all that follow, however far behind."""

    is_fast = False
    all_special_ids, all_special_tokens, added_tokens_decoder = (), (), {}

    def __call__(self, text, **kwargs):
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, ids, **kwargs):
        text = "".join(map(chr, ids))
        before, _, behind = text.partition("\0")
        return before + behind.upper()


def test_a_decoder_that_looks_far_back():
    encoded = encode("p", "", Capitals(), completion_ids=[97, 0, 98, 99, 100])
    assert encoded.text == "aBCD"
    assert encoded.tokens == ["a", "", "B", "C", "D"]
    ending = encode("p", "", Capitals(), completion_ids=[97, 0])
    assert (ending.tokens, ending.is_own) == (["a", ""], [True, True])


def test_tokens_are_decoded_in_linear_time(byte_tokenizer, monkeypatch):
    # Half a character early on, which stays one in the text.
    ids = encode("p", "aé😀" + "b" * 500, byte_tokenizer).completion_ids
    del ids[2]
    decode, decoded = byte_tokenizer.decode, []
    monkeypatch.setattr(
        byte_tokenizer, "decode", lambda ids, **kw: decoded.append(len(ids)) or decode(ids, **kw)
    )
    encoded = encode("p", "", byte_tokenizer, completion_ids=ids)
    assert encoded.text == "a\ufffd😀" + "b" * 500
    assert sum(decoded) < 10 * len(ids)


@given(st.text(alphabet="ab \n.é😀\u0301\ufffd", max_size=12))
def test_tokens_join_to_the_text(byte_tokenizer, text):
    encoded = encode("p", text, byte_tokenizer)
    count = len(text.encode())
    assert encoded.text == "".join(encoded.tokens) == text
    assert len(encoded.tokens) == len(encoded.is_own) == len(encoded.token_ends) == count
    # A byte-level token completes a character where the bytes so far are whole characters.
    bytes_before = [len(text[:end].encode()) for end in range(len(text) + 1)]
    whole = [max(k for k in range(len(text) + 1) if bytes_before[k] <= n + 1) for n in range(count)]
    assert encoded.token_ends == whole
    again = encode("p", "", byte_tokenizer, completion_ids=encoded.completion_ids)
    assert "".join(again.tokens) == again.text == text
    slow = encode("p", text, ByT5Tokenizer())
    assert slow.token_ends == whole


def test_a_conversation_ends_with_its_end_of_turn(with_template):
    tokenizer = with_template(OPENED)
    encoded = encode([USER], [FOUR], tokenizer)
    assert encoded.prompt_ids == tokenizer("<user>2+2?<eos>\n<assistant>")["input_ids"]
    assert encoded.text == "4<eos>"
    assert encoded.completion_ids[-1] == tokenizer.eos_token_id
    assert encoded.is_own == [True, True]
    assert (encoded.turn_ends, encoded.end_text) == ([6], "<eos>")


def test_the_prompt_is_what_trl_generates_from(with_template):
    tokenizer = with_template(OPENED)
    as_trl = tokenizer.apply_chat_template(
        conversation=[[USER]], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert encode([USER], [FOUR], tokenizer).prompt_ids == as_trl["input_ids"][0]


def test_turns_of_others_are_not_the_policys(with_template):
    tokenizer = with_template(OPENED)
    tool = {"role": "tool", "content": "ok"}
    encoded = encode([USER], [FOUR, tool, {"role": "assistant", "content": "5"}], tokenizer)
    first, middle, last = "4<eos>\n", "<tool>ok<eos>\n", "<assistant>5<eos>"
    assert encoded.text == first + middle + last
    ends = [len(first), len(first + middle), len(first + middle + last)]
    assert encoded.turn_ends == ends
    # The policy wrote "4<eos>" and "5<eos>": not the line break, the tool's turn, nor its header.
    own = [t for t, is_own in zip(encoded.tokens, encoded.is_own, strict=True) if is_own]
    assert own == ["4", "<eos>", "5", "<eos>"]
    assert encoded.is_own[:2] == [True, True]


def test_a_template_without_end_of_turn(byte_tokenizer):
    said = {"role": "assistant", "content": "4 \n"}
    encoded = encode([USER], [said], byte_tokenizer)
    # The template ends each message with a line break of its own; that of the content stays.
    assert encoded.text == "4 \n"
    assert (encoded.turn_ends, encoded.end_text) == ([3], "")


@pytest.mark.parametrize("said", ["4 \n", "4 \n<eos>"])
def test_only_the_end_of_turn_ends_a_turn(with_template, said):
    encoded = encode([USER], [{"role": "assistant", "content": said}], with_template(OPENED))
    assert (encoded.text, encoded.end_text) == ("4 \n<eos>", "<eos>")


def test_a_conversation_may_end_with_another_turn(with_template):
    tokenizer = with_template(OPENED)
    encoded = encode([USER], [FOUR, {"role": "tool", "content": "ok"}], tokenizer)
    assert encoded.text == "4<eos>\n<tool>ok<eos>"
    own = [t for t, is_own in zip(encoded.tokens, encoded.is_own, strict=True) if is_own]
    assert own == ["4", "<eos>"]


def test_a_character_of_several_tokens_is_owned_whole(with_template):
    tokenizer = with_template(OPENED)
    tool = {"role": "tool", "content": "😀"}
    encoded = encode([USER], [FOUR, tool, {"role": "assistant", "content": "é"}], tokenizer)
    # "4" and its end; the two bytes of é and its end.
    assert sum(encoded.is_own) == 5
    assert encoded.is_own[-3:] == [True] * 3


def test_generated_ids_of_one_message_are_all_the_policys(with_template):
    tokenizer = with_template(OPENED)
    ids = tokenizer("other", add_special_tokens=False)["input_ids"]
    encoded = encode([USER], [FOUR], tokenizer, completion_ids=ids)
    assert (encoded.text, encoded.turn_ends) == ("other", [5])
    assert encoded.is_own == [True] * 5


def test_generated_ids_of_several_messages(with_template):
    tokenizer = with_template(OPENED)
    messages = [FOUR, {"role": "tool", "content": "ok"}, {"role": "assistant", "content": "56"}]
    whole = encode([USER], messages, tokenizer)
    assert encode([USER], messages, tokenizer, completion_ids=whole.completion_ids) == whole
    # Cut by a length limit, two tokens before the end: "6" and "<eos>" are missing.
    cut = encode([USER], messages, tokenizer, completion_ids=whole.completion_ids[:-2])
    assert cut.is_own == whole.is_own[:-2]
    assert cut.turn_ends == [*whole.turn_ends[:-1], len(cut.text)]
    with pytest.raises(DataError, match=r"row 3: the ids .* decode to 'other'.*completion_ids out"):
        other = tokenizer("other")["input_ids"]
        encode([USER], messages, tokenizer, completion_ids=other, row=3)
    with pytest.raises(DataError, match="Leave completion_ids out"):
        longer = tokenizer("another" * 9)["input_ids"]
        encode([USER], messages, tokenizer, completion_ids=longer)
    with pytest.raises(DataError, match="Leave completion_ids out"):
        encode([USER], messages, tokenizer, completion_ids=whole.completion_ids[:3])


def test_generated_ids_may_end_where_the_template_does_not(byte_tokenizer):
    messages = [FOUR, USER, FOUR]
    ids = encode([USER], messages, byte_tokenizer).completion_ids
    encoded = encode([USER], messages, byte_tokenizer, completion_ids=[*ids, 0])
    assert encoded.turn_ends[-1] == len(encoded.text)
    assert encoded.is_own[-2:] == [True, True]
    assert encoded.end_text == "<eos>"


@pytest.mark.parametrize(
    ("prompt", "completion", "says"),
    [
        ("", "a", "row 7: the prompt '' has no token.*first token of the completion"),
        ("a", [FOUR], "row 7: the prompt is a text and the completion is a list of messages"),
        ([USER], "a", "row 7: the prompt is a list of messages and the completion is a text"),
        (None, "a", "row 7: the prompt is None, a NoneType; it must be a text or a list"),
        ("a", 4, "row 7: the completion is 4, a int; it must be a text or a list"),
        ("a\ud800", "a", "row 7: the prompt has half a character, .* at 1.*Repair"),
        ("a", "\udc00", "row 7: the completion has half a character"),
        ([{"role": "user", "content": "\ud800"}], [FOUR], "the prompt has half a character"),
        ([], [FOUR], "the prompt is an empty list"),
        ([USER], [USER], "no message with the role 'assistant'"),
        (["a"], [FOUR], "the prompt: message 0 is 'a'"),
        ([USER], [{"content": "a"}], "the completion: message 0 is"),
        ([USER], [{"role": "assistant", "content": 4}], "content of message 0 is 4; .* a text"),
        ([USER], [{"role": "assistant"}], "content of message 0 is None"),
        ([USER], [{"role": "assistant", "content": [{"type": "text"}]}], "Join the texts"),
    ],
)
def test_what_cannot_be_encoded(byte_tokenizer, prompt, completion, says):
    with pytest.raises(DataError, match=says):
        encode(prompt, completion, byte_tokenizer, row=7)


def test_a_turn_may_only_call_tools(with_template):
    tokenizer = with_template(
        "{% for m in messages %}{{ m.role }}:{{ m.content or m.tool_calls[0] }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    call = {"role": "assistant", "content": None, "tool_calls": ["add"]}
    assert encode([USER], [call], tokenizer).text == "add<eos>"


@pytest.mark.parametrize("ids", [[-100], [1.0], [True], ["a"]])
def test_ids_are_whole_numbers(byte_tokenizer, ids):
    with pytest.raises(DataError, match=r"completion_ids holds .*Leave padding out"):
        encode("a", "", byte_tokenizer, completion_ids=ids)


def test_messages_need_a_template(with_template):
    with pytest.raises(ConfigError, match=r"row 2: .* no chat template"):
        encode([USER], [FOUR], with_template(None), row=2)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('only users') }}", "cannot render .*only users"),
        ("{% for m in messages %}{{ 'a' + 4 }}{% endfor %}", "cannot render"),
        # A prompt that opens a thought which the finished conversation does not show.
        (
            OPENED.replace("<assistant>", "<assistant><think>"),
            "0 messages .*beginning of the whole",
        ),
        # Earlier turns are shown in another way once others follow.
        (
            "{% for m in messages %}{{ m.role }}:{{ m.content if loop.last else '' }}{% endfor %}",
            "beginning of the whole conversation. Render them yourself",
        ),
    ],
)
def test_what_a_template_cannot_do(with_template, template, says):
    with pytest.raises(DataError, match=says):
        encode([USER], [FOUR], with_template(template))


def test_the_bundled_models_tokenizer():
    from trl_ext.bundled import resolve_model

    tokenizer = AutoTokenizer.from_pretrained(resolve_model("bundled:smollm2-135m-instruct"))
    text = " So, 2+2 😀 e\u0301 is 🤖.\n\n  Ünicode\ttoo…"
    encoded = encode("Hi", text, tokenizer)
    assert "".join(encoded.tokens) == encoded.text == text
    assert 4 < len(encoded.tokens) < len(text.encode())
    # A space opens the token of its word.
    assert encoded.tokens[:2] == [" So", ","]
    again = encode("Hi", "", tokenizer, completion_ids=encoded.completion_ids)
    assert (again.text, again.completion_ids) == (text, encoded.completion_ids)
    assert again.tokens == encoded.tokens


def test_the_bundled_models_template():
    from trl_ext.bundled import resolve_model

    tokenizer = AutoTokenizer.from_pretrained(resolve_model("bundled:smollm2-135m-instruct"))
    encoded = encode([USER], [FOUR, USER, {"role": "assistant", "content": "Still 4."}], tokenizer)
    assert encoded.text == (
        "4<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\nStill 4.<|im_end|>"
    )
    own = "".join(t for t, is_own in zip(encoded.tokens, encoded.is_own, strict=True) if is_own)
    assert own == "4<|im_end|>Still 4.<|im_end|>"
    turns = ["4<|im_end|>\n", "<|im_start|>user\n2+2?<|im_end|>\n"]
    assert encoded.turn_ends == [len(turns[0]), len("".join(turns)), len(encoded.text)]
    assert encoded.end_text == "<|im_end|>"


def test_half_a_character_anywhere_in_a_message(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(save_byte_llama(tmp_path))
    prompt = [{"role": "us\ud83d", "content": "a"}]
    with pytest.raises(DataError, match="the prompt has half a character"):
        encode(prompt, [{"role": "assistant", "content": "b"}], tokenizer)


def test_a_template_fails_as_programs_do(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(save_byte_llama(tmp_path))
    tokenizer.chat_template = "{{ 1 / 0 }}"
    with pytest.raises(DataError, match=r"cannot render .*: division by zero\. Give messages"):
        encode(
            [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}], tokenizer
        )
