"""Other prompts for groups whose rewards are all equal, and what is trained on then."""

from typing import Any

import pandas as pd
import pytest
import torch
import trl
from accelerate.state import AcceleratorState
from datasets import Dataset, IterableDataset
from transformers import LlamaForCausalLM, TrainerCallback

from tests.e2e.forked import ended, two_ranks
from tests.fake_vllm import install
from tests.tiny import QUIET, count_a, prompts, save_byte_llama, save_tiny_llama
from trl_ext import (
    GRPOConfig,
    GRPOTrainer,
    PPOConfig,
    PPOTrainer,
    ReinforceConfig,
    ReinforceTrainer,
    RWRConfig,
    RWRTrainer,
)
from trl_ext.errors import ConfigError
from trl_ext.functional import all_equal
from trl_ext.trl_adapter import end_training
from trl_ext.trl_adapter.probe import probe
from trl_ext.trl_adapter.redraw import check_can_redraw

G = 4
# Completions of a prompt that begins with e earn nothing, those of others 0, 1/4, 2/4, 3/4.
FIRST = ["ea", "ab", "e", "cba"]
OTHERS = ["bc", "eab", "d", "dda", "edd", "acd", "b", "ba"]
GRPO, RWR = (GRPOTrainer, GRPOConfig), (RWRTrainer, RWRConfig)
PPO, REINFORCE = (PPOTrainer, PPOConfig), (ReinforceTrainer, ReinforceConfig)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def completion_ids(prompt: str, number: int) -> list[int]:
    """1 is a, 2 is b, 3 is c; of lengths that depend on the prompt's."""
    return [3] * (1 + number) if prompt[0] == "e" else [1] * number + [2] * len(prompt)


class Sampler:
    """Completions that a prompt and their number in its group decide, and the prompts asked for."""

    def __init__(self, **fields: Any):
        self.asked: list[list[str]] = []
        self.fields = fields

    def __call__(self, prompts, trainer):
        self.asked.append(prompts[::G])
        rows = [(prompt, row % G) for row, prompt in enumerate(prompts)]
        return {
            "prompt_ids": trainer.processing_class(prompts)["input_ids"],
            "completion_ids": [completion_ids(*row) for row in rows],
            "logprobs": None,
        } | {name: of(rows) for name, of in list(self.fields.items())}


class Seen(TrainerCallback):
    """The rollout that was trained on, and the gradients of the first step."""

    def __init__(self):
        self.prompts: list[str] = []
        self.gradients: list[torch.Tensor] = []
        self.rollout: Any = None

    def on_rollout(self, args, state, control, trainer, rollout):
        self.rollout, self.ids = rollout, (trainer.prompt_ids, trainer.completion_ids)
        self.prompts = trainer.processing_class.batch_decode(trainer.prompt_ids)[::G]

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        assert model is not None
        self.gradients += [p.grad.clone() for p in model.parameters() if p.grad is not None]


def train(model, folder, of=GRPO, rows=(*FIRST, *OTHERS), sampler=None, reward=count_a, **options):
    """One step on 4 groups of 4: the trainer, what was seen, and what its sampler was asked."""
    trainer_class, config_class = of
    settings: dict[str, Any] = QUIET | {
        "max_steps": 1,
        "num_generations": G,
        "per_device_train_batch_size": 16,
        "max_completion_length": 8,
        "shuffle_dataset": False,
    }
    seen, sampler = Seen(), sampler or Sampler()
    trainer = trainer_class(
        model=model,
        reward_funcs=reward,
        args=config_class(str(folder), **(settings | options)),
        train_dataset=Dataset.from_dict({"prompt": list(rows)}),
        rollout_func=sampler,
        callbacks=[seen],
    )
    trainer.train()
    return trainer, seen, sampler.asked


def logged(trainer) -> dict[str, float]:
    return trainer.state.log_history[0]


