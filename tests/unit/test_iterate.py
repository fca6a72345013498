"""Rounds of collecting and fitting: what each starts from, what a kill leaves, what is refused."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.oracle.small import SHAPE, reward_of, save_reference
from tests.tiny import count_a, save_byte_llama, save_tiny_llama
from trl_ext.build import build_trainer
from trl_ext.errors import ConfigError, DataError, RunError
from trl_ext.iterate import iterate
from trl_ext.iterate.progress import Progress
from trl_ext.oracle import Enumeration
from trl_ext.recipe import Recipe, read_recipe
from trl_ext.rwr.offline import OfflineRWRTrainer

HERE = "tests.unit.test_iterate"


class Counted:
    """`count_a` that raises in its call number `at`; 0: never."""

    at = 0
    calls = 0

    def __call__(self, completions: list[str], **kwargs) -> list[float]:
        Counted.calls += 1
        if Counted.calls == Counted.at:
            raise KeyboardInterrupt
        return count_a(completions)


def counted() -> Counted:
    """A factory, as recipes name them."""
    return Counted()


def distinct(completions: list[str], **kwargs) -> list[float]:
    """The number of different characters."""
    return [float(len(set(completion))) for completion in completions]


def tabular(completion_ids: list[list[int]], **kwargs) -> list[float]:
    """The oracle's reward."""
    return [reward_of(1, ids) for ids in completion_ids]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


def recipe_in(
    folder: Path, model: str, name: str = "run", prompts: list[str] | None = None, **settings: Any
) -> Recipe:
    """Four prompts and eight completions of each; two steps a round."""
    rows = [{"prompt": prompt} for prompt in prompts or ["a", "ab", "c", "bc"]]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given: dict[str, Any] = {
        "trainer": "offline_rwr",
        "output_dir": str(folder / name),
        "model_name_or_path": model,
        "bf16": False,
        "dataset_name": str(folder / "prompts.jsonl"),
        "reward_funcs": [f"{HERE}:counted"],
        "beta": 0.1,
        "num_generations": 8,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "max_completion_length": 4,
        "learning_rate": 1e-2,
        "max_steps": 2,
        "save_steps": 1,
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    given = {key: value for key, value in (given | settings).items() if value is not None}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(given))
    return read_recipe(folder / f"{name}.yaml")


@pytest.fixture
def write(tmp_path, model) -> Callable[..., Recipe]:
    """write("run", beta=0.1) -> such a recipe in `tmp_path`."""
    return partial(recipe_in, tmp_path, model)


def rows_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def result(folder: Path, rounds: int = 2) -> dict[str, Any]:
    """What two runs that are the same have in common, byte for byte."""
    last = folder / f"round-{rounds}"
    [weights] = [*last.glob("model.safetensors"), *last.glob("adapter_model.safetensors")]
    return {
        "completions": [
            (folder / f"round-{k}" / "completions.jsonl").read_text() for k in range(1, rounds + 1)
        ],
        "finished": json.loads((folder / "iterate.json").read_text())["finished"],
        "weights": {name: tensor.tolist() for name, tensor in load_file(weights).items()},
        "steps": [row["step"] for row in rows_in(last / "metrics.jsonl")],
    }


def test_rounds_raise_the_reward_and_say_by_how_much(write, tmp_path):
    """32 prompts a round; 4 standard errors of the difference of two independent means."""
    prompts = ["a", "ab", "c", "bc"] * 8
    recipe = write(prompts=prompts, max_steps=None, num_train_epochs=1, save_strategy="no")
    rounds, table = iterate(recipe, 3)
    first, last = rounds[0].collected, rounds[2].collected
    assert [each.number for each in rounds] == [1, 2, 3]
    assert first.half_width and last.half_width
    error = ((first.half_width / 1.96) ** 2 + (last.half_width / 1.96) ** 2) ** 0.5
    assert last.reward - first.reward > 4 * error
    collected = rows_in(tmp_path / "run/round-3/completions.jsonl")
    assert last.reward == pytest.approx(sum(row["reward"] for row in collected) / len(collected))
    assert all(1 <= (each.effective_sample_size or 0) <= 8 for each in rounds)
    assert f"{last.reward:.3f}" in table and " - " in table, "no held-out prompts"
    saved = json.loads((tmp_path / "run/iterate.json").read_text())
    assert saved["rounds"] == len(saved["finished"]) == 3 and saved["reference"] == "moving"
    assert saved["finished"][0]["collected"]["reward"] == first.reward
    for number in (1, 2, 3):
        folder = tmp_path / f"run/round-{number}"
        for file in ("completions.jsonl", "recipe.yaml", "environment.json", "metrics.jsonl",
                     "model.safetensors"):  # fmt: skip
            assert (folder / file).is_file(), file


