"""The product's answers beside the experts' own, and what the experts say of them."""

from statistics import fmean

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import save_byte_llama
from trl_ext.errors import ConfigError, DataError
from trl_ext.poe import drawing
from trl_ext.poe.counted import NGramExpert
from trl_ext.poe.drawing import Sampling, check_lengths, draw, encode, score
from trl_ext.poe.loading import load_product
from trl_ext.poe.product import ProductOfExperts
from trl_ext.poe.side_by_side import SideBySide

PROMPTS = ["ab", "What is rain?", "c"]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Two tiny models, far enough from each other to disagree, and a counted expert."""
    folder = tmp_path_factory.mktemp("experts")
    base = save_byte_llama(folder / "base")
    style = save_byte_llama(folder / "style")
    model = AutoModelForCausalLM.from_pretrained(style)
    torch.manual_seed(1)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.3)
    model.save_pretrained(style)
    tokenizer = load_product({"base": base}, [1.0]).tokenizer
    NGramExpert.fit(["abcabc"], tokenizer=tokenizer).save(folder / "counted")
    return {"base": base, "style": style, "counted": str(folder / "counted")}


def loaded(paths, weights, **options):
    return load_product({name: paths[name] for name in weights}, weights, **options)


def answered(paths, weights, sampling, **options):
    side = SideBySide(loaded(paths, weights), weights, sampling, **options)
    return side, side.answer(PROMPTS, encode(PROMPTS, side.tokenizer, chat=False))


SAMPLING = Sampling(max_new_tokens=5, num_samples=2)


@pytest.mark.parametrize("whole", ["base", "style", "counted"])
def test_an_expert_of_weight_one_gives_the_products_answer(paths, whole):
    weights = {name: float(name == whole) for name in paths}
    side, rows = answered(paths, weights, SAMPLING)
    assert side.names == ["base", "style", "counted", "product"]
    assert [row.product for row in rows] == [row.experts[whole] for row in rows]
    assert len({row.product for row in rows}) > 1


@pytest.mark.equation("E14")
def test_likelihoods_add_up(paths):
    """log π = Σ w_k log p_k − log Z, for each token, so for their mean."""
    weights = {"base": 0.5, "style": 0.3, "counted": 0.4}
    _, rows = answered(paths, weights, SAMPLING)
    for row in rows:
        weighted = sum(weights[name] * row.log_likelihood[name] for name in weights)
        assert row.log_likelihood["product"] == pytest.approx(weighted - row.log_z, abs=1e-5)
        assert row.log_likelihood["product"] < 0


def test_rows_are_in_order(paths):
    _, rows = answered(paths, {"base": 1.0, "counted": 0.2}, SAMPLING)
    assert [(row.prompt, row.sample) for row in rows] == [
        (prompt, sample) for prompt in PROMPTS for sample in (0, 1)
    ]
    assert set(rows[0].record()) == {
        "prompt", "sample", "product", "experts", "weights", "log_likelihood", "log_z", "tokens",
    }  # fmt: skip


def test_the_seed_decides(paths):
    weights = {"base": 0.5, "style": 0.5}
    texts = []
    for seed, own in ((0, True), (0, False), (1, False)):
        sampling = Sampling(max_new_tokens=5, seed=seed)
        _, rows = answered(paths, weights, sampling, own_answers=own)
        texts.append([row.product for row in rows])
    assert texts[0] == texts[1] != texts[2]


def test_one_expert_has_no_own_answer(paths):
    side, rows = answered(paths, {"base": 1.0}, Sampling(max_new_tokens=2))
    assert side.names == ["product"] and rows[0].experts == {}


def test_speeds_are_of_who_has_drawn(paths):
    side = SideBySide(loaded(paths, {"base": 0.5, "style": 0.5}), {}, Sampling(max_new_tokens=2))
    assert side.speeds() == {}
    side.answer(["a"], [[1]])
    assert set(side.speeds()) == {"product", "base", "style"}
    assert all(speed > 0 for speed in side.speeds().values())


def test_streamed_answers_are_the_answers(paths, capsys):
    weights = {"base": 0.5, "counted": 0.5}
    side = SideBySide(loaded(paths, weights), weights, Sampling(max_new_tokens=5))
    (ids,) = encode(["ab"], side.tokenizer, chat=False)
    names = []
    (row,) = side.stream("ab", ids, names.append)
    assert names == ["product", "base", "counted"]
    printed = capsys.readouterr().out
    assert printed == "".join(f"{text}\n" for text in (row.product, *row.experts.values()))


@pytest.mark.parametrize("rows_at_once", [1, 2**26])
def test_scores_are_those_of_each_text_alone(paths, monkeypatch, rows_at_once):
    """Against a loop over texts without padding, with log_probs and log_z of whole texts."""
    monkeypatch.setattr(drawing, "_SCORES_AT_ONCE", rows_at_once)
    product = loaded(paths, {"base": 0.6, "style": 0.4}, plausibility=0.01)
    prompts = encode(PROMPTS, product.tokenizer, chat=False)
    product.generation_config = Sampling(max_new_tokens=5).config(product)
    completions = [ids[: 2 + place] for place, ids in enumerate(draw(product, prompts, 0))]
    scores = score(product, prompts, completions)
    for place, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        text = torch.tensor([prompt + completion])
        after = slice(len(prompt) - 1, -1)

        def of(logps, text=text, after=after, completion=completion):
            return logps[0, after].gather(-1, torch.tensor(completion)[:, None])[:, 0].tolist()

        assert scores.product[place] == pytest.approx(of(product.log_probs(text)), abs=1e-4)
        assert scores.log_z[place] == pytest.approx(
            product.log_z(text)[0, after].tolist(), abs=1e-4
        )
        for name, logps in product.expert_log_probs(text).items():
            assert scores.experts[name][place] == pytest.approx(of(logps), abs=1e-4)


def test_an_answer_stops_at_its_end_token(paths):
    """An expert that has only ever seen texts of one letter ends after it."""
    tokenizer = loaded(paths, {"base": 1.0}).tokenizer
    counted = NGramExpert.fit(["a"] * 50, tokenizer=tokenizer, pseudo_count=1e-9, add_eos=True)
    product = ProductOfExperts({"counted": counted}, [1.0])
    product.tokenizer = tokenizer
    product.generation_config = Sampling(max_new_tokens=5, num_samples=2).config(product)
    prompt = encode(["a"], tokenizer, chat=False)
    assert draw(product, prompt, 0) == [[tokenizer.eos_token_id]] * 2


def test_the_mean_is_over_tokens_with_the_end(paths):
    product = loaded(paths, {"base": 0.5, "style": 0.5})
    side = SideBySide(product, {}, Sampling(max_new_tokens=4))
    prompts = encode(["ab"], side.tokenizer, chat=False)
    completions = draw(product, prompts, next(Sampling().seeds()))
    (row,) = side.answer(["ab"], prompts)
    assert row.tokens == len(completions[0])
    expected = fmean(score(product, prompts, completions).product[0])
    assert row.log_likelihood["product"] == pytest.approx(expected)


def test_sampling_is_from_the_distribution_itself(paths):
    """No top-k of 50, no penalty that a model's own generation config brings along."""
    product = loaded(paths, {"base": 1.0})
    assert product.generation_config is not None
    product.generation_config.repetition_penalty = 5.0
    config = Sampling(temperature=0.7, top_p=0.9).config(product)
    assert (config.top_k, config.temperature, config.top_p) == (0, 0.7, 0.9)
    assert config.repetition_penalty in (None, 1.0)
    assert Sampling(num_beams=2).config(product).do_sample is False


