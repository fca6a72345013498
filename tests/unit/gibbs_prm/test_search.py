"""The search by steps: scripted samples with scores by hand, and its limits on real models."""

import copy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from tests.tiny import save_byte_llama, save_tiny_llama
from trl_ext.errors import ConfigError, DataError, RunError
from trl_ext.gibbs_prm import GibbsScorer
from trl_ext.gibbs_prm.encoding import Encoded
from trl_ext.gibbs_prm.rollout_vllm import VLLMSampler
from trl_ext.gibbs_prm.sampling import GenerateSampler
from trl_ext.gibbs_prm.search import StepSearch
from trl_ext.gibbs_prm.search_steps import NextStep, first_stop
from trl_ext.models.adapter import Adapter

BETA = 0.5


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("search")
    save_byte_llama(home / "base")
    return home


@pytest.fixture(scope="module")
def tokenizer(home) -> Any:
    return AutoTokenizer.from_pretrained(home / "base")


@pytest.fixture(scope="module")
def models(home) -> tuple[Any, Any]:
    """π and π_ref, which generates lower-case letters, line breaks and ends."""
    reference = AutoModelForCausalLM.from_pretrained(home / "base")
    with torch.no_grad():
        reference.lm_head.weight.mul_(20)
    policy = AutoModelForCausalLM.from_pretrained(home / "base")
    with torch.no_grad():
        policy.lm_head.weight.mul_(23)
    return policy, reference


@pytest.fixture
def scorer(models, tokenizer) -> GibbsScorer:
    policy, reference = models
    return GibbsScorer(policy, reference, tokenizer, BETA)


def encoded(tokens: list[str]) -> Encoded:
    ends = [len("".join(tokens[: n + 1])) for n in range(len(tokens))]
    ids = [number for number, _ in enumerate(tokens)]
    return Encoded([1], ids, "".join(tokens), tokens, ends, [True] * len(ids), [])


SPACED = ["Pi", " is", " 3", ".", "14", ".", " So", " what", "?", " \n", "Oh"]


@pytest.mark.parametrize(
    ("steps", "tokens", "start", "since", "found"),
    [
        ("newline", list("ab\ncd\n"), 0, 1, (3, 3)),
        ("newline", list("ab\ncd\n"), 3, 4, (6, 6)),
        # A line that holds nothing is no step: it begins the next.
        ("newline", list("ab\n \ncd\n"), 3, 4, (8, 8)),
        ("newline", ["ab", "\n\n", "cd"], 0, 1, (2, 2)),
        ("newline", ["ab", "cd"], 0, 1, None),
        ("paragraph", list("a\nb\n \nc"), 0, 1, (6, 6)),
        # The stop of 3.14 ends nothing; the last one does, which " So" shows.
        ("sentence", SPACED, 0, 1, (6, 7)),
        # And " So" begins the next, which ends with the white space behind it.
        ("sentence", SPACED, 6, 8, (10, 10)),
        ("sentence", SPACED, 10, 11, None),
        # Only an upper case shows that the stop of an abbreviation is one of a sentence.
        ("sentence", ["etc", ".", " ", "then"], 0, 1, None),
        ("sentence", ["etc", ".", " ", "Then"], 0, 1, (3, 4)),
        ("sentence", ["はい", "。", "いや"], 0, 1, (2, 2)),
        ({"regex": "; "}, ["a", ";", " b", " c"], 0, 1, (2, 3)),
        # What a rule of one's own looks ahead to must be there.
        ({"regex": "(?=Step)"}, ["a ", "Step", "1"], 0, 1, (1, 2)),
        ("token", ["a", "b"], 1, 2, (2, 2)),
        ("whole", list("a\nb\n\n. "), 0, 1, None),
        # Not before `since`.
        ("token", ["a", "b", "c"], 0, 2, (1, 2)),
    ],
)
def test_where_a_step_is_over(steps, tokens, start, since, found, tokenizer):
    rule = NextStep(steps, tokenizer)
    if rule.pauses:
        rule.pauses = frozenset(n for n, token in enumerate(tokens) if "\n" in token)
    assert rule.over(encoded(tokens), start, since, len(tokens)) == found
    if found:
        assert rule.over(encoded(tokens), start, since, found[1] - 1) is None


