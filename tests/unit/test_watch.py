"""The reward-hacking watch: what it measures, when it speaks, what it leaves, what it refuses."""

import json
import logging
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from tests.tiny import QUIET, count_a, prompts, save_tiny_llama
from trl_ext.build import build_trainer
from trl_ext.errors import ConfigError, RewardError
from trl_ext.grpo import GRPOTrainer
from trl_ext.launch import train
from trl_ext.policy_config import PolicyConfig
from trl_ext.recipe import read_recipe
from trl_ext.record import RunRecord
from trl_ext.report import hacking_table
from trl_ext.rwr import RWRTrainer
from trl_ext.trl_adapter import PolicyTrainer, load_checkpoint
from trl_ext.watch import BEST, HACKING, PICTURE, RewardHackingWatch, callback
from trl_ext.watch.history import History
from trl_ext.watch.measures import (
    FALSE_ALARMS,
    Completions,
    Mean,
    change_since,
    drifts,
    mean_over_prompts,
    student_quantile,
)

NAN = math.nan


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def draws() -> None:
    """Of a test that wants the picture, which takes longer than a run."""


@pytest.fixture(autouse=True)
def no_picture(monkeypatch, request):
    if "draws" not in request.fixturenames:
        monkeypatch.setattr(callback, "draw_watch", lambda *_: None)


def seen(proxy, gold=None, ids=None, prompt=7, log_ratio=None, cut=None) -> Completions:
    count = len(proxy) * len(proxy[0])
    return Completions(
        proxy_PG=torch.tensor(proxy, dtype=torch.float64),
        gold_PG=None if gold is None else torch.tensor(gold, dtype=torch.float64),
        log_ratio_PG=None if log_ratio is None else torch.tensor(log_ratio, dtype=torch.float64),
        prompt_ids=[[prompt]] * count,
        token_ids=ids or [[1, 2]] * count,
        truncated=cut or [False] * count,
    )


def test_a_mean_is_over_prompts_and_leaves_out_what_was_not_scored():
    """Prompt means 1, 3 (of its one scored completion), and 5; the last prompt has none.

    Mean 3, sd 2, standard error 2/√3.
    """
    mean = mean_over_prompts(torch.tensor([[0.0, 2.0], [3.0, NAN], [5.0, 5.0], [NAN, NAN]]))
    assert mean.value == pytest.approx(3)
    assert mean.standard_error == pytest.approx(2 / 3**0.5)
    assert math.isnan(mean_over_prompts(torch.tensor([[1.0]])).standard_error)
    assert math.isnan(mean_over_prompts(torch.tensor([[NAN]])).value)


def test_the_numbers_of_completions():
    found = seen(
        [[1.0, 0.0], [1.0, 1.0]],
        gold=[[0.5, 0.5], [0.0, 1.0]],
        ids=[[1, 2, 3, 1, 2, 3], [4], [4, 4], [5, 6, 7]],
        log_ratio=[[2.0, 4.0], [0.0, 0.0]],
        cut=[True, False, False, False],
    ).numbers()
    assert {name: mean.value for name, mean in found.items()} == pytest.approx(
        {
            "proxy_reward": 0.75,
            "gold_reward": 0.5,
            "kl": 1.5,
            "length": (6 + 1 + 2 + 3) / 4,
            "truncated": 0.25,
            "repetition": (1 / 4 + 0 + 0 + 0) / 4,
            "distinct_1": 7 / 12,
            "distinct_2": (3 + 1 + 2) / (5 + 1 + 2),
        }
    )


def test_an_evaluations_batches_are_joined_and_prompts_that_fill_it_up_left_out():
    batches = [
        seen([[1.0, 2.0]], gold=[[3.0, 4.0]], ids=[[1], [2]]),
        seen([[5.0, 6.0], [7.0, 8.0]], gold=[[9.0, 9.0]] * 2, ids=[[3], [4], [5], [6]]),
    ]
    joined = Completions.joined(batches, 2)
    assert joined.proxy_PG.tolist() == [[1, 2], [5, 6]]
    assert joined.gold_PG is not None and joined.gold_PG.tolist() == [[3, 4], [9, 9]]
    assert (joined.token_ids, len(joined.truncated)) == ([[1], [2], [3], [4]], 4)
    assert joined.log_ratio_PG is None
    assert Completions.joined(batches, None).proxy_PG.size(0) == 3


@pytest.mark.parametrize(
    ("probability", "freedom", "table"),
    [
        (0.975, 10, 2.228),  # tables of Student's t
        (0.95, 30, 1.697),
        (0.999, 10, 4.144),
        (0.9995, 9, 4.781),
        (0.975, 10**7, 1.960),
    ],
)
def test_quantiles_of_student(probability, freedom, table):
    assert student_quantile(probability, freedom) == pytest.approx(table, rel=1e-3)