def test_a_round_samples_the_policy_before_it_and_trains_on_from_there(write, tmp_path, model):
    """log-probabilities of round 2 by a forward pass of what round 1 saved."""
    iterate(write(), 2)
    second = read_recipe(tmp_path / "run/round-2/recipe.yaml")
    assert second.values["model_name_or_path"] == str(tmp_path / "run/round-1")
    assert "importance_weights" not in second.values
    policy: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "run/round-1")
    rows = rows_in(tmp_path / "run/round-2/completions.jsonl")
    for row in rows[:8]:
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        logps = policy(ids).logits[0].double().log_softmax(-1)[len(row["prompt_ids"]) - 1 : -1]
        logp = logps.gather(1, torch.tensor(row["completion_ids"])[:, None]).sum()
        assert row["logp"] == pytest.approx(logp.item(), abs=1e-4)
    firsts = [row["completion"] for row in rows_in(tmp_path / "run/round-1/completions.jsonl")]
    assert firsts != [row["completion"] for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model):
    """Two rounds without interruption, in `run`; to be read only."""
    folder = tmp_path_factory.mktemp("whole")
    iterate(recipe_in(folder, model), 2)
    return folder / "run"


# Calls of the reward: two batches of two prompts a round.
@pytest.mark.parametrize("call", [2, 3])
def test_killed_while_collecting_it_ends_with_the_same(write, tmp_path, whole, call):
    Counted.calls, Counted.at = 0, call
    with pytest.raises(KeyboardInterrupt):
        iterate(write(), 2)
    Counted.at = 0
    iterate(write(), 2, resume=True)
    assert result(tmp_path / "run") == result(whole)