def test_where_sampling_pauses(tokenizer):
    breaks = {tokenizer("\n")["input_ids"][0], tokenizer("\r")["input_ids"][0]}
    assert NextStep("newline", tokenizer).pauses == breaks
    assert NextStep("paragraph", tokenizer).pauses == breaks
    for steps in ("sentence", "token", "whole", {"regex": "\n"}):
        assert not NextStep(steps, tokenizer).pauses


def test_a_stop_string_ends_with_the_token_that_completes_it():
    assert first_stop(encoded(["ab", "cd", "ef"]), ["bcd"]) == 2
    assert first_stop(encoded(["ab", "cd", "ef"]), ["f", "e", "bc"]) == 2
    assert first_stop(encoded(["ab", "cd", "ef"]), ["x"]) is None
    assert first_stop(encoded(["ab", "cd"]), []) is None


class Scripted:
    """Says what is written down for what has been said: of each prefix the k-th, "#" for <eos>.

    Where nothing is written down it ends the completion.
    """

    note = None

    def __init__(self, tokenizer, script: dict[str, list[str]], length=40):
        self.tokenizer = tokenizer
        self.script = script
        self.max_completion_length = length
        self.end_ids = frozenset([0])
        self.calls: list[dict] = []

    def sample(self, prefixes, num_rollouts, *, prompt_lengths: Any = None, seed=0):
        prompt = len(self.tokenizer("Q:")["input_ids"])
        said = [self.tokenizer.decode(list(p[prompt:])) for p in prefixes]
        room = [
            self.max_completion_length - (len(p) - length)
            for p, length in zip(prefixes, prompt_lengths, strict=True)
        ]
        self.calls.append({"said": said, "room": room, "count": num_rollouts, "seed": seed})
        ways = [self.script.get(text) or ["#"] * num_rollouts for text in said]
        return [
            [self._tokens(texts[k], most) for k in range(num_rollouts)]
            for texts, most in zip(ways, room, strict=True)
        ]

    def _tokens(self, text, most):
        found = []
        for character in text:
            found.append(0 if character == "#" else self.tokenizer(character)["input_ids"][0])
            if found[-1] in self.end_ids or len(found) == most:
                break
        return found


@pytest.fixture
def rows(scorer, tokenizer) -> list:
    """Makes the log-ratio of a digit its value, of "-" −5, of all else 0; lists what was scored."""
    scored: list[tuple[str, str]] = []

    def ratios(prompt_ids, completion_ids):
        found = []
        for prompt, ids in zip(prompt_ids, completion_ids, strict=True):
            text = [tokenizer.decode([i]) for i in ids]
            scored.append((tokenizer.decode(list(prompt)), "".join(text)))
            values = [float(c) if c.isdigit() else -5.0 * (c == "-") for c in text]
            found.append(torch.tensor(values))
        return found

    scorer.token_log_ratios = ratios
    return scored


def run(scorer, script, length=40, prompts=("Q:",), **options):
    sampler = Scripted(scorer.tokenizer, script, length)
    return StepSearch(sampler, scorer, **options).search(prompts), sampler.calls


def texts(result) -> list[str]:
    return [each.completion for each in result.ranked]


def test_rounds_of_sampling_scoring_and_pruning(scorer, rows):
    """Round 1: a3 and b2 stay, c1 goes. Round 2: a3·d1 = 4, a3·e0 = 3, b2·9 = 11, b2·f = 2."""
    script = {
        "": ["a3\n#", "c1\n#", "b2\nx"],
        "a3\n": ["d1#", "e0\n", "e0\n"],
        "b2\n": ["f\n", "9\n", "9\n"],
        "b2\n9\n": ["-#", "#", "1#"],
    }
    [found], calls = run(scorer, script, width=2, expand=3)
    assert [call["said"] for call in calls] == [[""], ["a3\n", "b2\n"], ["b2\n9\n"]]
    assert [call["count"] for call in calls] == [3, 3, 3]
    # Round 3: of 11 − 5, 11, 12 and the 4 of the completion that is over since round 2.
    assert texts(found) == ["b2\n9\n1", "b2\n9\n"]
    assert [each.score for each in found.ranked] == pytest.approx([12 * BETA, 11 * BETA])
    assert found.text == "b2\n9\n1" and found.ids == found.completion_ids[0]
    assert found.ids[-1] == 0 and len(found.ids) == 7
    assert found.ranked[0].prefix_scores == pytest.approx([2 * BETA, 11 * BETA, 12 * BETA])
    assert found.ranked[0].steps == ["b2\n", "9\n", "1<eos>"]