def test_mixed_groups_take_the_places_of_uniform_ones(model_path, tmp_path):
    trainer, seen, asked = train(
        model_path, tmp_path, min_mixed_groups=1.0, max_sampling_rounds=9, seed=3
    )
    # The two that were mixed stay where they are.
    assert (seen.prompts[1], seen.prompts[3]) == ("ab", "cba")
    assert not any(prompt.startswith("e") for prompt in seen.prompts)
    assert len(set(seen.prompts)) == 4
    drawn = [prompt for rollout in asked[1:] for prompt in rollout]
    assert asked[0] == FIRST and set(drawn) <= set(OTHERS) and len(set(drawn)) == len(drawn)
    # Half of the groups are missing and half turned out mixed: as many are drawn as there are.
    assert len(asked[1]) == 4
    # The first mixed ones that were drawn, in their order.
    assert [seen.prompts[0], seen.prompts[2]] == [p for p in drawn if p[0] != "e"][:2]
    torch.testing.assert_close(
        seen.rollout.rewards_PG, torch.tensor([[0.0, 0.25, 0.5, 0.75]] * 4), rtol=0, atol=0
    )
    assert logged(trainer)["sampling/rounds"] == len(asked)
    assert logged(trainer)["sampling/mixed_groups_first"] == 0.5
    assert logged(trainer)["sampling/mixed_groups"] == 1.0