def test_the_interval_of_a_change():
    """Differences −1, −2, −3 and one unscored; mean −2, sd 1, standard error 1/√3.

    At t = 1 the level is 0.05·6/π² = 0.0304, at t = 2 an eighth of it.
    """
    now, then = torch.tensor([0.0, 0.0, 0.0, NAN]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    for comparison, level in ((1, 0.05 * 6 / math.pi**2), (2, 0.05 * 6 / math.pi**2 / 8)):
        change = change_since(now, then, comparison)
        assert change is not None and change.prompts == 3
        assert change.mean == pytest.approx(-2)
        half = student_quantile(1 - level, 2) / 3**0.5
        assert change.at_most == pytest.approx(-2 + half)
    assert change_since(now[:1], then[:1], 1) is None


def test_a_gold_reward_that_never_changes_is_seldom_said_to_fall():
    """1000 runs of 12 evaluations on 30 prompts, normal rewards of equal expectation.

    The chance of an alarm in a run is at most 5%: at most 0.05 + 4·√(0.05·0.95/1000) = 0.0776 of
    them. A test at 5% each time would alarm in half of them, as picking the best adds its own bias.
    """
    rewards = torch.randn(1000, 12, 30, dtype=torch.float64, generator=torch.manual_seed(0))
    alarms = 0
    for run in rewards:
        best = run[0]
        for t in range(1, len(run)):
            change = change_since(run[t], best, t)
            assert change is not None
            if change.at_most < 0:
                alarms += 1
                break
            best = max(best, run[t], key=lambda each: each.mean().item())
    assert alarms / len(rewards) <= FALSE_ALARMS + 4 * (0.05 * 0.95 / len(rewards)) ** 0.5


BEFORE = {
    "length": Mean(10.0, 0.5),
    "repetition": Mean(0.0, 0.0),
    "distinct_1": Mean(0.4, NAN),
    "distinct_2": Mean(0.8, NAN),
}


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({}, []),
        # 24 − 2·10 = 4 > 1.96·√(1² + (2·0.5)²) = 2.77, and 22 − 20 = 2 is not.
        ({"length": Mean(24.0, 1.0)}, ["length"]),
        ({"length": Mean(22.0, 1.0)}, []),
        # 10 − 2·4 = 2 > 1.96·√(0.5² + 0.2²) = 1.06
        ({"length": Mean(4.0, 0.1)}, ["length"]),
        # From nothing, repetition has to exceed 2·5%.
        ({"repetition": Mean(0.09, 0.001)}, []),
        ({"repetition": Mean(0.12, 0.001)}, ["repetition"]),
        ({"distinct_1": Mean(0.19, NAN)}, ["distinct_1"]),
        ({"distinct_1": Mean(0.9, NAN)}, []),  # more variety is no alarm
        ({"distinct_2": Mean(0.39, NAN), "length": Mean(40.0, 1.0)}, ["length", "distinct_2"]),
        ({"distinct_2": Mean(NAN, NAN)}, []),
    ],
)
def test_drifts(changed, names):
    assert [name for name, _, _ in drifts(BEFORE | changed, BEFORE, 2.0)] == names
    assert drifts(BEFORE | changed, BEFORE, None) == []


def judged(history: History, gold: float, proxy: float, step: int, prompt: int = 7):
    """An evaluation of 20 prompts around these means."""
    noise = torch.linspace(-0.1, 0.1, 20)[:, None].tolist()
    rewards = [[[mean + row[0]] for row in noise] for mean in (proxy, gold)]
    # Noise of its own, so that differences have a spread.
    rewards[1] = [[row[0] * (1 + 0.01 * (i * step % 7))] for i, row in enumerate(rewards[1])]
    completions = seen(*rewards, prompt=prompt)
    return history.judge_gold(completions, completions.numbers(), step)


def test_an_alarm_needs_a_fall_of_gold_and_a_rise_of_the_proxy():
    history = History(None, None)
    assert judged(history, gold=0.5, proxy=0.5, step=0) == []
    assert judged(history, gold=0.8, proxy=0.7, step=5) == []
    assert judged(history, gold=0.6, proxy=0.6, step=10) == [], "both fell: no hacking"
    [alarm] = judged(history, gold=0.6, proxy=0.9, step=15)
    assert alarm.kind == "gold"
    assert "step 15: on 20 held-out prompts" in alarm.message
    assert "its best at step 5" in alarm.message
    assert history.best["step"] == 5
    assert history.evaluations[-1]["best_step"] == 5
    assert history.evaluations[-1]["gold_change"][1] < 0


def test_a_fall_within_noise_is_none():
    """By 0.001 on average, where differences have a spread of about 0.02·0.8 and 20 prompts."""
    history = History(None, None)
    judged(history, gold=0.8, proxy=0.5, step=5)
    assert judged(history, gold=0.799, proxy=0.9, step=10) == []
    mean, at_most, _ = history.evaluations[-1]["gold_change"]
    assert mean < 0 < at_most
    assert history.best["step"] == 5


def test_other_prompts_are_compared_with_nothing():
    history = History(None, None)
    judged(history, gold=0.5, proxy=0.5, step=0)
    assert judged(history, gold=0.1, proxy=0.9, step=5, prompt=8) == []
    assert judged(history, gold=0.9, proxy=0.9, step=6, prompt=8) == []
    assert "gold_change" not in history.evaluations[-1]
    assert history.best["step"] == 0
    assert judged(history, gold=0.1, proxy=0.9, step=7)


