"""`read_recipe` as a whole: findings together, groups, rewards, group sizes, and writing back."""

import pytest

from trl_ext.errors import ConfigError, UnknownNameError
from trl_ext.recipe import read_recipe


def findings_of(path, *overrides) -> list[str]:
    with pytest.raises(ConfigError) as error:
        read_recipe(path, overrides)
    return [line.strip() for line in str(error.value).splitlines()[1:]]


def test_values_are_split_by_dataclass(write):
    write("r.yaml", "lora_r: 4\nbeta: 1\nreward_funcs: accuracy_reward\nstreaming: true\n")
    recipe = read_recipe("r.yaml")
    assert recipe.groups == {
        "script": {"dataset_name": "some/data", "reward_funcs": ["accuracy_reward"]},
        "model": {"model_name_or_path": "some/model", "lora_r": 4},
        "mixture": {"streaming": True},
        "config": {"output_dir": "out", "beta": 1.0},
    }
    assert recipe.trainer_target == "trl_ext.rwr.trainer:RWRTrainer"


def test_dataset_kwargs_of_sft_go_where_they_are_read(write):
    # SFTConfig has a field of that name, and reads one entry of it.
    write("r.yaml", "dataset_kwargs: {size: 3, skip_prepare_dataset: true}\n")
    groups = read_recipe("r.yaml", ["trainer=sft"]).groups
    assert groups["script"]["dataset_kwargs"] == {"size": 3}
    assert groups["config"]["dataset_kwargs"] == {"skip_prepare_dataset": True}


def test_a_recipe_of_a_trl_user_passes(write):
    write(
        "grpo.yaml",
        """\
trainer: rwr
model_name_or_path: Qwen/Qwen2.5-0.5B-Instruct
model_revision: main
dtype: bfloat16
attn_implementation: flash_attention_2
use_peft: true
lora_target_modules: all-linear
dataset_name: trl-lib/DeepMath-103K
dataset_streaming: false
reward_funcs:
  - think_format_reward
  - my_lib.rewards.custom_reward
output_dir: out
bf16: true
learning_rate: 1.0e-05
lr_scheduler_type: cosine
gradient_checkpointing: yes
gradient_checkpointing_kwargs:
  use_reentrant: false
per_device_train_batch_size: 4
gradient_accumulation_steps: 4
num_generations: 8
max_completion_length: 256
logging_steps: 1
save_strategy: "no"
report_to: [trackio]
log_completions: true
use_vllm: false
env:
  TOKENIZERS_PARALLELISM: false
accelerate_config: zero2
num_processes: 2
""",
        least=False,
    )
    recipe = read_recipe("grpo.yaml")
    assert recipe.launcher == {"accelerate_config": "zero2", "num_processes": 2}
    assert recipe.env == {"TOKENIZERS_PARALLELISM": "false"}
    assert recipe.values["reward_funcs"] == [
        "think_format_reward",
        "my_lib.rewards:custom_reward",
    ]


def test_everything_wrong_is_reported_at_once(write):
    text = "seed: 1\nbeta: x\nlerning_rate: 1\nseed: 2\ndtype: bf16\nreward_funcs: [nope]\n"
    write("r.yaml", text)
    lines = findings_of("r.yaml", "max_steps=a", "num_processes=0")
    assert [line.split(": ")[:2] for line in lines] == [
        ["r.yaml:6", "beta"],
        ["r.yaml:7", "lerning_rate"],
        ["r.yaml:8", "seed"],
        ["r.yaml:9", "dtype"],
        ["r.yaml:10", "reward_funcs"],
        ["command line", "num_processes"],
        ["command line", "max_steps"],
    ]


def test_an_unknown_trainer_does_not_hide_the_rest(write):
    # Without its config, keys are checked that some trainer has, and those of the other groups.
    write("r.yaml", "lerning_rate: 1\nbeta: x\nlora_r: a\n")
    lines = findings_of("r.yaml", "trainer=rwx")
    assert [line.split(": ")[:2] for line in lines] == [
        ["command line", "trainer"],
        ["r.yaml:5", "lerning_rate"],
        ["r.yaml:7", "lora_r"],
    ]
    assert "There is no trainer called 'rwx'. Did you mean 'rwr'?" in lines[0]


