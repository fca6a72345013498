"""The credit of a process reward by loops; how a scorer is opened; what does not go together."""

import math
import shutil
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import QUIET, VOCABULARY, count_a, prompts, save_byte_llama, save_tiny_llama
from trl_ext.errors import ConfigError, RewardError
from trl_ext.functional.process_credit import at_step_ends
from trl_ext.gibbs_prm import GibbsScorer
from trl_ext.gibbs_prm.encoding import Encoded, encode
from trl_ext.gibbs_prm.process_steps import step_ends
from trl_ext.gibbs_prm.steps import cut
from trl_ext.grpo import GRPOTrainer
from trl_ext.oracle import tabular_tokenizer
from trl_ext.ppo import PPOTrainer
from trl_ext.reinforce import ReinforceTrainer
from trl_ext.rollout import Rollout
from trl_ext.rwr import RWRTrainer
from trl_ext.trl_adapter import PolicyTrainer

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
TOKENIZER = tabular_tokenizer(VOCABULARY)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def adapter(model_path, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(5)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model_path), LORA).save_pretrained(folder)
    return str(folder)


class OfToken:
    """A scorer: of token k of the vocabulary (k + 1)² / 10."""

    def token_rewards(self, prompt_ids, completion_ids):
        assert all(len(ids) for ids in prompt_ids)
        return [[(token + 1) ** 2 / 10 for token in ids] for ids in completion_ids]


@pytest.fixture
def make(model_path, tmp_path):
    def build(kind: Any = ReinforceTrainer, scorer: Any = None, reward=count_a, **options) -> Any:
        settings: dict[str, Any] = QUIET | {
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_steps": 1,
            "beta": 0.0,
            "temperature": 3.0,  # so that completions differ in length
        }
        parts = {"peft_config": options.pop("lora", None)}
        args = kind.config_class(str(tmp_path / "out"), **(settings | options))
        held_out = prompts(8) if args.eval_strategy != "no" else None
        return kind(model_path, reward, args, prompts(), held_out, process_reward=scorer, **parts)

    return build


def watch(trainer: Any) -> list[tuple[torch.Tensor, torch.Tensor, Rollout]]:
    """Of each rollout: the credit before and after, and the rollout."""
    seen, added = [], trainer.process_reward.added

    def spy(credit, rollout):
        result = added(credit, rollout)
        seen.append((credit, result, rollout))
        return result

    trainer.process_reward.added = spy
    return seen


def returns_of(rollout: Rollout, gamma: float) -> list[list[float]]:
    """The discounted sums of what follows of `OfToken`, a list a completion."""
    result = []
    for ids, mask in zip(rollout.batch["completion_ids"], rollout.mask, strict=True):
        rewards = [(token + 1) ** 2 / 10 for token in ids[mask.bool()].tolist()]
        places = range(len(rewards))
        result.append([sum(gamma ** (s - t) * rewards[s] for s in places[t:]) for t in places])
    return result