def test_new_tokens_are_scored_once_and_duplicates_not_at_all(scorer, rows):
    script = {"": ["a3\n", "a3\n", "b2\n"], "a3\n": ["1#", "1#", "1#"], "b2\n": ["#", "#", "#"]}
    [found], _ = run(scorer, script, width=2, expand=3)
    assert rows == [("Q:", "a3\n"), ("Q:", "b2\n"), ("Q:a3\n", "1<eos>"), ("Q:b2\n", "<eos>")]
    assert texts(found) == ["a3\n1", "b2\n"]
    # Generated: 3·3, 3·2 and 3·1. Scored: 3 + 3 + 2 + 1, four rows by two models.
    cost = found.cost
    assert (cost.tokens_generated, cost.tokens_scored, cost.forward_passes) == (18, 9, 8)


def test_what_is_over_keeps_its_place_or_loses_it(scorer, rows):
    script = {"": ["5#", "1\n"], "1\n": ["2\n", "3\n"], "1\n3\n": ["#", "-#"]}
    script |= {"1\n2\n": ["#", "#"]}
    [found], calls = run(scorer, script, width=2, expand=2)
    # 5 is over and stays, so that of 1·2 and 1·3 only the better goes on.
    assert [call["said"] for call in calls] == [[""], ["1\n"], ["1\n3\n"]]
    assert texts(found) == ["5", "1\n3\n"]
    script["1\n"] = ["6\n", "7\n"]
    script |= {"1\n6\n": ["-#", "-#"], "1\n7\n": ["-#", "#"]}
    [found], calls = run(scorer, script, width=2, expand=2)
    # 7 and 8 drive out 5, which does not come back when they get worse.
    assert calls[-1]["said"] == ["1\n7\n", "1\n6\n"]
    assert texts(found) == ["1\n7\n", "1\n7\n-"]


def test_equal_scores_stay_in_the_order_in_which_they_were_found(scorer, rows):
    [found], _ = run(scorer, {"": ["a#", "b#", "c#"]}, width=2, expand=3)
    assert texts(found) == ["a", "b"]
    [found], _ = run(scorer, {"": ["5#", "1\n"], "1\n": ["4#", "4#"]}, width=2, expand=2)
    assert texts(found) == ["5", "1\n4"]


def test_prompts_are_searched_apart(scorer, rows):
    script = {"": ["9#", "1\n"], "1\n": ["#", "2#"]}
    found, calls = run(scorer, script, width=1, expand=2, prompts=["Q:", "R:"])
    assert [texts(each) for each in found] == [["9"], ["9"]]
    assert calls[0]["said"] == ["", ""] and len(calls) == 1
    assert [each.cost.tokens_generated for each in found] == [4, 4]
    assert [each.ranked[0].prompt for each in found] == ["Q:", "R:"]
    assert run(scorer, script, prompts=[])[0] == []


def test_lines_that_hold_nothing_do_not_end_a_step(scorer, rows):
    """Sampling pauses at each line break, and goes on where the step is not over."""
    script = {"": ["\nzz", "a\n"], "\n": ["1\n"], "\n1\n": ["#", "#"], "a\n": ["#", "#"]}
    [found], calls = run(scorer, script, width=2, expand=2, max_step_tokens=10)
    assert [(c["said"], c["count"]) for c in calls[:2]] == [([""], 2), (["\n"], 1)]
    assert calls[1]["room"] == [9]
    assert texts(found) == ["\n1\n", "a\n"]


def test_what_was_sampled_behind_a_sentence_is_dropped(scorer, rows):
    """The space shows that "a5. " is a sentence, and that "3." is none; the rest is dropped.

    So is the end of the completion behind it.
    """
    script = {"": ["a5. 9 is m#"], "a5. ": ["3.5 is 2#"]}
    [found], calls = run(scorer, script, width=1, expand=1, steps="sentence", max_step_tokens=12)
    assert [call["said"] for call in calls] == [[""], ["a5. "]]
    assert calls[0]["room"] == [12]
    assert texts(found) == ["a5. 3.5 is 2"]
    # 11 were generated in the first round, of which 4 stay.
    assert found.cost.tokens_generated == 11 + 9
    assert found.cost.tokens_scored == 4 + 9