def test_a_key_of_another_trainer(write):
    write("r.yaml", "num_generations: 8\n")
    (line,) = findings_of("r.yaml", "trainer=sft")
    assert "r.yaml:5: num_generations: unknown key, with the value 8. It belongs to the" in line
    assert "rwr" in line


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("lerning_rate", "learning_rate"),
        ("learning-rate", "learning_rate"),
        ("num_generation", "num_generations"),
        ("datset_name", "dataset_name"),
        ("extend", "extends"),
        ("num_proceses", "num_processes"),
    ],
)
def test_the_nearest_key(write, key, near):
    write("r.yaml", f"{key}: 1\n")
    (line,) = findings_of("r.yaml")
    assert line.startswith(f"r.yaml:5: {key}: unknown key, with the value 1.")
    assert line.endswith(f"Did you mean {near}?")


def test_what_a_run_needs(write):
    write("r.yaml", "trainer: rwr\noutput_dir:\n", least=False)
    lines = findings_of("r.yaml")
    assert [line.partition(": missing")[0] for line in lines] == [
        "r.yaml: model_name_or_path",
        "r.yaml: dataset_name or datasets",
        "r.yaml:2: output_dir",
    ]


def test_a_mixture_is_data_too(write):
    write(
        "r.yaml",
        "trainer: rwr\nmodel_name_or_path: m\noutput_dir: o\ndatasets: [{path: p}]\n",
        least=False,
    )
    assert read_recipe("r.yaml").groups["mixture"] == {"datasets": [{"path": "p"}]}


def test_a_mixture_beside_a_dataset(write):
    write("r.yaml", "datasets: [{path: p}]\n")
    (line,) = findings_of("r.yaml")
    assert line.startswith("r.yaml:5: datasets: given beside dataset_name")
    assert read_recipe("r.yaml", ["dataset_name=null"]).groups["mixture"]["datasets"]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("reward_funcs: []", "r.yaml:5: reward_funcs: an empty list"),
        ("reward_weights: [1]", "r.yaml:5: reward_weights: the number of weights is 1, and that"),
        (
            "reward_funcs: [exact_match]\nreward_model_name_or_path: m\nreward_weights: [1]",
            "r.yaml:7: reward_weights: the number of weights is 1, and that of rewards 2",
        ),
        ("reward_funcs: []\nreward_model_name_or_path: m\nreward_weights: [1]", None),
        ("reward_funcs: [exact_match, accuracy_reward]\nreward_weights: [1, 0]", None),
    ],
)
def test_a_weight_for_each_reward(write, lines, says):
    write("r.yaml", lines + "\n")
    if says is None:
        assert read_recipe("r.yaml")
    else:
        assert any(line.startswith(says) for line in findings_of("r.yaml"))


def test_a_trainer_without_rewards_needs_none(write):
    write("r.yaml", "reward_funcs: []\n")
    assert read_recipe("r.yaml", ["trainer=sft"])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('"A=B": 1', "'A=B' cannot name a variable"),
        ('"": 1', "'' cannot name a variable"),
        ('"A\\0": 1', "cannot name a variable"),
        ('A: "x\\0"', "got 'x\\x00'; NUL"),
        ('A: "\\ud800"', "halves of a character"),
    ],
)
def test_a_variable_that_no_system_takes(write, line, says):
    write("r.yaml", f"env:\n  {line}\n")
    (found,) = findings_of("r.yaml")
    assert found.startswith("r.yaml:6: env: ") and says in found


def test_what_cannot_be_read_is_not_missing_too(write):
    write("r.yaml", "trainer: !!int a\noutput_dir: !!int b\n", least=False)
    lines = findings_of("r.yaml", "model_name_or_path=m", "dataset_name=d", "seed=x")
    assert [line.split(": ")[:2] for line in lines] == [
        ["r.yaml:1", "trainer"],
        ["r.yaml:2", "output_dir"],
    ]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("per_device_train_batch_size: 0", 1),
        ("num_generations: 0", 1),
        ("eval_on_start: true\nper_device_eval_batch_size: 0\nnum_generations_eval: 0", 2),
        ("num_processes: 0\neval_on_start: true\nper_device_eval_batch_size: 3", 1),
    ],
)
def test_a_batch_of_wrong_numbers_is_not_divided(write, text, count):
    write("r.yaml", text + "\n")
    lines = findings_of("r.yaml")
    assert len(lines) == count
    assert not any("does not divide" in line for line in lines)


def test_an_option_that_the_trainer_refuses(write):
    write("r.yaml", "loss_type: grpo\nepsilon: 0.2\n")  # 0.2 is the default, and says nothing
    (line,) = findings_of("r.yaml")
    assert line.startswith("r.yaml:5: loss_type: got 'grpo', which does nothing here: ")