@pytest.mark.parametrize("chat", [None, True, False])
def test_a_text_is_a_users_message(paths, chat):
    tokenizer = loaded(paths, {"base": 1.0}).tokenizer
    (ids,) = encode(["Hello"], tokenizer, chat)
    assert tokenizer.decode(ids) == ("Hello" if chat is False else "user: Hello\nassistant: ")


def test_messages_keep_their_roles(paths):
    tokenizer = loaded(paths, {"base": 1.0}).tokenizer
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    (ids,) = encode([messages], tokenizer, None)
    assert tokenizer.decode(ids) == "system: Be brief.\nuser: Hi\nassistant: "


@pytest.mark.parametrize(
    ("prompt", "chat", "says"),
    [
        ("Hi", True, "--chat asks for a chat template, and the tokenizer has no chat template"),
        ([{"role": "user", "content": "Hi"}], None, "A prompt is chat messages, and"),
        ("", False, "The prompt '' has no token to go on from"),
    ],
)
def test_what_cannot_be_encoded(paths, prompt, chat, says):
    tokenizer = loaded(paths, {"base": 1.0}).tokenizer
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=says):
        encode([prompt], tokenizer, chat)


@pytest.mark.parametrize("prompt", ["a\ud800", [{"role": "user", "content": "a\ud800"}]])
def test_half_a_character_is_no_prompt(paths, prompt):
    tokenizer = loaded(paths, {"base": 1.0}).tokenizer
    with pytest.raises(DataError, match=r"Prompt 1 has half a character, '\\ud800', at 1: "):
        encode(["a", prompt], tokenizer, None)


def test_a_prompt_and_its_answer_fit_into_the_model(paths):
    product = loaded(paths, {"base": 0.5, "counted": 0.5})
    product.config.max_position_embeddings = 8
    check_lengths(product, ["a", "b"], [[1], [1] * 5], 3)
    with pytest.raises(ConfigError, match=r"Prompt 1 is too long: 'b' has 6 tokens, .* at most 2 "):
        check_lengths(product, ["a", "b"], [[1], [1] * 6], 3)
    alone = loaded(paths, {"counted": 1.0})  # counts read any length
    check_lengths(alone, ["a"], [[1] * 10_000], 3)