def test_each_row_of_the_batch_is_as_it_was_drawn(model_path, tmp_path):
    """What a rollout_func returns beside the tokens goes with its completion."""
    sampler = Sampler(
        logprobs=lambda rows: [
            [-0.125 * (n + 1)] * len(completion_ids(prompt, n)) for prompt, n in rows
        ],
        env_mask=lambda rows: [[0] + [1] * (len(completion_ids(*row)) - 1) for row in rows],
        tag=lambda rows: [f"{prompt}{n}" for prompt, n in rows],
        everywhere=lambda rows: 7,
    )
    given = {}

    def reward(prompts, completions, tag, everywhere, prompt_ids, **_):
        assert everywhere == [7] * len(tag)
        assert [len(ids) for ids in prompt_ids] == [len(prompt) for prompt in prompts]
        given.update(dict(zip(tag, zip(prompts, completions, strict=True), strict=True)))
        return count_a(completions)

    _, seen, asked = train(
        model_path,
        tmp_path,
        sampler=sampler,
        reward=reward,
        min_mixed_groups=1.0,
        max_sampling_rounds=9,
        num_iterations=2,
    )
    assert len(asked) > 1
    batch = seen.rollout.batch
    letters = "abcde"
    items = 0
    for row in range(16):
        prompt, number = seen.prompts[row // G], row % G
        wanted = completion_ids(prompt, number)
        length = len(wanted)
        items += length - 1
        of_prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        of_completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        assert of_prompt.tolist() == seen.ids[0][row] == [1 + letters.index(x) for x in prompt]
        assert of_completion.tolist() == seen.ids[1][row] == wanted
        assert batch["tool_mask"][row][:length].tolist() == [0] + [1] * (length - 1)
        logps = batch["sampling_per_token_logps"][row][:length]
        assert logps.tolist() == [-0.125 * (number + 1)] * length
        text = "".join(letters[token - 1] for token in wanted)
        assert given[f"{prompt}{number}"] == (prompt, text)
        # TRL pads prompts on the left and completions on the right.
        assert batch["prompt_mask"][row].tolist() == sorted(batch["prompt_mask"][row].tolist())
        assert batch["completion_mask"][row][:length].all()
    assert batch["num_items_in_batch"] == items
    # The policy's own are those of the rows that are there.
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    model = LlamaForCausalLM.from_pretrained(model_path)
    with torch.no_grad():
        for row in range(16):
            one = ids[row][mask[row].bool()][None]
            logps = model(one).logits.log_softmax(-1)[0, :-1].gather(1, one[0, 1:, None])[:, 0]
            length = int(batch["completion_mask"][row].sum())
            torch.testing.assert_close(
                batch["old_per_token_logps"][row][:length], logps[-length:], rtol=1e-4, atol=1e-5
            )


@pytest.fixture
def engines(monkeypatch, model_path):
    yield install(monkeypatch, model_path).built
    # With TRL's variables set, accelerate connects this process to itself.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


def test_probabilities_of_vllm_go_with_their_completions(model_path, tmp_path, engines):
    def by_prompt(prompts, completion_ids, **_):
        pairs = zip(prompts, completion_ids, strict=True)
        return [0.0 if prompt[0] == "e" else float(sum(ids)) for prompt, ids in pairs]

    settings: dict[str, Any] = QUIET | {"max_steps": 1, "num_generations": G, "use_vllm": True}
    settings |= {"per_device_train_batch_size": 16, "shuffle_dataset": False}
    settings |= {"vllm_mode": "colocate", "min_mixed_groups": 1.0}
    seen = Seen()
    RWRTrainer(
        model=model_path,
        reward_funcs=by_prompt,
        args=RWRConfig(str(tmp_path), **settings),
        train_dataset=Dataset.from_dict({"prompt": FIRST + OTHERS}),
        callbacks=[seen],
    ).train()
    [engine] = engines
    assert engine.events[0] == "sync" and len(engine.calls) > 1 and seen.prompts != FIRST
    drawn = [
        (call.prompts[row // call.params.n], completion, logps)
        for call in engine.calls
        for row, (completion, logps) in enumerate(zip(call.completions, call.logps, strict=True))
    ]
    batch = seen.rollout.batch
    for row, (prompt, completion) in enumerate(zip(*seen.ids, strict=True)):
        given = batch["sampling_per_token_logps"][row][: len(completion)]
        assert (prompt, completion, pytest.approx(given.tolist())) in drawn
    ratios = (batch["old_per_token_logps"] - batch["sampling_per_token_logps"]) * seen.rollout.mask
    torch.testing.assert_close(
        batch["importance_sampling_ratio"][:, 0], ratios.sum(1).exp(), rtol=1e-5, atol=0
    )


def dense(completion_ids, **_) -> list[list[float]]:
    """One number a token: an a earns 1/4."""
    return [[0.25 if t == 1 else 0.0 for t in ids] for ids in completion_ids]


JUDGED: dict[str, tuple[Any, dict[str, Any]]] = {
    "grpo": (GRPO, {}),
    "grpo, scaled by the batch": (GRPO, {"scale_rewards": "batch", "loss_type": "bnpo"}),
    "grpo, normalised each": (GRPO, {"multi_objective_aggregation": "normalize_then_sum"}),
    "grpo, reference and two uses": (
        GRPO,
        {"beta": 0.1, "num_iterations": 2, "per_device_train_batch_size": 8}
        | {"gradient_accumulation_steps": 2},
    ),
    "rwr": (RWR, {"reward_samples": 2, "drop_uniform_groups": False}),
    "reinforce": (REINFORCE, {"gamma": 0.5, "baseline": "batch", "loss_type": "grpo"}),
    "ppo": (PPO, {"gamma": 0.9, "beta": 0.1}),
}


@pytest.mark.parametrize("name", JUDGED)
def test_gradients_are_those_of_a_dataset_that_has_these_groups(name, model_path, tmp_path):
    of, options = JUDGED[name]
    # Those two read the numbers of single tokens.
    reward = dense if of in (REINFORCE, PPO) else count_a
    _, seen, asked = train(
        model_path,
        tmp_path / "redrawn",
        of,
        reward=reward,
        min_mixed_groups=0.75,
        max_sampling_rounds=9,
        **options,
    )
    assert len(asked) > 1 and seen.prompts != FIRST
    # GRPO's is TRL itself.
    judge = (trl.GRPOTrainer, trl.GRPOConfig) if of is GRPO else of
    _, there, at_once = train(
        model_path, tmp_path / "judge", judge, seen.prompts, reward=reward, **options
    )
    assert at_once[0] == seen.prompts
    assert len(seen.gradients) == len(there.gradients) > 0
    assert max(gradient.abs().max() for gradient in there.gradients) > 1e-4
    for ours, theirs in zip(seen.gradients, there.gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cap", [1, 2, 4])
def test_the_cap_is_kept(cap, model_path, tmp_path):
    uniform = ["e" * n + x for n in (1, 2) for x in "abcde"]
    trainer, seen, asked = train(
        model_path, tmp_path, rows=uniform, min_mixed_groups=0.25, max_sampling_rounds=cap
    )
    assert len(asked) == cap == logged(trainer)["sampling/rounds"]
    # Nothing was mixed: a whole rollout is drawn each time, and the first one stays.
    assert [len(each) for each in asked] == [4] * cap
    assert seen.prompts == uniform[:4] and logged(trainer)["sampling/mixed_groups"] == 0
    # 10 rows, 4 of them in the rollout: 6 others come before any again.
    drawn = [prompt for each in asked[1:] for prompt in each]
    assert len(set(drawn[:6])) == len(drawn[:6]) and not set(drawn[:6]) & set(uniform[:4])
    if cap == 4:
        assert len(drawn) == 12 and len(set(drawn[6:])) == 6


@pytest.mark.parametrize("others", [1, 0])
def test_prompts_come_again_once_all_are_used_up(others, model_path, tmp_path):
    uniform = ["e", "ea", "eb", "ec", "ed"][: 4 + others]
    _, _, asked = train(
        model_path, tmp_path, rows=uniform, min_mixed_groups=1.0, max_sampling_rounds=2
    )
    assert asked[1][:others] == uniform[4:]
    again = asked[1][others:]
    assert len(set(again)) == len(again) == 4 - others


@pytest.mark.parametrize(
    ("least", "drawn"),
    # Half of the four are mixed: for one more, two are drawn; for two, four.
    [(None, None), (0.5, None), (0.6, 1), (0.75, 2), (1.0, 4)],
)
def test_as_many_are_drawn_as_are_expected_to_do(least, drawn, model_path, tmp_path):
    options = {} if least is None else {"min_mixed_groups": least, "max_sampling_rounds": 2}
    trainer, _, asked = train(model_path, tmp_path, **options)
    assert [len(each) for each in asked] == ([4] if drawn is None else [4, drawn])
    assert ("sampling/rounds" in logged(trainer)) == (least is not None)


def test_unscored_completions_do_not_mix_a_group(model_path, tmp_path):
    """One that is scored among three that are not is uniform; 0 and None of two functions too."""

    def one_in_four(completions, **_):
        return [float(row) if row % G == 1 else None for row in range(len(completions))]

    trainer, _, asked = train(
        model_path, tmp_path, reward=one_in_four, min_mixed_groups=0.25, max_sampling_rounds=2
    )
    assert len(asked) == 2 and logged(trainer)["sampling/mixed_groups"] == 0


def test_rewards_that_cancel_out_are_uniform(model_path, tmp_path):
    def opposite(completions, **_):
        return [-2 * share for share in count_a(completions)]

    trainer, _, asked = train(
        model_path,
        tmp_path,
        reward=[count_a, opposite],
        reward_weights=[2.0, 1.0],
        min_mixed_groups=0.25,
        max_sampling_rounds=2,
    )
    assert len(asked) == 2 and logged(trainer)["sampling/mixed_groups"] == 0


def test_logged_rewards_are_those_of_the_prompts_that_came_first(model_path, tmp_path):
    options = {"reward": [count_a, dense], "reward_weights": [1.0, 0.5]}
    redrawn, _, asked = train(
        model_path, tmp_path / "redrawn", min_mixed_groups=1.0, max_sampling_rounds=9, **options
    )
    plain, _, _ = train(model_path, tmp_path / "plain", **options)
    assert len(asked) > 1
    names = [name for name in logged(plain) if name.startswith("reward")]
    assert len(names) == 6
    for name in names:
        assert logged(redrawn)[name] == pytest.approx(logged(plain)[name]), name
    # Two groups of four have a mean of 3/8, the others 0.
    assert logged(plain)["rewards/count_a/mean"] == pytest.approx(0.1875)


def test_a_held_out_reward_reads_the_rows_of_the_batch(model_path, tmp_path):
    """The gold reward of a watch, for which a row's columns come with its prompt."""
    read = []

    def gold(prompts, tag, **_):
        read.extend([*zip(prompts, tag, strict=True)])
        return [0.0] * len(prompts)

    class Watch(TrainerCallback):
        def on_rollout(self, args, state, control, trainer, **_):
            trainer.score_held_out(trainer.held_out_rewards([gold]))

    sampler, seen = Sampler(), Seen()
    settings: dict[str, Any] = QUIET | {"max_steps": 1, "num_generations": G}
    settings |= {"per_device_train_batch_size": 16, "shuffle_dataset": False}
    rows = [*FIRST, *OTHERS]
    GRPOTrainer(
        model=model_path,
        reward_funcs=count_a,
        args=GRPOConfig(str(tmp_path), **settings, min_mixed_groups=1.0),
        train_dataset=Dataset.from_dict({"prompt": rows, "tag": [f"of {row}" for row in rows]}),
        rollout_func=sampler,
        callbacks=[seen, Watch()],
    ).train()
    assert seen.prompts != FIRST
    assert read == [(prompt, f"of {prompt}") for prompt in seen.prompts for _ in range(G)]


def test_the_table_of_completions_is_that_of_the_batch(model_path, tmp_path):
    def talking(prompts, completions, log_extra, log_metric, **_):
        log_metric("calls", 1.0)
        log_extra("length", [len(completion) for completion in completions])
        if len(set(prompts)) == 4 and prompts[0] == FIRST[0]:
            log_extra("of_first", prompts)
        return count_a(completions)

    trainer, seen, asked = train(
        model_path,
        tmp_path,
        reward=talking,
        log_completions=True,
        min_mixed_groups=1.0,
        max_sampling_rounds=9,
    )
    assert len(asked) > 1 and logged(trainer)["calls"] == 1
    [file] = (tmp_path / "completions").glob("*.parquet")
    table = pd.read_parquet(file)
    assert table["prompt"].tolist() == [prompt for prompt in seen.prompts for _ in range(G)]
    texts = [[completion_ids(p, n) for n in range(G)] for p in seen.prompts]
    assert table["length"].tolist() == [len(ids) for group in texts for ids in group]
    assert table["talking"].tolist() == [0.0, 0.25, 0.5, 0.75] * 4
    kept = [prompt if prompt in FIRST else "-" for prompt in table["prompt"]]
    assert table["of_first"].fillna("-").tolist() == kept
    # Deviations from the mean of 3/8, of which the variance without bias is 5/48.
    expected = (torch.tensor([0.0, 0.25, 0.5, 0.75]) - 0.375) / ((5 / 48) ** 0.5 + 1e-4)
    assert table["advantage"].tolist() == pytest.approx(expected.tolist() * 4, rel=1e-5)


def test_the_seed_decides_what_is_drawn(model_path, tmp_path):
    options = {"rows": FIRST + ["e" + x + y for x in "abcde" for y in "abcde"]}
    asked = [
        train(model_path, tmp_path, min_mixed_groups=1.0, seed=seed, **options)[2]
        for seed in (1, 1, 2)
    ]
    assert asked[0] == asked[1] != asked[2]
    # Another rollout draws in another order; of those that neither rollout began with, some.
    _, _, twice = train(model_path, tmp_path, min_mixed_groups=1.0, max_steps=2, **options)
    began = twice[0] + twice[3]
    drawn = [[p for p in twice[n] + twice[n + 1] if p not in began] for n in (1, 4)]
    assert min(map(len, drawn)) >= 4 and drawn[0][:4] != drawn[1][:4]


@pytest.mark.parametrize("of", [RWR, PPO], ids=["rwr", "ppo"])
def test_a_run_that_is_resumed_ends_where_it_would_have(of, model_path, tmp_path):
    """With completions that the policy samples; two steps a rollout, each drawn again."""

    def strict(completions, **_):
        return [float(completion.startswith("a")) for completion in completions]

    def make(folder):
        return of[0](
            model=model_path,
            reward_funcs=strict,
            args=of[1](
                str(folder),
                **QUIET
                | {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "seed": 5}
                | {"num_generations": 2, "per_device_train_batch_size": 8, "num_iterations": 2}
                | {"min_mixed_groups": 1.0, "max_sampling_rounds": 3, "learning_rate": 1e-2},
            ),
            train_dataset=prompts(),
        )

    whole = make(tmp_path / "whole")
    whole.train()
    rounds = [log["sampling/rounds"] for log in whole.state.log_history if "sampling/rounds" in log]
    assert len(rounds) == 2 and max(rounds) > 1
    for step in (1, 2, 3):
        resumed = make(tmp_path / "resumed")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(ours, theirs), f"resumed at step {step}"


def test_evaluation_and_probe_draw_once(model_path, tmp_path):
    sampler = Sampler()
    settings: dict[str, Any] = QUIET | {"num_generations": G, "min_mixed_groups": 1.0}
    settings |= {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 16}
    trainer = GRPOTrainer(
        model=model_path,
        reward_funcs=lambda prompts, **_: [1.0] * len(prompts),
        args=GRPOConfig(str(tmp_path), **settings),
        train_dataset=Dataset.from_dict({"prompt": FIRST + OTHERS}),
        eval_dataset=Dataset.from_dict({"prompt": FIRST}),
        rollout_func=sampler,
    )
    metrics = trainer.evaluate()
    assert len(sampler.asked) == 1 and not any("sampling/" in name for name in metrics)
    probe(trainer)
    assert len(sampler.asked) == 2 and trainer.args.min_mixed_groups == 1.0


def test_messages_and_the_datasets_columns_come_along(tmp_path):
    """With completions of the policy; a prompt of the rollout is known again among the rows."""
    calls = []

    def uniform(prompts, answer, **_):
        assert [prompt[0]["content"] for prompt in prompts] == answer
        calls.append(answer[::2])
        return [1.0] * len(prompts)

    rows = [{"prompt": [{"role": "user", "content": x}], "answer": x} for x in "abcdefg"]
    settings: dict[str, Any] = QUIET | {"num_generations": 2, "per_device_train_batch_size": 8}
    settings |= {"max_steps": 1, "min_mixed_groups": 1.0, "max_sampling_rounds": 2}
    GRPOTrainer(
        model=save_byte_llama(tmp_path),
        reward_funcs=uniform,
        args=GRPOConfig(str(tmp_path), **settings),
        train_dataset=Dataset.from_list(rows),
    ).train()
    first, drawn = calls
    assert len(drawn) == 4 and set(drawn[:3]) == set("abcdefg") - set(first)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"min_mixed_groups": 0.0}, "min_mixed_groups=0.0 must be above 0 and at most 1"),
        ({"min_mixed_groups": float("nan")}, "min_mixed_groups=nan must be above 0"),
        ({"min_mixed_groups": 1.5}, "min_mixed_groups=1.5 must be above 0 and at most 1"),
        ({"min_mixed_groups": True}, "min_mixed_groups=True is a bool; it must be a number"),
        ({"min_mixed_groups": "0.5"}, "min_mixed_groups='0.5' is a str"),
        ({"min_mixed_groups": 0.5, "max_sampling_rounds": 0}, "max_sampling_rounds=0 must be at"),
        ({"min_mixed_groups": 0.5, "max_sampling_rounds": 2.0}, "max_sampling_rounds=2.0 is a"),
        ({"max_sampling_rounds": 4}, "max_sampling_rounds=4 does nothing without min_mixed_groups"),
    ],
)
def test_options_that_do_not_fit(options, said, tmp_path):
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
        GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