def test_a_prefix_is_judged_by_its_whole_steps(scorer, rows):
    """{";"} needs the character behind it: "1;9" is judged by its 1, "2;" with x by its 2."""
    script = {"": ["1;9", "2;x"], "2;x": ["#", "#"], "1;9": ["#", "#"]}
    [found], calls = run(scorer, script, width=1, expand=2, steps={"regex": ";"})
    assert calls[1]["said"] == ["2;x"]
    assert texts(found) == ["2;x"]
    # Once it is over, all counts.
    script = {"": ["1;9#", "2;x#"], "2;x": ["#", "#"], "1;9": ["#", "#"]}
    [found], _ = run(scorer, script, width=2, expand=2, steps={"regex": ";"})
    assert texts(found) == ["1;9", "2;x"]
    assert found.ranked[0].prefix_scores == pytest.approx([1 * BETA, 10 * BETA])


def test_a_step_without_end_is_cut_and_noted(scorer, rows):
    script = {"": ["abcdefgh"], "abcd": ["e\n"], "abcde\n": ["#"]}
    [found], calls = run(scorer, script, width=1, expand=1, max_step_tokens=4)
    assert [call["room"] for call in calls] == [[4], [4], [4]]
    assert texts(found) == ["abcde\n"]
    assert found.ranked[0].notes == ["a step had no end within 4 tokens and was cut at token 4"]
    assert found.ranked[0].steps == ["abcde\n<eos>"]
    # It counts as a step.
    [found], calls = run(scorer, {"": ["a1b", "a2b"]}, width=1, expand=2, max_step_tokens=2)
    assert calls[1]["said"] == ["a2"]
    [whole], calls = run(scorer, {"": ["abcdefgh#"]}, expand=1, steps="whole", max_step_tokens=4)
    assert calls[0]["room"] == [40] and whole.ranked[0].notes == []


def test_the_length_of_a_completion_ends_it(scorer, rows):
    script = {"": ["ab\n", "abc"], "ab\n": ["cde", "f\n"], "abc": ["\n", "\n"]}
    [found], calls = run(scorer, script, length=5, width=2, expand=2, max_step_tokens=3)
    # "abc" was cut at 3 tokens, and both have 2 left.
    assert calls[1]["said"] == ["ab\n", "abc"] and calls[1]["room"] == [2, 2]
    assert max(map(len, found.completion_ids)) == 5
    assert "ab\ncd" in texts(found)
    [found], calls = run(scorer, {"": ["ab\n"], "ab\n": ["cde"]}, length=5, expand=1)
    assert [call["room"] for call in calls] == [[5], [2]] and texts(found) == ["ab\ncd"]


def test_rows_with_different_room_are_sampled_together(scorer, rows):
    script = {"": ["a\n", "bcde\n"], "a\n": ["x\n", "#"], "bcde\n": ["y", "#"], "a\nx\n": ["#"] * 2}
    _, calls = run(scorer, script, length=8, width=9, expand=2, max_step_tokens=5)
    assert calls[1]["said"] == ["a\n", "bcde\n"] and calls[1]["room"] == [5, 3]


def test_a_stop_string_ends_a_completion(scorer, rows):
    """It may lie across two steps, and nothing behind it is kept."""
    script = {"": ["1\n", "7STOP8\n"], "1\n": ["Q:2\n", "#"]}
    stops = ["\nQ:", "STOP"]
    [found], calls = run(scorer, script, width=3, expand=2, stop_strings=stops)
    assert texts(found) == ["7STOP", "1\nQ:", "1\n"]
    assert len(calls) == 2
    # Where the step is over before, the string is dropped and may not come again.
    script = {"": ["1;zSTOP"], "1;z": ["#"]}
    [found], _ = run(scorer, script, expand=1, steps={"regex": ";"}, stop_strings=["STOP"])
    assert texts(found) == ["1;z"]


def test_each_call_has_a_seed_of_its_own_from_that_of_the_search(scorer, rows):
    script = {"": ["a\n"], "a\n": ["b\n"], "a\nb\n": ["#"]}
    one, again, other = (
        [call["seed"] for call in run(scorer, script, expand=1, seed=seed)[1]] for seed in (3, 3, 4)
    )
    assert one == again and len({*one, *other}) == 6