def others_of(returns: list[list[float]], row: int, how: str) -> list[list[float]]:
    """Which completions' returns a row is compared with; groups of 4."""
    group = range(4 * (row // 4), 4 * (row // 4) + 4)
    rows = {"none": [], "batch": range(len(returns)), "group": group}
    rows["leave_one_out"] = [other for other in group if other != row]
    return [returns[other] for other in rows[how]]


@pytest.mark.parametrize("how", ["none", "batch", "group", "leave_one_out"])
@pytest.mark.parametrize("kind", [GRPOTrainer, ReinforceTrainer, PPOTrainer])
def test_the_credit_is_a_weighted_return_minus_its_baseline(make, kind, how):
    """By loops: at each position the mean of the others' returns, an ended one's the last."""
    gamma, weight = 0.8, 0.7
    options = {"process_gamma": gamma, "process_weight": weight, "process_baseline": how}
    trainer = make(kind, OfToken(), lambda completions, **_: list(map(float, range(8))), **options)
    seen = watch(trainer)
    trainer.train()
    [(before, after, rollout)] = seen
    before = before[:, None] * rollout.mask if before.dim() == 1 else before
    returns = returns_of(rollout, gamma)
    lengths = {len(row) for row in returns}
    assert len(lengths) > 1, "some end before others"
    for row, own in enumerate(returns):
        for t, value in enumerate(own):
            held = [other[min(t, len(other) - 1)] for other in others_of(returns, row, how)]
            mean = sum(held) / len(held) if held else 0.0
            change = (after - before)[row, t].item()
            assert change == pytest.approx(weight * (value - mean), abs=1e-5)
            # For rollouts of an older policy.
            kept = rollout.batch["process_baseline"][row, t].item()
            assert kept == pytest.approx(weight * mean, abs=1e-5)
        assert (after[row, len(own) :] == 0).all()


def test_what_no_reward_scores_gets_no_process_credit_and_is_nobodys_baseline(make):
    def half(completions, **_):
        return [None if row % 2 else 0.5 for row in range(len(completions))]

    trainer = make(scorer=OfToken(), reward=half)
    seen = watch(trainer)
    trainer.train()
    [(_, after, rollout)] = seen
    returns = returns_of(rollout, 1.0)
    assert (after[1::2] == 0).all()
    for row in (0, 4):  # compared with the other one that is scored: rows 2 and 6
        assert after[row, 0].item() == pytest.approx(
            returns[row][0] - returns[row + 2][0], abs=1e-5
        )


def test_nothing_is_added_in_evaluation(make):
    trainer = make(scorer=OfToken(), eval_strategy="steps", per_device_eval_batch_size=8)
    seen = watch(trainer)
    trainer.evaluate()
    assert not seen


def test_what_is_logged(make):
    """The means of the sums, and of those of the best and the worst by the reward."""
    scores = [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]

    class OfRow:
        def token_rewards(self, prompt_ids, completion_ids):
            flat = [score for group in scores for score in group]
            return [[s / len(ids)] * len(ids) for s, ids in zip(flat, completion_ids, strict=True)]

    def reward(completions, **_):
        return [0.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]  # the second prompt's do not differ

    trainer = make(scorer=OfRow(), reward=reward)
    trainer.train()
    [log] = [entry for entry in trainer.state.log_history if "process/reward_mean" in entry]
    assert log["process/reward_mean"] == pytest.approx(4.5)
    assert log["process/score_of_best"] == pytest.approx(2.0)
    assert log["process/score_of_worst"] == pytest.approx(1.0)


def rollout_of(tokens: list[list[int]], tool: list[list[int]] | None = None, **others) -> Rollout:
    ids = torch.tensor(tokens)
    batch = {
        "prompt_ids": torch.ones(len(ids), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(ids), 1, dtype=torch.long),
        "completion_ids": ids,
        "completion_mask": torch.ones_like(ids),
    }
    if tool is not None:
        batch["tool_mask"] = torch.tensor(tool)
    return Rollout(torch.ones(len(ids) // 4, 4), batch | others, slice(0, len(ids)))


def test_a_tools_answer_is_read_and_not_rewarded(make):
    """Token 5 came from a tool: 3.6 of the sum falls away, and no step of discount is taken."""
    trainer = make(scorer=OfToken(), process_baseline="none", process_gamma=0.5)
    logged = {}
    trainer.log_metric = logged.__setitem__
    rollout = rollout_of([[1, 5, 2]] * 4, tool=[[1, 0, 1]] * 4)
    credit = trainer.process_reward.added(torch.zeros(4), rollout)
    torch.testing.assert_close(credit[0], torch.tensor([0.4 + 0.5 * 0.9, 0.0, 0.9]))
    assert logged == {"process/reward_mean": pytest.approx(1.3)}


def test_at_the_level_of_steps_a_reward_lies_on_the_last_token(make):
    """Of "abcab", cut behind b: steps ab, cab with 0.4 + 0.9 and 1.6 + 0.4 + 0.9."""
    trainer = make(
        scorer=OfToken(),
        process_baseline="none",
        process_level="step",
        process_steps={"regex": "b"},
        process_weight=2.0,
    )
    rollout = rollout_of([[1, 2, 3, 1, 2]] * 4)
    credit = trainer.process_reward.added(torch.zeros(4), rollout)
    torch.testing.assert_close(
        rollout.batch["process_rewards"][0], torch.tensor([0.0, 2.6, 0.0, 0.0, 5.8])
    )
    torch.testing.assert_close(credit[0], torch.tensor([8.4, 8.4, 5.8, 5.8, 5.8]))


def test_images_are_refused(make):
    trainer = make(scorer=OfToken())
    with pytest.raises(ConfigError, match="reads text alone"):
        trainer.process_reward.added(torch.zeros(4), rollout_of([[1]] * 4, pixel_values=1))


def slow_at_step_ends(rewards, ends, mask):
    result = [0.0] * len(rewards)
    total, last = 0.0, None
    for t, (reward, end, kept) in enumerate(zip(rewards, ends, mask, strict=True)):
        if kept:
            total, last = total + reward, t
        if end or t == len(rewards) - 1:
            if last is not None:
                result[last] = total
            total, last = 0.0, None
    return result


TOKEN = st.tuples(st.integers(-5, 5), st.booleans(), st.booleans())


@given(st.lists(TOKEN, min_size=1, max_size=9))
def test_step_sums_against_a_loop(tokens):
    rewards, ends, mask = (list(column) for column in zip(*tokens, strict=True))
    dense = [reward if kept else math.nan for reward, kept in zip(rewards, mask, strict=True)]
    ours = at_step_ends(torch.tensor([dense]), torch.tensor([ends]), torch.tensor([mask]))
    assert ours[0].tolist() == pytest.approx(slow_at_step_ends(rewards, ends, mask))


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory) -> Any:
    return AutoTokenizer.from_pretrained(save_byte_llama(tmp_path_factory.mktemp("bytes")))


@pytest.mark.parametrize(
    ("steps", "text", "wanted"),
    [
        ("newline", "ab\ncd", [3]),
        ("newline", "ab\n\ncd", [3]),  # the second line break may follow or not
        ("newline", "ab\n", [3]),
        ("sentence", "Yes. No", [5]),
        ("sentence", "Yes.", []),  # a digit may follow
        ("paragraph", "a\nb\n\nc", [5]),
        ("whole", "a\nb\n\nc", []),
        ({"regex": ";"}, "a;b;", [2, 4]),
    ],
)
def test_a_step_ends_where_what_is_written_ends_it(byte_tokenizer, steps, text, wanted):
    """One token a character: numbers of tokens are those of characters."""
    ids = byte_tokenizer(text)["input_ids"]
    assert step_ends([5], ids, steps, byte_tokenizer) == wanted
    with_eos = [*ids, byte_tokenizer.eos_token_id]
    assert step_ends([5], with_eos, steps, byte_tokenizer) == wanted


def slow_step_ends(encoded: Encoded, steps: Any) -> list[int]:
    """As `cut` ends them, were the completion to go on with a word: asked after every token."""
    ends: list[int] = []
    for place in range(1, len(encoded.tokens) + 1):
        begin = ends[-1] if ends else 0
        tokens = [*encoded.tokens[begin:place], "x"]
        places = list(accumulate(map(len, tokens)))
        count = len(tokens)
        window = Encoded([0], [0] * count, "".join(tokens), tokens, places, [True] * count, [])
        if place - begin in cut(window, steps).token_ends:
            ends.append(place)
    return ends


PIECES = [
    "a",
    "Dr",
    "e.g",
    "etc",
    "1",
    " ",
    "\n",
    "\r\n",
    ".",
    "!",
    ")",
    '"',
    "。",
    " B",
    "é",
    "\x0b",
]
RULES = ["newline", "sentence", "paragraph", "whole", "token", {"regex": "\n+"}, {"regex": "a|1$"}]


@given(st.lists(st.sampled_from(PIECES), max_size=20).map("".join), st.sampled_from(RULES))
def test_steps_end_where_the_slow_way_ends_them(byte_tokenizer, text, steps):
    ids = byte_tokenizer(text)["input_ids"]
    slow = slow_step_ends(encode("a", "", byte_tokenizer, completion_ids=ids), steps)
    assert step_ends([5], ids, steps, byte_tokenizer) == slow


@given(st.text("ab\n. ", max_size=12), st.sampled_from(["newline", "sentence", "paragraph"]))
def test_what_comes_later_ends_no_earlier_step(byte_tokenizer, text, steps):
    ids = byte_tokenizer(text)["input_ids"]
    whole = step_ends([5], ids, steps, byte_tokenizer)
    for length in range(len(ids)):
        begun = step_ends([5], ids[:length], steps, byte_tokenizer)
        assert begun == [end for end in whole if end <= length]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (lambda ids: [[0.0] * len(each) for each in ids][:-1], "one list a completion"),
        (lambda ids: [[0.0] * (len(each) + 1) for each in ids], "one number a token"),
        (lambda ids: [[math.nan] * len(each) for each in ids], "must be a finite number"),
        (lambda ids: [[1e300] * len(each) for each in ids], "is inf; each must be a finite"),
        (lambda ids: None, "gave None. It must give a list"),
        (lambda ids: ([0.0] * len(each) for each in ids), "gave <generator object"),
        (lambda ids: dict.fromkeys(range(len(ids)), 0.0), "gave {0: 0.0"),
        (lambda ids: [0.0] * len(ids), "gave 0.0 for completion 0: has more dimensions than one"),
        (lambda ids: [torch.zeros(len(each), 1) for each in ids], "more dimensions than one"),
        (lambda ids: [["a"] * len(each) for each in ids], "for completion 0: too many dimensions"),
        (lambda ids: [[None] * len(each) for each in ids], "gave [None"),
        (lambda ids: [[True] * len(each) for each in ids], "its entries are no numbers"),
        (lambda ids: [[1j] * len(each) for each in ids], "its entries are no numbers"),
        # Two of them add up to more than a float32 holds.
        (lambda ids: [[3e38] * len(each) for each in ids], "add up to no finite number"),
        (lambda ids: 1 / 0, "Wrong raised ZeroDivisionError: division by zero. Mend its"),
    ],
)
def test_what_a_scorer_gives_is_checked(make, given, says):
    class Wrong:
        def token_rewards(self, prompt_ids, completion_ids):
            return given(completion_ids)

    with pytest.raises(RewardError) as caught:
        make(scorer=Wrong()).train()
    assert says in str(caught.value)


def test_a_scorer_may_change_its_arguments(make):
    class Takes(OfToken):
        def token_rewards(self, prompt_ids, completion_ids):
            given = super().token_rewards(prompt_ids, completion_ids)
            for ids in completion_ids:
                ids.clear()
            return given

    credits = []
    for scorer in (OfToken(), Takes()):
        trainer = make(scorer=scorer)
        credits.append(trainer.process_reward.added(torch.zeros(4), rollout_of([[1, 2, 0]] * 4)))
    assert torch.equal(*credits)


def test_an_error_of_trl_ext_stays_what_it_is(make):
    class Refuses:
        def token_rewards(self, prompt_ids, completion_ids):
            raise ConfigError("too long")

    with pytest.raises(ConfigError, match=r"^too long$"):
        make(scorer=Refuses()).train()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"process_weight": math.inf}, "process_weight=inf must be finite"),
        ({"process_weight": "1"}, "process_weight='1' is a str"),
        ({"process_gamma": 1.5}, "process_gamma=1.5 must be between 0 and 1"),
        ({"process_beta": 0.0}, "process_beta=0.0 must be greater than 0"),
        ({"process_learning_rate": -1.0}, "process_learning_rate=-1.0 must be greater than 0"),
        ({"process_level": "word"}, "process_level='word' must be one of token, step"),
        ({"process_baseline": "optimal"}, "process_baseline='optimal' must be one of none, batch"),
        ({"process_reward": ""}, "process_reward='' must be a path, a hub id or None"),
        ({"process_reference": ""}, "process_reference='' must be a path"),
        ({"process_steps": 3}, "process_steps=3 must be the name of a way to cut"),
        (
            {"process_reward": "x", "process_steps": "sentence"},
            "process_steps='sentence' does nothing with process_level='token'",
        ),
        (
            {"process_reward": "x", "num_generations": 1, "process_baseline": "group"},
            "process_baseline='group' compares a prompt's completions",
        ),
        (
            {"process_learning_rate": 0.1, "reward_weights": [0.0]},
            "the rewards are what the scorer learns, and all of them are 0",
        ),
        ({"process_learning_rate": 0.1, "fp16": True}, "with fp16: gradients of the scorer"),
    ],
)
def test_bad_options(tmp_path, options, says):
    with pytest.raises(ConfigError) as caught:
        ReinforceTrainer.config_class(str(tmp_path), **(QUIET | options))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "scorer", "options", "says"),
    [
        (GRPOTrainer, None, {"process_weight": 2.0}, "process_weight do nothing without a process"),
        (GRPOTrainer, OfToken(), {"process_reward": "x"}, "process_reward='x' beside a scorer"),
        (GRPOTrainer, OfToken(), {"process_beta": 0.1}, "process_beta=0.1 beside a scorer"),
        (GRPOTrainer, "outputs/run", {}, "a str was given; it must have a method token_rewards"),
        (
            PPOTrainer,
            OfToken(),
            {"num_generations": 1},
            "process_baseline='leave_one_out' compares a prompt's completions",
        ),
        (
            GRPOTrainer,
            OfToken(),
            {"process_level": "step", "process_steps": "turn"},
            "a completion in training is one turn",
        ),
        (
            GRPOTrainer,
            OfToken(),
            {"process_level": "step", "process_steps": "newlines"},
            "process_steps is 'newlines', which is no way to cut. Did you mean 'newline'",
        ),
        (RWRTrainer, OfToken(), {}, "never negative. Remove it"),
        (RWRTrainer, None, {"process_reward": "x"}, "process_reward='x' does nothing here: a wei"),
        (GRPOTrainer, None, {"process_reward": "no/such"}, "there is no such folder here"),
        (
            GRPOTrainer,
            None,
            {"process_reward": "no/such", "process_beta": 1.0},
            "process_reference is not known",
        ),
        (
            GRPOTrainer,
            None,
            {"process_reward": "no/such", "process_beta": 1.0, "process_reference": "no/other"},
            "process_reward='no/such': the policy cannot be opened at 'no/such'",
        ),
        (
            GRPOTrainer,
            None,
            {"process_reward": "no/such", "process_beta": 1.0, "process_reference": "no/such"},
            "process_reference is process_reward, 'no/such': its log-ratio to itself is 0",
        ),
    ],
)
def test_what_does_not_go_together(make, kind, scorer, options, says):
    with pytest.raises(ConfigError) as caught:
        make(kind, scorer, **options)
    assert says in " ".join(str(caught.value).split()).replace("The policy", "the policy")