def test_groups_lie_within_a_process(tmp_path):
    config = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, min_mixed_groups=0.5)
    # What TRL takes of two processes: 24 rows, three groups of 8, of which one is of both.
    config.per_device_train_batch_size, config.steps_per_generation = 6, 2
    with pytest.raises(ConfigError, match="=6 times steps_per_generation=2, are no multiple of nu"):
        config.check()
    config.min_mixed_groups = None
    config.check()


def test_one_completion_is_no_group(tmp_path):
    with pytest.raises(ConfigError, match="num_generations=1 gives it one"):
        PPOConfig(str(tmp_path), use_cpu=True, bf16=False, num_generations=1, min_mixed_groups=0.5)


def with_ref(completions, ref_per_token_logps, **_):
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"train_dataset": IterableDataset.from_generator(lambda: iter([{"prompt": "a"}]))}, "str"),
        ({"train_dataset": Dataset.from_dict({"prompt": ["a"], "image": ["x"]})}, "images"),
        ({"tools": [completion_ids]}, "tools and environments"),
        ({"environment_factory": object}, "tools and environments"),
        ({"reward_funcs": with_ref}, "ref_per_token_logps"),
    ],
    ids=["stream", "images", "tools", "environment", "reference"],
)
def test_what_cannot_be_exchanged(changed, said, model_path, tmp_path):
    args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, min_mixed_groups=0.5)
    given: dict[str, Any] = {"reward_funcs": count_a, "train_dataset": prompts()} | changed
    with pytest.raises(ConfigError, match=f"min_mixed_groups=0.5 cannot draw.*{said}"):
        GRPOTrainer(model=model_path, args=args, **given)
    args.min_mixed_groups = None
    check_can_redraw(args, given["train_dataset"], [], tools=[completion_ids])