@pytest.mark.parametrize(
    ("text", "batch", "near"),
    [
        # 8 rows × 1 process × 1 step, TRL's defaults.
        ("num_generations: 6", "8 (per_device_train_batch_size 8 × 1 process", "4 or 8"),
        ("num_generations: 16", "8 (", "8"),
        ("num_generations: 3\ngeneration_batch_size: 9", None, None),
        ("num_generations: 5\ngeneration_batch_size: 12", "12;", "4 or 6"),
        # 2 × 3 × 4 = 24; steps_per_generation stands before gradient_accumulation_steps.
        (
            "num_generations: 5\nper_device_train_batch_size: 2\nnum_processes: 3\n"
            "steps_per_generation: 4\ngradient_accumulation_steps: 100",
            "24 (per_device_train_batch_size 2 × 3 processes × steps_per_generation 4)",
            "4 or 6",
        ),
        # TRL's zero1 asks for 8 processes: 8 × 8 = 64.
        ("num_generations: 24\naccelerate_config: zero1", "64 (", "16 or 32"),
        ("num_generations: 32\naccelerate_config: zero1", None, None),
        # Ours for as many as there are devices.
        ("num_generations: 24\naccelerate_config: zero2", None, None),
    ],
)
def test_a_group_divides_the_batch(write, monkeypatch, text, batch, near):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    write("r.yaml", text + "\n")
    if batch is None:
        read_recipe("r.yaml")
        return
    (line,) = findings_of("r.yaml")
    assert f"does not divide the generation batch of {batch}" in line
    assert line.endswith(f"nearest group size: {near}")


def test_groups_are_not_counted_where_training_samples_nothing(write):
    """offline_rwr has num_generations for `collect`; its batches are of rows, not of groups."""
    text = "num_generations: 8\nper_device_train_batch_size: 4\nper_device_eval_batch_size: 3\n"
    write("r.yaml", text + "eval_on_start: true\n")
    assert read_recipe("r.yaml", ["trainer=offline_rwr"]).trainer == "offline_rwr"
    assert len(findings_of("r.yaml")) == 1  # rwr itself


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("watch_action: stop", "r.yaml:5: watch_action: got 'stop', which does nothing without"),
        ("gold_reward_funcs: [vader]", "r.yaml:5: gold_reward_funcs: is measured on held-out"),
        ("gold_reward_funcs: [vadr]", "r.yaml:5: gold_reward_funcs: There is no reward called"),
        (
            "watch_drift: 0.5\ngold_reward_funcs: [vader]\neval_on_start: true\n"
            "eval_strategy: steps",
            "r.yaml:5: watch_drift: got 0.5; it must be a factor above 1",
        ),
    ],
)
def test_the_watch_is_checked_before_a_run(write, text, says):
    write("r.yaml", text + "\n")
    (line,) = findings_of("r.yaml")
    assert line.startswith(says)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("num_generations: 4\neval_on_start: true\nper_device_eval_batch_size: 6", "6 (per"),
        ("num_generations: 4\neval_strategy: steps\nper_device_eval_batch_size: 6", "6 (per"),
        ("num_generations: 4\nper_device_eval_batch_size: 6", None),
        ("eval_on_start: true\nper_device_eval_batch_size: 6\nnum_generations_eval: 3", None),
    ],
)
def test_an_evaluation_group_divides_its_batch(write, text, problem):
    write("r.yaml", text + "\n")
    if problem is None:
        read_recipe("r.yaml")
        return
    (line,) = findings_of("r.yaml")
    assert f"does not divide the evaluation batch of {problem}" in line
    assert line.endswith("nearest batch size: 8")