# Steps over both rounds, two each.
@pytest.mark.parametrize("step", [2, 3])
def test_killed_while_fitting_it_ends_with_the_same(write, tmp_path, whole, step, monkeypatch):
    steps = []
    training_step = OfflineRWRTrainer.training_step

    def killed(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == step:
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    def counting(self, *args, **kwargs):
        steps.append(1)
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(OfflineRWRTrainer, "training_step", killed)
    with pytest.raises(KeyboardInterrupt):
        iterate(write(), 2)
    monkeypatch.setattr(OfflineRWRTrainer, "training_step", counting)
    Counted.calls = 0
    iterate(write(), 2, resume=True)
    assert Counted.calls == (2 if step < 3 else 0), "what is collected is not collected again"
    assert len(steps) == step + 4 - (step - 1), "a step that is saved is not taken again"
    assert result(tmp_path / "run") == result(whole)


@pytest.mark.parametrize("at", [1, 3])
def test_killed_between_two_parts_it_ends_with_the_same(write, tmp_path, whole, at, monkeypatch):
    """Before anything, and behind the second fit, which is not yet written down."""
    calls = []
    write_down = Progress.write

    def killed(self, *args):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return write_down(self, *args)

    monkeypatch.setattr(Progress, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        iterate(write(), 2)
    monkeypatch.undo()
    iterate(write(), 2, resume=True)
    assert result(tmp_path / "run") == result(whole)


def test_more_rounds_go_on_behind_the_last(write, tmp_path, whole):
    iterate(write(), 1)
    Counted.calls = 0
    rounds, _ = iterate(write(), 2, resume=True)
    assert Counted.calls == 2, "two batches of the second round"
    assert [each.number for each in rounds] == [1, 2]
    assert result(tmp_path / "run") == result(whole)
    again, _ = iterate(write(), 1, resume=True)
    assert again == rounds and Counted.calls == 2, "what is finished stays"


def test_an_interrupted_run_says_how_to_go_on(write, tmp_path, capsys):
    Counted.calls, Counted.at = 0, 2
    with pytest.raises(KeyboardInterrupt):
        iterate(write(), 2)
    Counted.at = 0
    said = capsys.readouterr().err
    assert f"iterate {tmp_path / 'run/recipe.yaml'} --rounds 2 --resume" in said
    iterate(read_recipe(tmp_path / "run/recipe.yaml"), 2, resume=True)


def test_the_held_out_split_is_sampled_before_and_after(write, tmp_path, monkeypatch):
    folder = save_byte_llama(tmp_path / "bytes")
    recipe = write(
        model_name_or_path=folder, dataset_name="char_reverse", eval_on_start=True, beta=0.5,
        dataset_kwargs={"size": 4, "eval_size": 3}, reward_funcs=[f"{HERE}:distinct"],
    )  # fmt: skip
    rounds, table = iterate(recipe, 2)
    before, middle, after = (
        rows_in(tmp_path / "run" / path / "held_out.jsonl") for path in ("", "round-1", "round-2")
    )
    for rows, mean in (
        (before, rounds[0].held_out_before),
        (middle, rounds[0].held_out_after),
        (middle, rounds[1].held_out_before),
        (after, rounds[1].held_out_after),
    ):
        assert mean and mean.prompts == 3
        assert mean.reward == pytest.approx(sum(row["reward"] for row in rows) / 24)
    assert len({rounds[0].held_out_before, rounds[0].held_out_after, rounds[1].held_out_after}) == 3
    assert [row["prompt"] for row in before] == [row["prompt"] for row in after]
    trained = {row["prompt"] for row in rows_in(tmp_path / "run/round-1/completions.jsonl")}
    assert not trained & {row["prompt"] for row in before}
    evaluations = rows_in(tmp_path / "run/evaluations.jsonl")
    assert [row["step"] for row in evaluations] == [0, 1, 2]
    assert evaluations[2]["rewards"][1] == [row["reward"] for row in after[8:16]]
    assert "held-out" in table and "paired over 3 prompts" in table


def test_an_adapter_is_trained_on_nothing_is_merged_and_a_kill_is_survived(write, tmp_path, model):
    lora = {"use_peft": True, "lora_r": 2, "lora_target_modules": ["q_proj", "v_proj"]}
    iterate(write(**lora), 2)
    first, second = (
        load_file(tmp_path / f"run/round-{k}/adapter_model.safetensors") for k in (1, 2)
    )
    assert (
        first.keys() == second.keys() and not (tmp_path / "run/round-2/model.safetensors").exists()
    )
    config = json.loads((tmp_path / "run/round-2/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == model and config["r"] == 2
    # One more step of the same adapter: close to it, and not to a new one, whose B is 0.
    for name, weight in first.items():
        if "lora_B" in name:
            assert 0 < (second[name] - weight).norm() < 2 * weight.norm()
    Counted.calls, Counted.at = 0, 4
    with pytest.raises(KeyboardInterrupt):
        iterate(write("cut", **lora), 2)
    Counted.at = 0
    iterate(write("cut", **lora), 2, resume=True)
    assert result(tmp_path / "cut") == result(tmp_path / "run")


def test_the_weights_of_a_fixed_reference_are_enumerated_ones(write, tmp_path):
    """softmax over a group of r/β + log π_0 − log π_1, all three of the table of completions.

    A group of G has weights of sum G in the column `weight`, whose mean is 1.
    """
    start = save_reference(tmp_path / "tabular")
    beta = 0.5
    recipe = write(
        model_name_or_path=start, prompts=["a"] * 4, reward_funcs=[f"{HERE}:tabular"],
        reference="fixed", beta=beta, max_completion_length=SHAPE.max_completion_length,
        learning_rate=0.3, drop_uniform_groups=False,
    )  # fmt: skip
    iterate(recipe, 2)
    space = Enumeration(SHAPE)  # its end token is 0
    models: list[Any] = [
        AutoModelForCausalLM.from_pretrained(folder) for folder in (start, tmp_path / "run/round-1")
    ]
    of_first, of_second = (space.logps(each)[0].double().detach() for each in models)
    assert (of_first - of_second).abs().max() > 0.1, "the policy has moved"
    rows = rows_in(tmp_path / "run/round-2/completions.jsonl")
    ids = [(row["completion_ids"] + [0, 0])[: SHAPE.max_completion_length] for row in rows]
    found = space.index(torch.tensor(ids))
    scores = torch.tensor([row["reward"] / beta for row in rows]).double()
    scores = scores + (of_first - of_second)[found]
    expected = scores.view(4, 8).softmax(1).flatten() * 8
    trainer: Any = build_trainer(read_recipe(tmp_path / "run/round-2/recipe.yaml"))
    weights = torch.tensor(trainer.train_dataset["weight"]).double()
    assert torch.allclose(weights, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"trainer": "rwr"}, "trainer: rwr cannot be iterated"),
        ({"reference": "fixed", "temperature": 0.7}, "at temperature 1"),
        ({"reference": "fixed", "beta": 0.0}, "best of n has no importance weights"),
        ({"reference": "fixed", "top_p": 0.9}, "top_p=0.9 with reference='fixed'"),
        ({"importance_weights": True}, "importance_weights=True"),
        ({"push_to_hub": True}, "push_to_hub=True"),
        ({"baseline": "value"}, "needs the column 'value'"),
        ({"reward_funcs": None}, "needs a reward"),
        ({"eval_on_start": True}, "test split is asked for"),
        ({"min_effective_sample_size": 8.5}, "of num_generations=8 no more"),
    ],
)
def test_refusals_leave_nothing(write, tmp_path, settings, says):
    with pytest.raises(ConfigError, match=says):
        iterate(write(**settings), 2)
    assert not (tmp_path / "run").exists()


def test_a_round_that_cannot_be_fitted_says_what_is_finished(write, tmp_path):
    recipe = write(reward_funcs=[f"{HERE}:indifferent"])
    with pytest.raises(
        DataError, match=r"(?s)no row is left.*0 of 2 rounds are finished.*--resume"
    ):
        iterate(recipe, 2)
    assert (tmp_path / "run/round-1/completions.jsonl").is_file()


@pytest.mark.parametrize(
    ("column", "settings", "says"),
    [
        ({"weight": 1}, {}, "the column 'weight', which a fit does not take"),
        ({"input_ids": [1]}, {}, "the column 'input_ids'"),
        ({"value": None}, {"baseline": "value"}, "row 3: value is None"),
    ],
)
def test_columns_that_a_fit_refuses_are_refused_before_sampling(
    write, tmp_path, column, settings, says
):
    recipe = write(**settings)
    rows = rows_in(tmp_path / "prompts.jsonl")
    fine = {"value": 0.5} if settings else column
    rows = [row | (fine if number < 3 else column) for number, row in enumerate(rows)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=says):
        iterate(recipe, 1)
    assert not (tmp_path / "run").exists()


class Satisfied:
    """`count_a` in the first round; from then on all is equally good, but what `apart` says."""

    rounds_before = 1
    calls = 0
    apart: frozenset[int] = frozenset()

    def __call__(self, completions: list[str], **kwargs) -> list[float]:
        Satisfied.calls += 1
        if Satisfied.calls <= 2:
            return count_a(completions)
        return [1.0 + (len(completions) in self.apart) * (i % 2) for i in range(len(completions))]


def satisfied() -> Satisfied:
    """A factory."""
    return Satisfied()


@pytest.fixture
def stuck(write, tmp_path, monkeypatch):
    """Two rounds asked for, of which the second has uniform groups only; its recipe."""
    monkeypatch.setattr(Satisfied, "calls", 0)
    settings = {"reward_funcs": [f"{HERE}:satisfied"]}
    with pytest.raises(DataError) as error:
        iterate(write(**settings), 2)
    return partial(write, **settings), str(error.value)


def test_a_round_of_uniform_groups_says_which_and_what_may_be_changed(stuck, tmp_path):
    _, said = stuck
    assert said.startswith("Round 2: train_dataset: no row is left. 4 groups have rewards")
    first = tmp_path / "run/round-1"
    assert f"1 of 2 rounds are finished, the policy of the last one is in {first}." in said
    assert f"iterate {tmp_path / 'run/recipe.yaml'} --rounds 2 --resume KEY=VALUE" in said
    assert "num_generations, temperature, and the round is collected anew" in said
    assert "drop_uniform_groups, " in said and " fitted anew" in said
    assert (first / "model.safetensors").is_file()


def test_a_stuck_round_goes_on_with_another_fit_of_the_same_samples(stuck, tmp_path, capsys):
    write, _ = stuck
    samples = (tmp_path / "run/round-2/completions.jsonl").read_text()
    first = (tmp_path / "run/round-1/model.safetensors").read_bytes()
    calls = Satisfied.calls
    rounds, _ = iterate(write(drop_uniform_groups=False), 2, resume=True)
    assert [each.number for each in rounds] == [1, 2]
    assert Satisfied.calls == calls, "nothing is collected again"
    assert (tmp_path / "run/round-2/completions.jsonl").read_text() == samples
    assert (tmp_path / "run/round-1/model.safetensors").read_bytes() == first
    assert "drop_uniform_groups: false" in (tmp_path / "run/round-2/recipe.yaml").read_text()
    assert "drop_uniform_groups" not in (tmp_path / "run/round-1/recipe.yaml").read_text()
    assert "round-2 is fitted anew: another drop_uniform_groups" in capsys.readouterr().err


def test_a_stuck_round_goes_on_with_other_samples(stuck, tmp_path, monkeypatch):
    """Batches of 16 are all alike; of 4 completions a prompt there are 4 batches of 4 of them."""
    write, _ = stuck
    monkeypatch.setattr(Satisfied, "apart", frozenset({4}))
    more = {"num_generations": 4, "per_device_eval_batch_size": 4}
    rounds, _ = iterate(write(**more), 2, resume=True)
    assert [each.number for each in rounds] == [1, 2]
    assert len(rows_in(tmp_path / "run/round-2/completions.jsonl")) == 4 * 4
    assert len(rows_in(tmp_path / "run/round-1/completions.jsonl")) == 4 * 8


def test_another_setting_of_a_fit_does_not_go_on_from_its_checkpoint(write, tmp_path, monkeypatch):
    """Killed in the second of two steps: the same setting takes one step more, another both."""
    training_step, steps = OfflineRWRTrainer.training_step, []

    def killed(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(OfflineRWRTrainer, "training_step", killed)
    with pytest.raises(KeyboardInterrupt):
        iterate(write(), 1)
    assert (tmp_path / "run/round-1/checkpoint-1").is_dir()
    iterate(write(learning_rate=1e-3), 1, resume=True)
    assert len(steps) == 2 + 2
    rates = [row.get("learning_rate") for row in rows_in(tmp_path / "run/round-1/metrics.jsonl")]
    assert max(rate for rate in rates if rate is not None) == pytest.approx(1e-3)


def test_the_temperature_stays_where_held_out_rewards_are_compared(write, tmp_path):
    folder = save_byte_llama(tmp_path / "bytes")
    settings = {
        "model_name_or_path": folder, "dataset_name": "char_reverse", "eval_on_start": True,
        "dataset_kwargs": {"size": 4, "eval_size": 3}, "reward_funcs": [f"{HERE}:distinct"],
        "max_steps": 1,
    }  # fmt: skip
    iterate(write(**settings), 1)
    with pytest.raises(ConfigError, match=r"temperature: was not set, now 1\.5"):
        iterate(write(temperature=1.5, **settings), 2, resume=True)


def test_repeated_rows_are_told_once_in_all_rounds(write, caplog):
    """Eight completions of at most four tokens of six, of a model with strong preferences."""
    caplog.set_level("WARNING")
    iterate(write(max_steps=1, max_completion_length=1), 3)
    assert sum("repeat a completion" in record.message for record in caplog.records) == 1


def test_a_full_disk_between_two_parts_says_how_to_go_on(write, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device", "iterate.json")

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "write", full)
        with pytest.raises(RunError, match=r"(?s)No space left on device.*Go on with: .*--resume"):
            iterate(write(max_steps=1), 1)
    iterate(write(max_steps=1), 1, resume=True)


def indifferent(completions: list[str], **kwargs) -> list[float]:
    """Likes all alike."""
    return [1.0] * len(completions)


@pytest.mark.parametrize("rounds", [0, -1, True, 1.5])
def test_rounds_are_a_count(write, rounds):
    with pytest.raises(ConfigError, match="must be a whole number"):
        iterate(write(), rounds)


def test_another_recipe_does_not_go_on(write, tmp_path):
    iterate(write(max_steps=1), 1)
    before = (tmp_path / "run/recipe.yaml").read_text()
    goes_on = f"iterate {tmp_path / 'run/recipe.yaml'} --rounds 2 --resume"
    with pytest.raises(ConfigError, match=rf"(?s)beta: was 0\.1, now 0\.2.* {goes_on}"):
        iterate(write(max_steps=1, beta=0.2), 2, resume=True)
    assert (tmp_path / "run/recipe.yaml").read_text() == before
    with pytest.raises(ConfigError, match="holds another run"):
        iterate(write(max_steps=1), 1)
    with pytest.raises(ConfigError, match="model_name_or_path"):
        inside = str(tmp_path / "run/round-1")
        iterate(write(max_steps=1, model_name_or_path=inside), 1, overwrite=True)
    iterate(write(max_steps=1, beta=0.2), 1, overwrite=True)
    assert "beta: 0.2" in (tmp_path / "run/round-1/recipe.yaml").read_text()


def test_a_damaged_record_of_rounds_is_named(write, tmp_path):
    iterate(write(max_steps=1), 1)
    (tmp_path / "run/iterate.json").write_text('{"rounds": 1}')
    with pytest.raises(RunError, match=r"iterate\.json does not say which rounds are finished"):
        iterate(write(max_steps=1), 2, resume=True)