def test_columns_that_do_not_fit_the_completions(model_path, tmp_path):
    def talking(completions, log_extra, **_):
        log_extra("note", ["one"])
        return count_a(completions)

    with pytest.raises(ConfigError, match=r"'note' .* has 1 values for 16 completions"):
        train(model_path, tmp_path, reward=talking, min_mixed_groups=1.0)
    short = Sampler(tag=lambda rows: ["one", "two"])
    with pytest.raises(ConfigError, match=r"'tag' .* has 2 values for 16 completions"):
        train(model_path, tmp_path, sampler=short, min_mixed_groups=1.0)
    sometimes = Sampler()

    def once(rows):
        del sometimes.fields["tag"]
        return ["x"] * len(rows)

    sometimes.fields["tag"] = once
    with pytest.raises(ConfigError, match="rollout_func returned tag in one call and not in ano"):
        train(model_path, tmp_path, sampler=sometimes, min_mixed_groups=1.0)


def test_all_equal():
    nan, inf = float("nan"), float("inf")
    values = torch.tensor([[1.0, 1.0, 2.0], [nan, 3.0, inf], [5.0, 5.0, 5.0], [1.0, 2.0, nan]])
    keep = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 1, 0]])
    assert all_equal(values, keep).tolist() == [True, True, True, False]
    assert all_equal(values[:, :2].T, keep[:, :2].T, dim=0).tolist() == [True, True, True, False]