def test_launched_processes_count(write, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    write("r.yaml", "num_generations: 24\n")
    assert read_recipe("r.yaml").values["num_generations"] == 24  # 8 × 3


@pytest.mark.parametrize("rewards", ["[{x: 1}]", "[{name: 3}]", "[nope]", "[{name: nope}]"])
def test_bad_rewards(write, rewards):
    write("r.yaml", f"reward_funcs: {rewards}\n")
    (line,) = findings_of("r.yaml")
    assert line.startswith("r.yaml:5: reward_funcs: The") or "There is no reward" in line


def test_rewards_of_every_form(write):
    write("r.yaml", "reward_funcs: [accuracy_reward, my.module:f, {name: my.module.g, k: 1}]\n")
    assert read_recipe("r.yaml").values["reward_funcs"] == [
        "accuracy_reward",
        "my.module:f",
        {"name": "my.module:g", "k": 1},
    ]


def test_a_trainer_of_ones_own(write, monkeypatch):
    code = """\
from dataclasses import dataclass, field
from typing import Literal
import not_installed_anywhere
from trl import GRPOConfig, GRPOTrainer

Colour = Literal["red", "blue"]

@dataclass
class MyConfig(GRPOConfig):
    colour: Colour = "red"
    hidden: int = field(default=1, init=False)

class MyTrainer(GRPOTrainer):
    pass

raise RuntimeError("reading a recipe must not run this")
"""
    write("my_code.py", code, least=False)
    monkeypatch.syspath_prepend(".")
    write("r.yaml", "colour: green\nhidden: 2\n")
    lines = findings_of("r.yaml", "trainer=my_code:MyTrainer")
    assert lines[0] == "r.yaml:5: colour: got 'green'; allowed: one of red, blue."
    assert lines[1].startswith("r.yaml:6: hidden: unknown key")
    write("r.yaml", "colour: blue\n")
    recipe = read_recipe("r.yaml", ["trainer=my_code:MyTrainer"])
    assert recipe.groups["config"]["colour"] == "blue"


def test_a_trainer_that_is_not_python(write, monkeypatch):
    write("broken_code.py", "import os\nclass MyTrainer(:\n", least=False)
    monkeypatch.syspath_prepend(".")
    write("r.yaml", "")
    (line,) = findings_of("r.yaml", "trainer=broken_code:MyTrainer")
    assert "broken_code.py:2: this is not Python: " in line


def test_a_base_that_is_not_installed(write, monkeypatch):
    code = """\
from dataclasses import dataclass
import not_installed

@dataclass
class ACfg(not_installed.Config):
    x: int = 1

class AConfig(ACfg): ...
class ATrainer: ...
"""
    write("base_code.py", code, least=False)
    monkeypatch.syspath_prepend(".")
    write("r.yaml", "")
    (line,) = findings_of("r.yaml", "trainer=base_code:ATrainer")
    assert "the fields of ACfg cannot be read" in line
    assert "not_installed.Config cannot be found" in line


@pytest.mark.parametrize("target", ["no_such_package:XTrainer", "trl_ext.errors:NoTrainer"])
def test_a_trainer_without_source(write, target):
    write("r.yaml", "")
    (line,) = findings_of("r.yaml", f"trainer={target}")
    assert f"The source of the trainer '{target}' cannot be found" in line


def test_a_trainer_without_a_config(write):
    write("r.yaml", "")
    (line,) = findings_of("r.yaml", "trainer=trl_ext.errors:DataError")
    assert "has no config: a trainer is called <Name>Trainer" in line


def test_to_yaml_reads_back(write):
    write("base.yaml", "env: {A: 1e-5}\nbeta: .inf\n", least=False)
    text = "extends: base.yaml\nrun_name: '010'\nnum_processes: 1\nsave_strategy: no\n"
    write("r.yaml", text + "stop_strings: [\"\\n\", 'no', ' # x']\nlearning_rate: 1e-5\n")
    recipe = read_recipe("r.yaml")
    write("again.yaml", recipe.to_yaml(), least=False)
    again = read_recipe("again.yaml")
    for part in ("trainer", "trainer_target", "values", "env", "launcher", "groups"):
        assert getattr(again, part) == getattr(recipe, part)
    assert again.values["stop_strings"] == ["\n", "no", " # x"]


def test_defaults_are_those_of_the_classes(write):
    write("r.yaml", "")
    defaults = read_recipe("r.yaml").defaults()
    assert defaults["learning_rate"] == 1e-6  # GRPOConfig over TrainingArguments' 5e-5
    assert defaults["lora_r"] == 16
    assert defaults["drop_uniform_groups"] is True
    assert "output_dir" not in defaults


def test_a_missing_recipe_names_its_neighbours(write):
    write("quickstart.yaml", "")
    with pytest.raises(UnknownNameError, match=r"There is no recipe quikstart.*quickstart.yaml"):
        read_recipe("quikstart.yaml")


@pytest.mark.parametrize("text", ["", "# only a comment\n"])
def test_an_empty_file(write, text):
    write("r.yaml", text, least=False)
    assert findings_of("r.yaml") == ["r.yaml: the file is empty; a recipe is lines 'key: value'"]


def test_extends_alone_still_needs_everything(write):
    write("r.yaml", "extends: []\n", least=False)
    assert [line.split(": ")[1] for line in findings_of("r.yaml")] == [
        "trainer",
        "model_name_or_path",
        "output_dir",
        "dataset_name or datasets",
    ]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("kl_estimator: k1\nkl_is_correction: false", "r.yaml:6: kl_estimator: k1 in the loss"),
        ("kl_estimator: k9", "r.yaml:6: kl_estimator: There is no KL estimator called 'k9'"),
        ("kl_controller: adaptive", "r.yaml:6: kl_target: kl_controller: adaptive needs a target"),
        ("kl_placement: lose", "r.yaml:6: kl_placement: got 'lose'"),
    ],
)
def test_an_unsound_penalty_is_found_before_anything_is_imported(write, lines, says):
    least = "model_name_or_path: m\ndataset_name: d\noutput_dir: o\nbeta: 0.1\n"
    write("r.yaml", f"trainer: grpo\n{least}{lines}\n", least=False)
    with pytest.raises(ConfigError) as caught:
        read_recipe("r.yaml")
    assert says in str(caught.value)
    assert read_recipe("r.yaml", ["kl_placement=none", "kl_estimator=k3", "kl_controller=constant"])