def test_a_sampler_that_says_nothing(scorer, rows):
    with pytest.raises(RunError, match="Scripted returned no token"):
        run(scorer, {"": [""]}, expand=1)


def test_messages(scorer, rows, tokenizer):
    prompt = [{"role": "user", "content": "hi"}]
    sampler: Any = Scripted(tokenizer, {})
    sampler.sample = lambda prefixes, count, **_: (
        [[[*tokenizer("5")["input_ids"], 0]]] * len(prefixes)
    )
    [found] = StepSearch(sampler, scorer, expand=1).search([prompt])
    assert found.text == "5"
    assert found.ranked[0].completion == [{"role": "assistant", "content": "5"}]
    assert rows == [("user: hi\nassistant: ", "5<eos>")]


SHORT = {"regex": "[a-z]"}  # of a random model of bytes


@pytest.mark.parametrize("steps", ["newline", "token", "whole", "sentence", SHORT])
def test_one_prefix_with_one_way_on_is_plain_sampling(models, scorer, tokenizer, steps):
    """Greedy, where there is one completion: the tokens with the highest logits one by one."""
    said = tokenizer("Q:")["input_ids"]
    while len(said) < 2 + 24 and said[-1] != 0:
        said.append(int(models[1](torch.tensor([said])).logits[0, -1].argmax()))
    [found] = StepSearch(
        "reference",
        scorer,
        width=1,
        expand=1,
        steps=steps,
        max_completion_length=24,
        max_step_tokens=7,
        temperature=0,
    ).search(["Q:"])
    assert found.ids == said[2:]