def of_rank(model: str, output: str) -> None:
    """Two uniform groups and a mixed one on the first process, uniform ones on the second."""
    sampler, seen = Sampler(), Seen()
    rows = ["ea", "ab", "e", "ed", "eb", "ec", *OTHERS, "ca", "cb", "cc", "cd", "da", "db"]
    trainer = ReinforceTrainer(
        model=model,
        reward_funcs=dense,
        args=ReinforceConfig(
            output,
            **QUIET
            | {"ddp_backend": "gloo", "max_steps": 2, "num_generations": G, "num_iterations": 2}
            | {"per_device_train_batch_size": 12, "max_completion_length": 8, "gamma": 0.9}
            | {"shuffle_dataset": False, "min_mixed_groups": 1.0, "max_sampling_rounds": 9},
        ),
        train_dataset=Dataset.from_dict({"prompt": rows}),
        rollout_func=sampler,
        callbacks=[seen],
    )
    trainer.train()
    parameters = [parameter.detach() for parameter in trainer.model.parameters()]
    found = {
        "asked": sampler.asked,
        "prompts": seen.prompts,
        "rewards": seen.rollout.rewards_PG,
        "items": seen.rollout.batch["num_items_in_batch"],
        "tokens": int(seen.rollout.mask.sum()),
        "log": trainer.state.log_history,
        "parameters": parameters,
    }
    torch.save(found, f"{output}-{trainer.accelerator.process_index}")
    end_training(trainer)


