"""What lies in configs/: fragments that recipes extend, and places to run, read by Accelerate."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands import launch as accelerate_launch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed.fsdp import OffloadPolicy

from trl_ext.recipe import read_recipe
from trl_ext.recipe.shipped import accelerate_configs, read_accelerate_config, shipped_folder

CONFIGS = shipped_folder("configs")
FRAGMENTS = sorted(file.stem for file in CONFIGS.glob("*.yaml"))
WHERE = sorted(file.stem for file in (CONFIGS / "accelerate").glob("*.yaml"))
KINDS = {
    "cpu": "MULTI_CPU",
    "single_gpu": "NO",
    "ddp": "MULTI_GPU",
    "multi_node": "MULTI_GPU",
    "fsdp2": "FSDP",
    "zero2": "DEEPSPEED",
    "zero3": "DEEPSPEED",
    "zero3_offload": "DEEPSPEED",
}
BASE = """\
trainer: {trainer}
model_name_or_path: some/model
dataset_name: some/data
output_dir: out
reward_funcs: [accuracy_reward]
"""


def header(path: Path) -> str:
    """The comment that a file begins with."""
    lines = path.read_text().splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


# Fragments.


def test_the_fragments_are_these():
    assert FRAGMENTS == ["lora", "low-memory", "qlora", "vllm-colocate", "vllm-server"]


@pytest.fixture
def extended(tmp_path, monkeypatch):
    """extended("lora", "rwr") -> a recipe of that trainer that extends the fragment."""
    monkeypatch.chdir(tmp_path)

    def read(fragment: str, trainer: str, text: str = ""):
        Path("base.yaml").write_text(BASE.format(trainer=trainer))
        Path("mine.yaml").write_text(f"extends: [base.yaml, configs/{fragment}.yaml]\n{text}")
        return read_recipe("mine.yaml")

    return read


@pytest.mark.parametrize("fragment", FRAGMENTS)
@pytest.mark.parametrize("trainer", ["rwr", "grpo", "reinforce", "ppo"])
def test_a_recipe_extends_it(extended, fragment, trainer):
    recipe = extended(fragment, trainer)
    for key, value in yaml.safe_load((CONFIGS / f"{fragment}.yaml").read_text()).items():
        if key != "extends":
            assert recipe.values[key] in (value, [value])  # a list of one may be written without
            assert Path(recipe.origins[key].source).name == f"{fragment}.yaml"


@pytest.mark.parametrize("fragment", FRAGMENTS)
@pytest.mark.parametrize("trainer", ["rwr", "grpo"])
def test_its_values_make_a_config(extended, fragment, trainer):
    """Beyond the types: nothing in them contradicts what TRL and the trainer check."""
    from trl import ModelConfig

    from trl_ext import GRPOConfig, RWRConfig

    recipe = extended(fragment, trainer)
    made: Any = {"rwr": RWRConfig, "grpo": GRPOConfig}[trainer]
    config = made(use_cpu=True, **recipe.groups["config"])
    model = ModelConfig(**recipe.groups["model"])
    for key, value in recipe.groups["config"].items():
        if key == "gradient_checkpointing" and hasattr(config, "activation_checkpointing"):
            key = "activation_checkpointing"  # its name from transformers 5.23 on
        assert getattr(config, key) == value
    assert model.load_in_4bit == (fragment == "qlora")


def test_a_trainer_that_samples_nothing_takes_no_vllm(extended, tmp_path):
    text = BASE.format(trainer="dpo").replace("reward_funcs: [accuracy_reward]\n", "")
    Path("base.yaml").write_text(text)
    Path("mine.yaml").write_text("extends: [base.yaml, configs/vllm-server.yaml]\n")
    with pytest.raises(ValueError, match="use_vllm: unknown key"):
        read_recipe("mine.yaml")


@pytest.mark.parametrize("fragment", FRAGMENTS)
def test_its_comment_shows_how(fragment):
    shown = header(CONFIGS / f"{fragment}.yaml")
    [extends] = re.findall(r"^#   extends: (.*)$", shown, re.M)
    named = yaml.safe_load(extends)
    assert f"configs/{fragment}.yaml" in ([named] if isinstance(named, str) else named)


@pytest.mark.parametrize("fragment", ["low-memory", "vllm-colocate", "vllm-server"])
def test_the_recipe_of_its_comment_is_one(tmp_path, monkeypatch, fragment):
    monkeypatch.chdir(tmp_path)
    shown = re.findall(r"^#   (\w+: .*)$", header(CONFIGS / f"{fragment}.yaml"), re.M)
    Path("mine.yaml").write_text("\n".join(shown))
    recipe = read_recipe("mine.yaml")
    assert recipe.trainer == "rwr"
    assert recipe.values["load_in_4bit"] == (fragment == "low-memory")


def test_the_vllm_server_is_started_as_trl_wants_it():
    from trl.scripts.vllm_serve import ScriptArguments, build_command

    shown = " ".join(re.sub(r"[#'\\]", " ", header(CONFIGS / "vllm-server.yaml")).split())
    model = "Qwen/Qwen2.5-1.5B-Instruct"
    imposed = build_command(ScriptArguments(model=model))
    wanted = imposed[imposed.index("--weight-transfer-config") :]
    assert f"vllm serve {model} {' '.join(wanted)}" in shown
    assert "VLLM_SERVER_DEV_MODE=1" in shown  # as main() there sets it
    assert f"{yaml.safe_load((CONFIGS / 'vllm-server.yaml').read_text())['vllm_server_port']}" == (
        str(ScriptArguments(model=model).port)
    )


# Where to run.


def test_the_places_are_these():
    assert set(WHERE) == set(KINDS)


@pytest.mark.parametrize("name", WHERE)
def test_a_recipe_finds_it_before_trls(extended, name):
    recipe = extended("lora", "rwr", f"accelerate_config: {name}")
    assert recipe.launcher == {"accelerate_config": name}
    assert accelerate_configs()[name] == CONFIGS / "accelerate" / f"{name}.yaml"
    assert {"fsdp1", "multi_gpu", "zero1"} <= set(accelerate_configs())  # TRL's alone


@pytest.mark.parametrize("name", WHERE)
def test_accelerate_reads_it(name):
    config: Any = load_config_from_file(str(CONFIGS / "accelerate" / f"{name}.yaml"))
    assert config.distributed_type == KINDS[name]
    assert config.use_cpu == (name == "cpu")
    assert config.num_machines == (2 if name == "multi_node" else 1)
    # -1: without a number from the launcher Accelerate refuses, rather than run one process.
    assert config.num_processes == {"cpu": 2, "single_gpu": 1}.get(name, -1)


@pytest.mark.parametrize("name", WHERE)
def test_it_leaves_to_the_recipe_what_is_the_recipes(name):
    """Named in an Accelerate config, each of these silently wins over the recipe."""
    config = read_accelerate_config(name)
    assert "mixed_precision" not in config
    assert "gradient_accumulation_steps" not in config.get("deepspeed_config", {})
    assert "machine_rank" not in config  # each machine's own


@pytest.mark.parametrize("name", WHERE)
def test_its_comment_shows_the_command(name):
    shown = header(CONFIGS / "accelerate" / f"{name}.yaml")
    assert f"trl_ext train RECIPE accelerate_config={name}" in shown


@pytest.mark.parametrize("name", ["fsdp2", "zero2", "zero3", "zero3_offload"])
def test_its_comment_says_who_refuses_it(name):
    shown = header(CONFIGS / "accelerate" / f"{name}.yaml")
    assert all(who in shown for who in ("PPO", "PoE distillation", "learns", "order_effect"))
    assert ("whole vocabulary" in shown) == name.startswith("zero3")


@pytest.fixture
def environment_of(monkeypatch):
    """What `accelerate launch` with a shipped config hands to its processes; none is started."""

    def variables(name: str) -> dict[str, str]:
        launched: list[Any] = []
        for kind in ("multi_gpu_launcher", "deepspeed_launcher", "simple_launcher"):
            monkeypatch.setattr(accelerate_launch, kind, launched.append)
        file = CONFIGS / "accelerate" / f"{name}.yaml"
        flags = [f"--config_file={file}", "--num_processes=2", "--num_machines=1"]
        args = accelerate_launch.launch_command_parser().parse_args([*flags, "-m", "trl_ext"])
        accelerate_launch.launch_command(args)
        if KINDS[name] == "DEEPSPEED":
            return prepare_deepspeed_cmd_env(launched[0])[1]
        return prepare_multi_gpu_env(launched[0])

    return variables


def test_fsdp2_shards(environment_of, monkeypatch):
    given = environment_of("fsdp2")
    assert given["ACCELERATE_USE_FSDP"] == "true"  # what cli/launcher.py looks for
    for key, value in given.items():
        if key.startswith("FSDP_"):
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)
    assert plugin.cpu_offload == OffloadPolicy() and not plugin.activation_checkpointing


@pytest.mark.parametrize(
    ("name", "stage", "device"),
    [("zero2", "2", "none"), ("zero3", "3", "none"), ("zero3_offload", "3", "cpu")],
)
def test_zero_shards(environment_of, name, stage, device):
    given = environment_of(name)
    assert given["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert given["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == stage
    assert given["ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"] == device
    assert given["ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"] == device
    assert given["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == str(stage == "3").lower()
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" not in given
    assert given["ACCELERATE_MIXED_PRECISION"] == "no"
    assert "mixed_precision" not in given["ACCELERATE_CONFIG_DS_FIELDS"]  # the recipe's, then


def test_ddp_shards_nothing(environment_of):
    given = environment_of("ddp")
    assert not {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & given.keys()


# Several machines under SLURM, with programs of a line in its place.


SRUN = """\
#!/bin/bash
for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done
"""
TRL_EXT = """\
#!/bin/bash
for word in "$@"; do printf '%s|' "$word"; done; echo
"""


def test_the_sbatch_file(tmp_path, extended):
    programs = {"srun": SRUN, "trl_ext": TRL_EXT, "scontrol": "#!/bin/bash\necho n07; echo n08\n"}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "n[07-08]", "SLURM_JOB_ID": "20042", "SLURM_NNODES": "2"}
    variables = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(CONFIGS / "accelerate/multi_node.sbatch"), "mine.yaml", "run_name=a b"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    same = "accelerate_config=multi_node|num_machines=2"
    address = "main_process_ip=n07|main_process_port=20042"
    assert done.stdout.splitlines() == [
        f"train|mine.yaml|run_name=a b|{same}|machine_rank={rank}|{address}|" for rank in (0, 1)
    ]
    extended("lora", "rwr")  # and the recipe takes all of it
    overrides = done.stdout.splitlines()[1].split("|")[2:-1]
    launcher = read_recipe("mine.yaml", overrides).launcher
    assert launcher["machine_rank"] == 1 and launcher["main_process_ip"] == "n07"


def test_torchrun_takes_the_flags_of_the_comment():
    """Of multi_node.yaml, by torch's own parser."""
    from torch.distributed.run import get_args_parser

    shown = re.sub(r"[#\\\n]", " ", header(CONFIGS / "accelerate/multi_node.yaml"))
    [flags] = re.findall(r"torchrun (.*?) RECIPE", shown)
    args = get_args_parser().parse_args(flags.split())
    assert (args.nnodes, args.nproc_per_node, args.module) == ("2", "8", True)
    assert args.training_script == "trl_ext" and args.training_script_args == ["train"]