def test_another_tokenizer_is_refused(make, byte_tokenizer):
    class Other(OfToken):
        tokenizer = byte_tokenizer

    with pytest.raises(ConfigError, match="'the policy' and 'the process reward' have different"):
        make(scorer=Other())
    path = byte_tokenizer.name_or_path
    with pytest.raises(ConfigError, match="'the policy' and 'the process reward' have different"):
        make(process_reward=path, process_reference=path, process_beta=1.0)


def test_without_the_options_there_is_none(make):
    assert make().process_reward is None


def test_an_object_and_the_options_give_the_same(make, adapter):
    """Those of `GibbsScorer` itself, also on the weights of a policy that trains LoRA."""
    scorer = GibbsScorer(adapter, beta=0.3)
    credits = []
    for scores, options in (
        (scorer, {}),
        (None, {"process_reward": adapter, "process_beta": 0.3}),
        (None, {"process_reward": adapter, "process_beta": 0.3, "lora": LORA}),
    ):
        trainer = make(GRPOTrainer, scores, **options)
        rollout = rollout_of([[1, 2, 3, 0], [3, 3, 1, 2], [1, 1, 1, 1], [5, 4, 0, 0]])
        credits.append(trainer.process_reward.added(torch.zeros(4), rollout))
    assert credits[0].abs().max() > 1e-3
    assert torch.equal(credits[0], credits[1])
    torch.testing.assert_close(credits[0], credits[2], rtol=0, atol=1e-6)