@pytest.mark.slow
def test_two_processes_draw_as_many_and_end_alike(model_path, tmp_path):
    environment = {"TRL_EXPERIMENTAL_SILENCE": "1"}
    run = (of_rank, model_path, str(tmp_path / "out"))
    for code, _, err in ended(two_ranks(*run, folder=tmp_path, environment=environment)):
        assert code == 0, err[-3000:]
    first, second = (torch.load(tmp_path / f"out-{rank}") for rank in range(2))
    assert first["asked"][0] == ["ea", "ab", "e"] and second["asked"][0] == ["ed", "eb", "ec"]
    assert [len(each) for each in first["asked"]] == [len(each) for each in second["asked"]]
    drawn = [prompt for rank in (first, second) for each in rank["asked"] for prompt in each]
    assert len(set(drawn)) == len(drawn)
    # Those that came first are replaced, each in its process, by the mixed ones drawn there.
    mixed = [[p for each in rank["asked"] for p in each if p[0] != "e"] for rank in (first, second)]
    assert first["prompts"] == [mixed[0][1], "ab", mixed[0][2]]
    assert second["prompts"] == mixed[1][:3]
    torch.testing.assert_close(first["rewards"], torch.tensor([[0.0, 0.25, 0.5, 0.75]] * 6))
    assert torch.equal(first["rewards"], second["rewards"])
    assert first["items"] == second["items"] == first["tokens"] + second["tokens"]
    for ours, theirs in zip(first["log"], second["log"], strict=True):
        assert ours.keys() == theirs.keys()
    assert first["log"][0]["sampling/mixed_groups_first"] == pytest.approx(1 / 6)
    for ours, theirs in zip(first["parameters"], second["parameters"], strict=True):
        assert torch.equal(ours, theirs)