class Recorded(GenerateSampler):
    """Keeps what it has sampled."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.found: list = []

    def sample(self, *arguments, **options):
        self.found.append(super().sample(*arguments, **options))
        return self.found[-1]


def test_whole_completions_are_best_of_n(models, scorer, tokenizer):
    sampler = Recorded(models[1], tokenizer, max_completion_length=12)
    [found] = StepSearch(sampler, scorer, width=3, expand=6, steps="whole").search(["Q:"])
    [[drawn]] = sampler.found
    scores = scorer.score(["Q:"] * 6, [""] * 6, "whole", completion_ids=drawn)
    order = sorted(range(6), key=lambda row: -scores[row].score)
    assert found.completion_ids == [drawn[row] for row in order[:3]]
    wanted = [scores[row].score for row in order[:3]]
    assert [each.score for each in found.ranked] == pytest.approx(wanted, abs=1e-4)
    assert len(set(wanted)) == 3
    tokens = sum(map(len, drawn))
    cost = found.cost
    assert (cost.tokens_generated, cost.tokens_scored, cost.forward_passes) == (tokens, tokens, 12)


@pytest.mark.equation("E24")
@pytest.mark.parametrize("steps", ["token", SHORT])
def test_scores_that_were_added_up_are_those_of_the_whole(scorer, steps):
    search = StepSearch(
        "reference", scorer, width=3, expand=3, steps=steps, max_completion_length=10
    )
    for prompt, found in zip(("Q:", "hello"), search.search(["Q:", "hello"]), strict=True):
        ids = found.completion_ids
        again = scorer.score([prompt] * 3, [""] * 3, steps, completion_ids=ids)
        for one, other in zip(found.ranked, again, strict=True):
            assert one.token_log_ratios == pytest.approx(other.token_log_ratios, abs=1e-4)
            assert one.prefix_scores == pytest.approx(other.prefix_scores, abs=1e-4)
            assert (one.steps, one.step_ends) == (other.steps, other.step_ends)
            assert (one.tokens, one.beta) == (other.tokens, BETA)
            assert max(map(abs, one.token_log_ratios)) > 1e-2
        scores = [each.score for each in found.ranked]
        assert scores == sorted(scores, reverse=True)


def test_the_seed_decides(scorer):
    def found(seed):
        search = StepSearch(
            "policy", scorer, expand=2, steps="token", max_completion_length=6, seed=seed
        )
        return [each.completion_ids for each in search.search(["Q:", "hi"])]

    assert found(1) == found(1)
    assert found(1) != found(2)


def test_models_are_there_once(models, scorer, tokenizer):
    for generator, model in (("policy", 0), ("reference", 1), (models[0], 0)):
        search = StepSearch(generator, scorer, max_completion_length=4)
        assert isinstance(search.sampler, GenerateSampler)
        assert search.sampler.model is models[model]


def test_the_base_of_an_adapter_generates(home, tokenizer):
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    torch.manual_seed(4)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    scorer = GibbsScorer(get_peft_model(base, lora), tokenizer=tokenizer, beta=1.0)
    search = StepSearch(
        "reference", scorer, expand=2, steps="token", max_completion_length=4, stop_token_ids=[9]
    )
    assert isinstance(search.sampler, GenerateSampler)
    assert isinstance(search.sampler.model, Adapter) and search.sampler.model.name is None
    assert search.sampler.end_ids == {0, 9}
    [found] = search.search(["Q:"])
    assert len(found.ranked) == 4 and found.ranked[0].score > 0


class Engine:
    """Stands in for a `vllm.LLM` that always says "12\n" and then ends."""

    def __init__(self, tokenizer, longest=64):
        self.tokenizer = tokenizer
        self.asked = []
        self.llm_engine = SimpleNamespace(
            model_config=SimpleNamespace(
                max_model_len=longest, try_get_generation_config=lambda: {}
            ),
            vllm_config=SimpleNamespace(cache_config=SimpleNamespace(enable_prefix_caching=True)),
        )

    def get_tokenizer(self):
        return self.tokenizer

    def generate(self, prompts, sampling_params, use_tqdm):
        self.asked.append((prompts, sampling_params))
        script = [*self.tokenizer("12\n")["input_ids"], 0]
        rows = []
        for prompt, parameters in zip(prompts, sampling_params, strict=True):
            begun = len(prompt["prompt_token_ids"]) - 2
            tokens = script[begun:][: parameters.max_tokens]
            ends = [n for n, t in enumerate(tokens, 1) if t in parameters.stop_token_ids]
            tokens = tokens[: ends[0]] if ends else tokens
            rows.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(tokens))] * 2))
        return rows


@pytest.fixture
def vllm(monkeypatch):
    module: Any = ModuleType("vllm")
    module.SamplingParams = SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", module)


def test_vllm_stops_at_the_ends_of_steps(vllm, scorer, rows, tokenizer):
    engine = Engine(tokenizer)
    sampler = VLLMSampler(engine, max_completion_length=9)
    [found] = StepSearch(sampler, scorer, width=2, expand=2, max_step_tokens=5).search(["Q:"])
    assert texts(found) == ["12\n"]
    (_, [first]), (prompts, [second]) = engine.asked
    breaks = NextStep("newline", tokenizer).pauses
    assert set(first.stop_token_ids) == {0, *breaks}
    assert (first.n, first.max_tokens) == (2, 5) == (second.n, second.max_tokens)
    assert prompts[0]["prompt_token_ids"] == tokenizer("Q:12\n")["input_ids"]
    # The caller's own sampler is as it was.
    assert (sampler.max_completion_length, sampler.end_ids) == (9, {0})
    engine = Engine(tokenizer, longest=10)
    sampler = VLLMSampler(engine, max_completion_length=9)
    with pytest.raises(ConfigError, match="that is 11, and the model reads at most 10"):
        StepSearch(sampler, scorer, max_step_tokens=1).search(["Q:"])
    assert engine.asked == []


@pytest.mark.parametrize("short", ["policy", "reference", "generator"])
def test_a_prompt_without_room_is_refused_before_anything_runs(scorer, models, short, monkeypatch):
    """Whichever of the three reads least; although the first step would fit."""
    those = {"policy": models[0], "reference": models[1], "generator": copy.deepcopy(models[1])}
    monkeypatch.setattr(those[short].config, "max_position_embeddings", 10)
    for model in those.values():
        monkeypatch.setattr(model, "forward", lambda *_, **__: pytest.fail("the model was run"))
    options: dict[str, Any] = {"max_step_tokens": 1, "max_completion_length": 9}
    with pytest.raises(ConfigError, match=r"Row 1 has 2 \+ 9 tokens .* at most 10"):
        StepSearch(those["generator"], scorer, **options).search(["Q", "Q:"])


def test_a_bad_prompt_is_named(scorer):
    search = StepSearch("reference", scorer, max_completion_length=4)
    with pytest.raises(DataError, match="row 1: the prompt '' has no token"):
        search.search(["Q:", ""])
    with pytest.raises(ConfigError, match=r"prompts is one text; .*\['Q:'\]"):
        search.search("Q:")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"width": 0}, "width is 0; it must be a whole number, 1 or more"),
        ({"width": True}, "width is True"),
        ({"expand": 2.0}, r"expand is 2\.0"),
        ({"max_step_tokens": 0}, "max_step_tokens is 0"),
        ({"max_completion_length": None}, "max_completion_length is None"),
        ({"temperature": -1}, "temperature is -1"),
        ({"seed": -1}, "seed is -1; it must be a whole number, 0 or more"),
        ({"seed": True}, "seed is True"),
        ({"stop_strings": "ab"}, "stop_strings is 'ab'; it must be a list of texts"),
        ({"stop_strings": [""]}, r"stop_strings is \[''\]"),
        ({"steps": "turn"}, "steps is 'turn': a search needs a rule"),
        ({"steps": ["a", "b"]}, r"steps is \['a', 'b'\]: a search needs a rule"),
        ({"steps": "lines"}, "steps is 'lines', which is no way to cut"),
        ({"generator": "outputs/x"}, "generator is 'outputs/x'; it must be 'reference'"),
        ({"generator": None}, "generator is None"),
        ({"scorer": None}, "scorer is a NoneType; it must be a GibbsScorer"),
    ],
)
def test_arguments_out_of_range(scorer, options, says):
    options = {"generator": "reference", "scorer": scorer, "max_completion_length": 4} | options
    with pytest.raises(ConfigError, match=says):
        StepSearch(options.pop("generator"), options.pop("scorer"), **options)


def test_a_sampler_has_its_own_options(scorer, tokenizer):
    sampler = Scripted(tokenizer, {})
    option: Any
    for name, option in (
        ("max_completion_length", 4),
        ("temperature", 1.0),
        ("stop_token_ids", [1]),
        ("batch_size", 2),
    ):
        with pytest.raises(ConfigError, match=f"{name} are set, and the generator is a sampler"):
            StepSearch(sampler, scorer, **{name: option})
    scorer.tokenizer = None
    with pytest.raises(ConfigError, match="The scorer has no tokenizer"):
        StepSearch(sampler, scorer)


class Returning:
    """A sampler that returns what a function of the number of prefixes and of ways gives."""

    note = None

    def __init__(self, returned: Any, length: Any = 6, end_ids: Any = frozenset([0])):
        self.returned = returned
        self.max_completion_length = length
        self.end_ids = end_ids

    def sample(self, prefixes, num_rollouts, *, prompt_lengths: Any = None, seed=0):
        return self.returned(len(prefixes), num_rollouts)


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (lambda p, n: None, "a NoneType, None, for 2 prefixes"),
        (lambda p, n: [[[5]] * n] * (p - 1), "for 2 prefixes"),
        (lambda p, n: [[[5]] * n] * (p + 1), "for 2 prefixes"),
        (lambda p, n: torch.ones(p, n, 2, dtype=torch.long), "a Tensor, .* for 2 prefixes"),
        (lambda p, n: [[[5]] * (n - 1)] * p, r"a list, \[\[5\]\], for a prefix"),
        (lambda p, n: [[[5]] * (n + 1)] * p, "for a prefix"),
        (lambda p, n: [None] * p, "a NoneType, None, for a prefix"),
        (lambda p, n: [[5, 6]] * p, "a int, 5, that is no list of token ids"),
        (lambda p, n: [["ab"] * n] * p, "a str, 'ab', that is no list"),
        (lambda p, n: [[[5.0]] * n] * p, r"a list, \[5\.0\], that is no list"),
        (lambda p, n: [[[True]] * n] * p, r"a list, \[True\], that is no list"),
        (lambda p, n: [[[-5]] * n] * p, r"a list, \[-5\], that is no list"),
        (lambda p, n: [[torch.tensor([5])] * n] * p, r"a Tensor, tensor\(\[5\]\), that is no list"),
        (lambda p, n: [[[]] * n] * p, "no token behind a prefix"),
        (lambda p, n: [[[5] * 7] * n] * p, "7 tokens where 6 were left"),
        (lambda p, n: [[[5, 0, 6]] * n] * p, r"a list, \[5, 0, 6\], that goes on behind an end"),
    ],
)
def test_a_sampler_that_returns_something_else(scorer, returned, says):
    search = StepSearch(Returning(returned), scorer, width=2, expand=2)
    with pytest.raises(RunError, match=rf"The sampler Returning returned .*{says}") as caught:
        search.search(["Q:", "Q"])
    assert "of each of the 2 prefixes, 2 lists of token ids" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"length": 0}, "max_completion_length of Returning is 0; it must be a whole number"),
        ({"length": None}, "max_completion_length of Returning is None"),
        ({"length": True}, "max_completion_length of Returning is True"),
        ({"end_ids": [0]}, r"end_ids of Returning is \[0\]; it must be a set"),
        ({"end_ids": None}, "end_ids of Returning is None"),
    ],
)
def test_a_sampler_whose_settings_are_none(scorer, options, says):
    with pytest.raises(ConfigError, match=says):
        StepSearch(Returning(lambda p, n: [[[0]] * n] * p, **options), scorer)


@pytest.mark.parametrize("kind", ["model", "sampler", "own sampler"])
def test_a_generator_of_other_tokens_is_refused(scorer, tmp_path, kind):
    """Of six letters, before anything is sampled: its ids would be read as other texts."""
    other = AutoModelForCausalLM.from_pretrained(save_tiny_llama(tmp_path))
    own: Any = Returning(lambda p, n: [[[0]] * n] * p)
    own.tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    generators = {
        "model": other,
        "sampler": GenerateSampler(other, max_completion_length=4),
        "own sampler": own,
    }
    options: dict[str, Any] = {"max_completion_length": 4} if kind == "model" else {}
    with pytest.raises(ConfigError, match="'the generator' and 'the scorer' have different voca"):
        StepSearch(generators[kind], scorer, **options)


def test_a_model_of_another_family_may_guide(models, tokenizer):
    """A GPT-2 of the same tokens as policy; the score is what `score` says of the text."""
    torch.manual_seed(0)
    size: dict[str, Any] = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **size))
    with torch.no_grad():
        gpt.lm_head.weight.mul_(20)
    scorer = GibbsScorer(gpt, models[1], tokenizer, BETA)
    [found] = StepSearch("reference", scorer, max_completion_length=6).search(["Q"])
    [again] = scorer.score(["Q"], [""], "newline", completion_ids=[found.ids])
    assert found.ranked[0].score == pytest.approx(again.score, abs=1e-4)


def test_the_shortest_search(scorer):
    """A prompt of one token, and completions of one token: one round, and at most four tokens."""
    [found] = StepSearch("reference", scorer, max_completion_length=1).search(["Q"])
    assert [len(ids) for ids in found.completion_ids] == [1] * len(found.ranked)
    assert found.cost.tokens_generated == 4
    assert StepSearch("reference", scorer, max_completion_length=1).search([]) == []


def test_steps_that_never_end_are_cut(scorer):
    """Every 3 tokens, up to the length of a completion; each cut is noted."""
    rule = {"regex": "no such text"}
    search = StepSearch(
        "reference", scorer, width=1, expand=1, steps=rule, max_step_tokens=3,
        max_completion_length=7, seed=1,
    )  # fmt: skip
    [found] = search.search(["Q:"])
    cuts = [note for note in found.ranked[0].notes if "had no end within 3 tokens" in note]
    assert len(found.ids) <= 7 and len(cuts) == (len(found.ids) - 1) // 3


@pytest.mark.parametrize("prompts", [None, 5, {"role": "user", "content": "a"}])
def test_prompts_that_are_no_list(scorer, prompts):
    with pytest.raises(ConfigError, match=r"prompts is a .* it must be a list of texts"):
        StepSearch("reference", scorer, max_completion_length=1).search(prompts)


@pytest.mark.parametrize("ids", [5, "ab", ["a"], [-1], [True], [1.0], None])
def test_stop_tokens_that_are_none(scorer, ids):
    with pytest.raises(ConfigError, match=r"stop_token_ids is .*; it must be a list of token ids"):
        StepSearch("reference", scorer, max_completion_length=1, stop_token_ids=ids)
    with pytest.raises(ConfigError, match="stop_token_ids is"):
        GenerateSampler(scorer.reference, max_completion_length=1, stop_token_ids=ids)


@pytest.mark.parametrize("strings", [None, 5, [5]])
def test_stop_strings_that_are_none(scorer, strings):
    with pytest.raises(ConfigError, match=r"stop_strings is .*; it must be a list of texts"):
        StepSearch("reference", scorer, max_completion_length=1, stop_strings=strings)