def test_an_adapter_of_the_policys_base_stands_on_the_policys_weights(make, adapter, tmp_path):
    trainer = make(GRPOTrainer, process_reward=adapter, process_beta=0.3, lora=LORA)
    scorer = trainer.process_reward.scorer
    assert isinstance(scorer.policy.model, PeftModel) and scorer.reference.name is None
    ours = {p.data_ptr() for n, p in scorer.policy.model.named_parameters() if "lora_" not in n}
    theirs = {p.data_ptr() for n, p in trainer.model.named_parameters() if "lora_" not in n}
    assert ours == theirs
    other = make(
        GRPOTrainer,
        process_reward=adapter,
        process_beta=0.3,
        lora=LORA,
        process_reference=str(shutil.copytree(adapter, tmp_path / "same")),
        process_baseline="none",
    )
    rollout = rollout_of([[1, 2, 3, 0]] * 4)
    assert other.process_reward.added(torch.zeros(4), rollout).abs().max() == 0, "to itself"
    frozen = [p.detach().clone() for p in scorer.policy.model.parameters()]
    trainer.args.learning_rate = 0.1
    trainer.train()
    assert all(map(torch.equal, frozen, scorer.policy.model.parameters()))


def test_the_recipe_beside_a_policy_tells_beta_temperature_and_reference(
    make, model_path, tmp_path, caplog
):
    folder = tmp_path / "run"
    AutoModelForCausalLM.from_pretrained(model_path).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    (folder / "recipe.yaml").write_text(
        f"trainer: rwr\nmodel_name_or_path: {model_path}\nbeta: 0.125\ntemperature: 0.5\n"
    )
    trainer = make(GRPOTrainer, process_reward=str(folder))
    scorer = trainer.process_reward.scorer
    assert (scorer.beta, scorer.temperature) == (0.125, 0.5)
    assert scorer.names["the reference"] == model_path
    assert any("reference=moving" in record.message for record in caplog.records)
    other = make(GRPOTrainer, process_reward=str(folder), process_beta=2.0)
    assert other.process_reward.scorer.beta == 2.0


def test_a_frozen_scorer_leaves_nothing_in_a_checkpoint(make, tmp_path):
    trainer = make(PolicyTrainer, OfToken(), save_strategy="steps", save_steps=1)
    trainer.train()
    assert not (tmp_path / "out" / "checkpoint-1" / "process_reward").exists()