def test_alpha_is_checked_with_the_rest(write):
    least = "model_name_or_path: m\ndataset_name: d\noutput_dir: o\npoe_alpha: 0.5\n"
    write("r.yaml", f"trainer: rwr\n{least}reference: moving\nbeta: 0.3\n", least=False)
    with pytest.raises(ConfigError, match=r"r.yaml:5: poe_alpha: .*1/0.5 = 2, and beta is given"):
        read_recipe("r.yaml")
    write("r.yaml", f"trainer: rwr\n{least}reference: moving\n", least=False)
    with pytest.raises(ConfigError, match=r"r.yaml:5: poe_alpha: reference='moving' tilts"):
        read_recipe("r.yaml")
    write("r.yaml", f"trainer: grpo\n{least}", least=False)
    with pytest.raises(ConfigError, match=r"r.yaml:5: poe_alpha: scale_rewards='group' divides"):
        read_recipe("r.yaml")
    for trainer in ("reinforce", "ppo"):
        write("r.yaml", f"trainer: {trainer}\n{least}", least=False)
        recipe = read_recipe("r.yaml")
        assert recipe.values["poe_alpha"] == 0.5
        assert recipe.defaults()["beta"] == 2.0, "as `show --defaults` has it"
    rewards = "reward_funcs: [exact_match]\nreward_weights: [2.0]\n"
    write("r.yaml", f"trainer: reinforce\n{least}{rewards}", least=False)
    with pytest.raises(ConfigError, match=r"r.yaml:5: poe_alpha: reward_weights=\[2.0\] multipl"):
        read_recipe("r.yaml")


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("process_beta: 0.1\n", "process_beta: does nothing without process_reward or process_lea"),
        (
            "process_reward: p\nprocess_steps: sentence\n",
            "process_steps: does nothing with pro",
        ),
        (
            "process_reward: p\nprocess_level: step\nprocess_steps: lines\n",
            "r.yaml:7: process_steps: 'lines', which is no way to cut",
        ),
        (
            "process_reward: p\nprocess_level: step\nprocess_steps: {regex: '('}\n",
            "process_steps: ",
        ),
        ("process_learning_rate: 0.1\nprocess_level: steps\n", "allowed: one of token, step"),
    ],
)
def test_options_of_a_process_reward(write, lines, says):
    least = "model_name_or_path: m\ndataset_name: d\noutput_dir: o\n"
    write("r.yaml", f"trainer: reinforce\n{least}{lines}", least=False)
    with pytest.raises(ConfigError) as caught:
        read_recipe("r.yaml")
    assert says in str(caught.value)
    assert "has 1 problem" in str(caught.value)


def test_a_process_reward_as_it_should_be(write):
    least = "model_name_or_path: m\ndataset_name: d\noutput_dir: o\n"
    lines = "process_reward: p\nprocess_level: step\nprocess_steps: sentence\nprocess_beta: 0.1\n"
    write("r.yaml", f"trainer: ppo\n{least}{lines}", least=False)
    assert read_recipe("r.yaml").values["process_steps"] == "sentence"
    write("r.yaml", f"trainer: ppo\n{least}process_learning_rate: 1e-4\n", least=False)
    assert read_recipe("r.yaml").values["process_learning_rate"] == 1e-4
    write("r.yaml", f"trainer: rwr\n{least}process_reward: p\n", least=False)
    with pytest.raises(ConfigError, match=r"process_reward: .*does nothing"):
        read_recipe("r.yaml")


def test_alpha_counts_as_beta_where_penalties_are_checked(write):
    """GRPO's default β is 0, with which no penalty is unsound."""
    least = "model_name_or_path: m\ndataset_name: d\noutput_dir: o\npoe_alpha: 0.5\n"
    lines = "scale_rewards: none\nkl_estimator: k1\nkl_is_correction: false\n"
    write("r.yaml", f"trainer: grpo\n{least}{lines}", least=False)
    with pytest.raises(ConfigError, match="k1 in the loss: its expected gradient is zero"):
        read_recipe("r.yaml")