def test_a_kl_beyond_its_budget_is_an_alarm():
    history = History(None, 3.0)
    numbers = {"kl": Mean(2.9, 0.1), **BEFORE}
    assert history.judge_text(numbers, "rollouts", 1) == []
    [alarm] = history.judge_text(numbers | {"kl": Mean(3.2, 0.1)}, "rollouts", 2)
    assert alarm.kind == "kl" and "3.2 nats" in alarm.message and "budget of 3" in alarm.message


def test_rollouts_and_evaluations_are_each_compared_with_their_own_beginning():
    history = History(2.0, None)
    long = BEFORE | {"length": Mean(50.0, 0.1)}
    assert history.judge_text(BEFORE, "rollouts", 0) == []
    assert history.judge_text(long, "evaluations", 0) == []
    [alarm] = history.judge_text(long, "rollouts", 1)
    assert alarm.kind == "length" and "is 50, and was 10 before training" in alarm.message


def test_what_a_checkpoint_keeps_of_the_numbers_before_training_is_compared_with():
    history, resumed = History(2.0, None), History(2.0, None)
    history.judge_text(BEFORE, "rollouts", 0)
    judged(history, gold=0.8, proxy=0.5, step=5)
    state = history.state()
    judged(history, gold=0.9, proxy=0.6, step=10)
    resumed.load_state(state)
    assert resumed.best["step"] == 5 and len(resumed.evaluations) == 1
    [alarm] = resumed.judge_text(BEFORE | {"length": Mean(50.0, 0.1)}, "rollouts", 9)
    assert alarm.kind == "length"


# The gold reward of each step; the proxy is the step itself.
SCHEDULE = [0.2, 0.5, 0.9, 0.6, 0.1, 0.1]


def falling(completions, trainer_state, **kwargs) -> list[float]:
    """Gold rewards as SCHEDULE has them, with a little spread."""
    gold = SCHEDULE[trainer_state.global_step]
    return [gold + 0.001 * (i * trainer_state.global_step % 5) for i in range(len(completions))]


def rising(completions, trainer_state, **kwargs) -> list[float]:
    return [trainer_state.global_step + 0.01 * (i % 3) for i in range(len(completions))]


def make(model, tmp_path, watch=None, *, trainer: Any = PolicyTrainer, parts=None, **options):
    settings: dict[str, Any] = QUIET | {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "per_device_eval_batch_size": 8,
        "num_generations_eval": 2,
        "max_steps": 5,
        "learning_rate": 1e-2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_on_start": True,
    }
    args = trainer.config_class(str(tmp_path / "out"), **(settings | options))
    parts = {"eval_dataset": prompts(12), "reward_funcs": rising} | (parts or {})
    callbacks = [] if watch is None else [watch]
    return trainer(model=model, args=args, train_dataset=prompts(), callbacks=callbacks, **parts)


def weights(model) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(ours, theirs) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class KeepWeights(RewardHackingWatch):
    """Also keeps the weights of each evaluation."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.weights: dict[int, list[torch.Tensor]] = {}

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        assert model is not None
        self.weights[state.global_step] = weights(model)
        super().on_evaluate(args, state, control, **kwargs)


@pytest.mark.parametrize("kind", [PolicyTrainer, RWRTrainer, GRPOTrainer])
def test_a_fall_is_said_once_and_the_best_policy_kept(model_path, tmp_path, caplog, kind):
    watch = KeepWeights(falling, drift=None)
    trainer = make(
        model_path,
        tmp_path,
        watch,
        trainer=kind,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
    )
    trainer.train()
    assert trainer.state.global_step == 5, "a warning does not stop"
    said = [record.message for record in caplog.records if "gold reward fell" in record.message]
    assert len(said) == 1 and "step 3:" in said[0] and "best at step 2" in said[0]
    assert list(watch.alarms) == ["gold"]
    # Left alone by save_total_limit, and the weights of step 2.
    out = tmp_path / "out"
    assert len(list(out.glob("checkpoint-*"))) == 1
    kept = AutoModelForCausalLM.from_pretrained(out / BEST)
    assert same(weights(kept), watch.weights[2])
    assert not same(weights(kept), watch.weights[5])
    kept_with = json.loads((out / BEST / HACKING).read_text())
    assert kept_with["step"] == 2
    # 0.9 and 0 to 0.004 more, by the place of a completion in its batch of eight.
    assert 0.9 <= kept_with["gold_reward"]["mean"] <= 0.904
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    record = json.loads((out / HACKING).read_text())
    assert (record["best_step"], record["prompts"]) == (2, 12)
    assert [row["step"] for row in record["evaluations"]] == [*range(6)]
    assert (list(record["alarms"]), record["alarm_steps"]) == (["gold"], {"gold": 3})
    fallen = record["evaluations"][3]
    assert fallen["proxy_reward"].keys() == {"mean", "standard_error"}
    assert fallen["gold_change"].keys() == {"mean", "at_most", "prompts"}
    # 0.6 against 0.9, each with 0 to 0.004 more.
    assert fallen["gold_change"]["mean"] == pytest.approx(-0.3, abs=0.004)
    assert fallen["gold_change"]["prompts"] == 12


def test_what_is_logged(model_path, tmp_path):
    watch = RewardHackingWatch(falling, every=2, rollouts=True)
    trainer = make(model_path, tmp_path, watch, beta=0.1, max_steps=4)
    trainer.train()
    texts = ["length", "truncated", "repetition", "distinct_1", "distinct_2"]
    names = ["proxy_reward", "gold_reward", "kl", *texts]
    logs = trainer.state.log_history
    evaluations = [log for log in logs if "eval_watch/gold_reward" in log]
    assert [log["step"] for log in evaluations] == [*range(5)]
    assert all(f"eval_watch/{name}" in log for log in evaluations for name in names)
    for log in evaluations:
        assert log["eval_watch/proxy_reward"] == pytest.approx(log["eval_reward"], rel=1e-5)
        assert log["eval_watch/length"] == pytest.approx(log["eval_completions/mean_length"])
        truncated = log["eval_completions/clipped_ratio"]
        assert log["eval_watch/truncated"] == pytest.approx(truncated, abs=1e-6)
        gold = SCHEDULE[log["step"]]
        assert gold <= log["eval_watch/gold_reward"] <= gold + 0.004
    # The rollouts of the steps after 0 and 2.
    rollouts = [log["step"] for log in logs if "watch/length" in log]
    assert rollouts == [1, 3]
    assert all(
        f"watch/{name}" in log
        for log in logs
        if log["step"] == 1
        for name in names
        if ("watch/length" in log)
    )


def test_without_being_asked_rollouts_are_not_scored(model_path, tmp_path):
    calls = []

    def gold(completions, **kwargs):
        calls.append(len(completions))
        return count_a(completions)

    trainer = make(model_path, tmp_path, RewardHackingWatch(gold), max_steps=2)
    trainer.train()
    # Three evaluations of 24 completions, eight at a time; a rollout has eight, too.
    assert calls == [8] * 9
    assert not any("watch/gold_reward" in log for log in trainer.state.log_history)


@pytest.mark.parametrize("kind", [PolicyTrainer, RWRTrainer])
def test_training_never_sees_the_gold_reward(model_path, tmp_path, kind):
    """Parameters and rewards with the watch, on rollouts too, are those without it."""
    results = []
    for index, watch in enumerate((None, RewardHackingWatch(falling, rollouts=True))):
        trainer = make(
            model_path,
            tmp_path / str(index),
            watch,
            trainer=kind,
            parts={"reward_funcs": count_a},
            max_steps=3,
            eval_steps=3,
        )
        trainer.train()
        rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
        results.append((weights(trainer.model), rewards))
    assert same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1] and len(results[0][1]) == 3


def test_a_gold_reward_gets_the_columns_and_ids_and_its_own_metrics_go_nowhere(
    model_path, tmp_path
):
    rows = []

    def gold(prompts, completions, completion_ids, prompt_ids, answer, log_metric, **kwargs):
        rows.extend(zip(prompts, answer, prompt_ids, completion_ids, strict=True))
        log_metric("of_gold", 1.0)
        return count_a(completions)

    texts = ["a", "b", "c"] * 4
    held_out = Dataset.from_dict({"prompt": texts, "answer": [text * 2 for text in texts]})
    trainer = make(
        model_path, tmp_path, RewardHackingWatch(gold), parts={"eval_dataset": held_out},
        max_steps=1, log_completions=True,
    )  # fmt: skip
    trainer.train()
    assert rows and all(answer == prompt * 2 for prompt, answer, _, _ in rows)
    assert all(ids == [1 + "abc".index(prompt)] for prompt, _, ids, _ in rows)
    assert not any("of_gold" in name for log in trainer.state.log_history for name in log)


def exact_log_ratio(policy, reference, prompt_ids, completion_ids) -> float:
    """log π/π_ref of one completion, by a pass of each without padding."""
    ids, first = torch.tensor([[*prompt_ids, *completion_ids]]), len(prompt_ids)
    total = 0.0
    with torch.no_grad():
        ours, theirs = (
            model(input_ids=ids).logits.log_softmax(-1)[0] for model in (policy, reference)
        )
    for t, token in enumerate(completion_ids):
        total += (ours[first + t - 1, token] - theirs[first + t - 1, token]).item()
    return total


@pytest.mark.parametrize(
    ("kind", "options", "lora"),
    [
        (PolicyTrainer, {"beta": 0.1}, False),
        (PolicyTrainer, {"beta": 0.1, "num_iterations": 2}, False),
        (PolicyTrainer, {"beta": 0.0}, True),  # the adapter is switched off
        (PolicyTrainer, {"beta": 0.1, "kl_estimator": "exact", "kl_is_correction": False}, False),
        (RWRTrainer, {"log_kl": True}, False),
    ],
)
def test_the_kl_is_the_mean_log_ratio_to_the_policy_before(
    model_path, tmp_path, kind, options, lora
):
    """Of the last evaluation, after three steps, each completion by itself."""
    last: list[tuple[Any, Any]] = []

    def gold(completions, prompt_ids, completion_ids, trainer_state, **kwargs):
        if trainer_state.global_step == 3:
            last.extend(zip(prompt_ids, completion_ids, strict=True))
        return count_a(completions)

    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=True)
    parts = {"peft_config": adapter} if lora else {}
    watch = RewardHackingWatch(gold)
    trainer = make(
        model_path,
        tmp_path,
        watch,
        trainer=kind,
        parts=parts,
        max_steps=3,
        eval_steps=3,
        learning_rate=0.1,
        **options,
    )
    trainer.train()
    policy, reference = trainer.model.eval(), AutoModelForCausalLM.from_pretrained(model_path)
    each = [exact_log_ratio(policy, reference, *ids) for ids in last]
    first, *_, newest = watch.history.evaluations
    assert len(each) == 24
    assert newest["kl"][0] == pytest.approx(sum(each) / 24, abs=1e-4)
    assert abs(newest["kl"][0]) > 1e-2
    assert first["kl"][0] == pytest.approx(0, abs=1e-5)


def test_without_a_reference_the_kl_is_absent_and_that_is_said_once(model_path, tmp_path, caplog):
    watch = RewardHackingWatch(falling)
    make(model_path, tmp_path, watch, beta=0.0, max_steps=2).train()
    assert "kl" not in watch.history.evaluations[-1]
    assert sum("no reference is loaded" in record.message for record in caplog.records) == 1


def test_stop_ends_after_the_step_with_a_checkpoint_and_a_resumed_run_goes_on(model_path, tmp_path):
    watch = RewardHackingWatch(falling, action="stop", drift=None)
    trainer = make(model_path, tmp_path, watch)
    trainer.train()
    assert trainer.state.global_step == 3
    assert watch.stopped and "gold reward fell" in watch.stopped
    checkpoint = tmp_path / "out" / "checkpoint-3"
    assert (checkpoint / "trainer_state.json").is_file()
    again = RewardHackingWatch(falling, action="stop", drift=None)
    resumed = make(
        model_path, tmp_path, again, eval_on_start=False, resume_from_checkpoint=str(checkpoint)
    )
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 5, "what was said does not stop again"
    assert again.stopped is None and again.alarms == watch.alarms
    assert again.alarm_steps == watch.alarm_steps == {"gold": 3}


def test_an_alarm_of_a_rollout_stops_as_well(model_path, tmp_path):
    """A budget that the first step exceeds: the rollout of the second one is measured."""
    watch = RewardHackingWatch(count_a, action="stop", kl_budget=1e-6, drift=None)
    trainer = make(
        model_path,
        tmp_path,
        watch,
        beta=0.1,
        eval_steps=5,
        learning_rate=0.3,
        seed=1,
        parts={"reward_funcs": lambda completions, **_: count_a(completions)},
    )
    trainer.train()
    assert list(watch.alarms) == ["kl"] and "of rollouts" in watch.alarms["kl"]
    assert trainer.state.global_step == int(watch.alarms["kl"].split()[1][:-1]) + 1 < 5
    assert (tmp_path / "out" / f"checkpoint-{trainer.state.global_step}").is_dir()


SAVES = {"save_strategy": "steps", "save_steps": 1, "seed": 3}


@pytest.fixture(scope="module")
def whole(model_path, tmp_path_factory) -> tuple[Path, RewardHackingWatch]:
    """A run in one piece with a checkpoint a step, and its watch. To be read only."""
    folder, watch = (
        tmp_path_factory.mktemp("whole"),
        RewardHackingWatch(falling, drift=None, every=2),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callback, "draw_watch", lambda *_: None)
        make(model_path, folder, watch, **SAVES).train()
    return folder / "out", watch


@pytest.mark.parametrize("step", [1, 4])
def test_a_resumed_run_remembers(model_path, tmp_path, whole, step):
    """Best so far, the numbers before training, what was said: as in the run in one piece."""
    folder, whole = whole
    resumed = RewardHackingWatch(falling, drift=None, every=2)
    checkpoint = str(folder / f"checkpoint-{step}")
    options = {"eval_on_start": False, "resume_from_checkpoint": checkpoint}
    options |= {"save_strategy": "no", "seed": 3}
    make(model_path, tmp_path, resumed, **options).train(resume_from_checkpoint=checkpoint)
    assert resumed.alarms == whole.alarms
    ours, theirs = resumed.extra_state(), whole.extra_state()
    assert ours["last_measured"] == theirs["last_measured"]
    # nan is not itself: compared as text.
    assert repr(ours["history"]) == repr(theirs["history"])


def test_a_resumed_run_does_not_replace_a_better_policy(model_path, tmp_path, whole):
    """0.9 at step 2 is kept; what the resumed run measures there is 0.7 times that."""
    shutil.copytree(whole[0], tmp_path / "out")
    kept = tmp_path / "out" / BEST / HACKING
    before = kept.read_text()
    (tmp_path / "out" / BEST).rename(tmp_path / "out" / ".best-old")  # killed while replacing
    worse = RewardHackingWatch(lambda **kw: [0.7 * g for g in falling(**kw)], drift=None)
    checkpoint = str(tmp_path / "out" / "checkpoint-1")
    options = {"eval_on_start": False, "resume_from_checkpoint": checkpoint}
    trainer = make(model_path, tmp_path, worse, max_steps=2, seed=3, **options)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert worse.history.best["step"] == 2
    assert kept.read_text() == before
    # A new run in the same folder replaces it, whatever it holds.
    negative = RewardHackingWatch(lambda **kw: [-g for g in falling(**kw)])
    make(model_path, tmp_path, negative, max_steps=1).train()
    assert json.loads(kept.read_text())["gold_reward"]["mean"] < 0


def test_with_nothing_left_to_train_an_evaluation_is_added_to_those_before(
    model_path, tmp_path, whole
):
    """As `trl_ext train --resume` does after the last step."""
    folder, _ = whole
    watch = RewardHackingWatch(falling, drift=None)
    trainer = make(model_path, tmp_path, watch, seed=3)
    load_checkpoint(trainer, folder / "checkpoint-2")
    trainer.evaluate()
    assert [row["step"] for row in watch.history.evaluations] == [0, 1, 2, 2]
    trainer.state.global_step = 3
    trainer.evaluate()
    assert list(watch.alarms) == ["gold"]


def test_the_picture_and_the_table(model_path, tmp_path, draws):
    trainer = make(model_path, tmp_path, RewardHackingWatch(falling, drift=None), max_steps=3)
    trainer.train()
    assert (tmp_path / "out" / PICTURE).read_bytes().startswith(b"\x89PNG")
    text = hacking_table(RunRecord(tmp_path / "out"))
    header, _, steps, *rest = text.splitlines()
    assert "12 held-out prompts" in header
    assert steps.split() == ["step", "0", "2", "3"]
    gold = next(line for line in rest if "gold reward (held out)" in line)
    assert gold.split()[4] == "0.200" and gold.split()[7].startswith("0.90")
    assert next(line for line in rest if "KL" in line).count("not measured") == 3
    assert any("Alarm, step 3:" in line for line in rest)
    assert str(tmp_path / "out" / BEST) in rest[-1]
    assert hacking_table(RunRecord(tmp_path)) == ""


def test_no_number_of_the_record_is_nan(model_path, tmp_path):
    def seldom(completions, **kwargs):
        return [None if i % 4 else 1.0 for i in range(len(completions))]

    parts = {"eval_dataset": prompts(12), "reward_funcs": [count_a, seldom]}
    make(model_path, tmp_path, RewardHackingWatch(falling), parts=parts, max_steps=1).train()

    def refuse(constant):
        raise AssertionError(constant)

    json.loads((tmp_path / "out" / HACKING).read_text(), parse_constant=refuse)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"every": 0}, "every=0 must be a whole number of steps from 1 on"),
        ({"every": True}, "every=True must be a whole number"),
        ({"every": 1.5}, "every=1.5 must be a whole number"),
        ({"rollouts": 1}, "rollouts=1 must be True or False"),
        ({"action": "halt"}, "action='halt' must be one of warn, stop"),
        ({"drift": 1.0}, "drift=1.0 must be a factor above 1, or None"),
        ({"drift": True}, "drift=True must be a factor above 1"),
        ({"drift": NAN}, "drift=nan must be a factor above 1"),
        ({"kl_budget": 0}, "kl_budget=0 must be nats per completion above 0"),
        ({"kl_budget": math.inf}, "kl_budget=inf must be nats"),
        ({"kl_budget": "3"}, "kl_budget='3' must be nats"),
    ],
)
def test_options_out_of_range(options, says):
    with pytest.raises(ConfigError) as caught:
        RewardHackingWatch(falling, **options)
    assert says in str(caught.value)


EVALUATES = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"watch_action": "stop"}, "watch_action: got 'stop', which does nothing without"),
        ({"watch_kl_budget": 3.0}, "watch_kl_budget: got 3.0, which does nothing without"),
        ({"gold_reward_funcs": []}, "gold_reward_funcs: an empty list"),
        ({"gold_reward_funcs": ["exact_macth"]}, "exact_match"),
        ({"gold_reward_funcs": [{"nam": "x"}]}, "is no name, nor a mapping with one"),
        ({"gold_reward_funcs": [falling]}, "callbacks=[RewardHackingWatch(gold=...)]"),
        ({"gold_reward_funcs": "exact_match"}, "gold_reward_funcs='exact_match' is a str"),
        ({"gold_reward_funcs": ["exact_match"], "eval_strategy": "no"}, "held-out prompts"),
        ({"gold_reward_funcs": ["exact_match"], "eval_on_start": False}, "eval_on_start: true"),
        ({"gold_reward_funcs": ["exact_match"], "watch_drift": 0.5}, "got 0.5; it must be a"),
        ({"gold_reward_funcs": ["exact_match"], "watch_every": 0}, "got 0; it must be a"),
        ({"gold_reward_funcs": ["exact_match"], "watch_every": True}, "watch_every=True is a bool"),
    ],
)
def test_options_of_a_config(tmp_path, options, says):
    with pytest.raises(ConfigError) as caught:
        PolicyConfig(str(tmp_path), **(QUIET | EVALUATES | options))
    assert says in str(caught.value)


def a_sum(completions, **kwargs):
    return count_a(completions)


async def later(completions, **kwargs):
    return count_a(completions)


def of_reference(completions, ref_per_token_logps, **kwargs):
    return count_a(completions)


@pytest.mark.parametrize(
    ("gold", "parts", "options", "says"),
    [
        (rising, {}, {}, r"'rising' is also trained on: it would measure nothing held out"),
        ([falling, rising], {"reward_funcs": [count_a, rising]}, {}, r"'rising' is also trained"),
        (later, {}, {}, r"'later' must be an ordinary function"),
        ("some/model", {}, {}, r"'some/model' must be an ordinary function"),
        (3, {}, {}, r"given as 3, a int"),
        (of_reference, {}, {}, r"asks for ref_per_token_logps"),
        (falling, {"eval_dataset": prompts(9)}, {}, r"has 9 prompts; a test .* needs 10"),
        (falling, {"eval_dataset": {"a": prompts(12), "b": prompts(12)}}, {}, r"has 2: a, b"),
        (
            falling,
            {"eval_dataset": None},
            {"eval_strategy": "no", "eval_on_start": False},
            r"with eval_dataset=None there are none: give an eval_dataset",
        ),
    ],
)
def test_what_leaves_nothing_to_measure_is_refused(
    model_path, tmp_path, gold, parts, options, says
):
    with pytest.raises(ConfigError, match=says):
        make(model_path, tmp_path, RewardHackingWatch(gold), parts=parts, **options)


def test_no_gold_reward_at_all():
    with pytest.raises(ConfigError, match=r"gold=\[\] holds no reward"):
        RewardHackingWatch([])


def test_all_that_is_missing_is_said_when_the_trainer_is_built(model_path, tmp_path):
    watch = RewardHackingWatch(rising, kl_budget=1)
    options = {"eval_strategy": "no", "eval_on_start": False, "beta": 0.0}
    with pytest.raises(ConfigError) as caught:
        make(model_path, tmp_path, watch, **options)
    title, *lines = str(caught.value).splitlines()
    assert (title, len(lines)) == ("RewardHackingWatch:", 4)
    for line, says in zip(
        lines,
        (
            "with eval_strategy='no' there are none",
            "Set eval_on_start=True",
            "A KL budget of 1 cannot be kept",
            "'rising' is also trained on",
        ),
        strict=True,
    ):
        assert says in line


@pytest.mark.parametrize(
    ("kind", "given", "missing"),
    [
        (PolicyTrainer, {"beta": 0.0}, True),
        (PolicyTrainer, {"beta": 0.1}, False),
        (RWRTrainer, {}, True),
        (RWRTrainer, {"log_kl": True}, False),
        (PolicyTrainer, {"beta": 0.0, "peft_config": LoraConfig(r=2)}, False),
    ],
)
def test_a_kl_budget_needs_a_reference_when_the_trainer_is_built(
    model_path, tmp_path, kind, given, missing
):
    parts = {name: given[name] for name in given if name == "peft_config"}
    options = {name: given[name] for name in given if name != "peft_config"}
    watch = RewardHackingWatch(falling, kl_budget=1)
    build = partial(make, model_path, tmp_path, watch, trainer=kind, parts=parts, **options)
    if missing:
        with pytest.raises(ConfigError, match=r"KL budget of 1 cannot be kept.*log_kl=True"):
            build()
    else:
        build()


def test_an_adapter_that_is_trained_further_has_no_reference_for_a_kl_budget(model_path, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(model_path)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    watch = RewardHackingWatch(falling, kl_budget=1)
    trainer = make(adapted, tmp_path, watch, beta=0.0)
    with pytest.raises(ConfigError, match=r"KL budget of 1 cannot be kept.*no reference"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_run_that_was_to_be_resumed_and_is_not_has_to_evaluate_before_training(
    model_path, tmp_path
):
    options = {"eval_on_start": False, "resume_from_checkpoint": "somewhere"}
    trainer = make(model_path, tmp_path, RewardHackingWatch(falling), **options)
    with pytest.raises(ConfigError, match="Set eval_on_start=True"):
        trainer.train()


def test_a_watch_that_is_added_later_is_checked_and_two_are_refused(model_path, tmp_path):
    trainer = make(model_path, tmp_path)
    with pytest.raises(ConfigError, match="also trained on"):
        trainer.add_callback(RewardHackingWatch(rising))
    trainer = make(model_path, tmp_path)
    trainer.add_callback(RewardHackingWatch(falling))
    with pytest.raises(ConfigError, match="Two reward-hacking watches"):
        trainer.add_callback(RewardHackingWatch(a_sum))


def test_another_trainer_is_refused(model_path, tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=1)
    model = AutoModelForCausalLM.from_pretrained(model_path)
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": [1]}])  # pyright: ignore
    trainer.add_callback(RewardHackingWatch(falling))
    with pytest.raises(ConfigError, match="policy trainers"):
        trainer.train()


def test_a_gold_reward_that_fails_is_named_before_any_step(model_path, tmp_path):
    def picky(completions, **kwargs):
        raise KeyError("no such answer")

    trainer = make(model_path, tmp_path, RewardHackingWatch(picky))
    with pytest.raises(RewardError, match=r"(?s)A gold reward failed.*'picky'.*no such answer"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert [func.__name__ for func in trainer.reward_funcs] == ["rising"], "as they were"


def test_a_gold_reward_that_scores_nothing(model_path, tmp_path):
    trainer = make(
        model_path, tmp_path, RewardHackingWatch(lambda completions, **_: [None] * len(completions))
    )
    with pytest.raises(RewardError, match="None for all 24 held-out completions"):
        trainer.train()


def test_gold_and_proxy_that_agree_on_everything_are_warned_of(model_path, tmp_path, caplog):
    parts = {"reward_funcs": count_a}
    make(model_path, tmp_path, RewardHackingWatch(a_sum), parts=parts, max_steps=1).train()
    assert any("measures nothing held out" in record.message for record in caplog.records)


def test_several_gold_rewards_are_added(model_path, tmp_path):
    def other(completions, **kwargs):
        return [None if i % 2 else 1.0 for i in range(len(completions))]

    watch = RewardHackingWatch([other, lambda completions, **_: [0.25] * len(completions)])
    make(model_path, tmp_path, watch, max_steps=1).train()
    # Half of the completions have 1.25, the other half 0.25.
    assert watch.history.evaluations[0]["gold_reward"][0] == pytest.approx(0.75)


def test_an_evaluation_on_other_prompts_is_kept_apart(model_path, tmp_path, caplog):
    """Of a higher gold reward, after training: neither best nor compared, and that is said."""

    def gold(prompts, trainer_state, **kwargs):
        return [5.0 if "e" in prompt else SCHEDULE[trainer_state.global_step] for prompt in prompts]

    watch = RewardHackingWatch(gold, drift=None)
    trainer = make(model_path, tmp_path, watch, max_steps=2)
    trainer.train()
    trainer.evaluate(Dataset.from_dict({"prompt": ["e"] * 12}))
    assert (watch.history.evaluations[-1]["gold_reward"][0], watch.history.best["step"]) == (5, 2)
    kept = json.loads((tmp_path / "out" / BEST / HACKING).read_text())
    assert kept["gold_reward"]["mean"] == pytest.approx(0.9)
    assert sum("is on other prompts" in record.message for record in caplog.records) == 1


RECIPE = """
trainer: rwr
output_dir: {folder}/run
model_name_or_path: {model}
bf16: false
dataset_name: {folder}/data
dataset_test_split: train
reward_funcs: [tests.unit.test_watch:rising]
gold_reward_funcs: [tests.unit.test_watch:falling]
watch_drift: null
num_generations: 4
num_generations_eval: 2
per_device_train_batch_size: 8
per_device_eval_batch_size: 8
max_completion_length: 4
max_steps: 4
eval_on_start: true
eval_strategy: steps
eval_steps: 1
save_strategy: "no"
report_to: none
disable_tqdm: true
"""


@pytest.fixture
def recipe(model_path, tmp_path) -> Path:
    (tmp_path / "data").mkdir()
    prompts(16).to_json(tmp_path / "data" / "train.jsonl")
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(folder=tmp_path, model=model_path))
    return file


def test_a_recipe_with_a_gold_reward(recipe, tmp_path, capsys):
    train(read_recipe(recipe, ["watch_action=stop"]))
    out, err = capsys.readouterr()
    assert "Reward-hacking watch, 16 held-out prompts" in out
    assert "stopped training, step 3: on 16 held-out prompts the gold reward" in err
    assert "--resume" in err
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    gold = [json.loads(line).get("eval_watch/gold_reward") for line in lines]
    assert [round(value, 1) for value in gold if value is not None] == SCHEDULE[:4]
    assert (tmp_path / "run" / BEST / "model.safetensors").is_file()
    assert (tmp_path / "run" / "model.safetensors").is_file()
    train(read_recipe(recipe, ["watch_action=stop"]), resume=True)
    out, err = capsys.readouterr()
    assert "stopped" not in err
    assert "Alarm, step 3" in out and (tmp_path / "run" / "checkpoint-3").is_dir()


def test_a_recipe_whose_gold_reward_is_trained_on(recipe):
    changed = recipe.read_text().replace("test_watch:falling", "test_watch:rising")
    recipe.write_text(changed)
    with pytest.raises(ConfigError, match="is also in reward_funcs"):
        build_trainer(read_recipe(recipe))


def test_the_warning_reaches_a_user_of_python(model_path, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        args = {"gold_reward_funcs": ["tests.unit.test_watch:falling"], "watch_drift": None}
        make(model_path, tmp_path, max_steps=3, **args).train()
    assert any("gold reward fell" in record.message for record in caplog.records)
