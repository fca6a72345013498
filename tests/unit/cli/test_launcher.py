"""Which processes an Accelerate config starts, and the errors where it would start others."""

import types
from typing import Any

import pytest

from trl_ext.cli import launcher, main
from trl_ext.errors import RunError

MACHINES = {"machine_rank": 1, "main_process_ip": "a"}


@pytest.fixture
def launch(monkeypatch):
    """launch(devices, **launcher's keys) -> the command, without the interpreter."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def command(devices: int, *, values: dict | None = None, **keys: Any) -> list[str]:
        recipe: Any = types.SimpleNamespace(launcher=keys, values=values or {})
        monkeypatch.setattr(launcher, "_device_count", lambda: devices)
        return launcher.launch_command(recipe, ["train", "x"])[1:]

    return command


@pytest.fixture
def config(tmp_path):
    """config("distributed_type: FSDP") -> the path of an Accelerate config of one's own."""

    def write(text: str) -> str:
        (tmp_path / "own.yaml").write_text(text)
        return str(tmp_path / "own.yaml")

    return write


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3", "zero3_offload"])
@pytest.mark.parametrize(("given", "processes"), [({}, 4), ({"num_processes": 2}, 2)])
def test_all_gpus_or_as_many_as_asked_for(launch, name, given, processes):
    command = launch(4, accelerate_config=name, **given)
    assert command[:2] == ["-m", "accelerate.commands.launch"]
    assert command[2].endswith(f"configs/accelerate/{name}.yaml")
    assert f"--num_processes={processes}" in command and "--num_machines=1" in command
    assert not any(flag.startswith("--gpu_ids") for flag in command)


def test_all_gpus_of_all_machines(launch):
    command = launch(4, accelerate_config="multi_node", **MACHINES)
    assert command[3:-4] == [
        "--num_processes=8", "--num_machines=2", "--machine_rank=1", "--main_process_ip=a",
        "--main_process_port=29500",
    ]  # fmt: skip
    assert "--num_processes=12" in launch(4, accelerate_config="fsdp2", num_machines=3, **MACHINES)


@pytest.mark.parametrize(
    ("visible", "taken"),
    [(None, "0"), ("", "0"), ("3", "3"), ("2,3", "2"), ("GPU-ab,GPU-c", "GPU-ab")],
)
def test_a_single_gpu_is_one_that_is_visible(launch, monkeypatch, visible, taken):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    command = launch(2, accelerate_config="single_gpu")
    assert "--num_processes=1" in command and f"--gpu_ids={taken}" in command


def test_a_config_that_names_its_gpu_keeps_it(launch, config):
    own = config('distributed_type: "NO"\ngpu_ids: "1"\n')
    assert not any("gpu_ids" in flag for flag in launch(2, accelerate_config=own))


@pytest.mark.parametrize("devices", [0, 2])
def test_cpu(launch, devices):
    """Two processes by torch's launcher, also beside GPUs, and told to stay on the CPU."""
    command = launch(devices, accelerate_config="cpu")
    assert command == [
        "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
        "-m", "trl_ext", "train", "x", "use_cpu=true", "ddp_backend=gloo",
    ]  # fmt: skip
    given = launch(devices, values={"use_cpu": True}, accelerate_config="cpu")
    assert "use_cpu=true" not in given


def test_machines_of_a_config_reach_torchs_launcher(launch, config):
    own = config(
        "distributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 4\nnum_machines: 2\n"
        "machine_rank: 0\nmain_process_ip: a\nmain_process_port: 5\n"
    )
    assert launch(0, accelerate_config=own)[2:-6] == [
        "--nproc_per_node=2", "--nnodes=2", "--node_rank=0", "--master_addr=a", "--master_port=5",
    ]  # fmt: skip
    assert "--node_rank=1" in launch(0, accelerate_config=own, machine_rank=1)  # what is given wins


@pytest.mark.parametrize("name", ["fsdp2", "zero2", "zero3", "zero3_offload", "ddp", "fsdp1"])
def test_what_needs_gpus_is_refused_on_a_cpu(launch, name):
    """Accelerate would run one process, or make data parallelism of it, and say nothing."""
    with pytest.raises(RunError, match=r"has no accelerator.*Leave accelerate_config out"):
        launch(0, accelerate_config=name, num_processes=2)


def test_a_single_gpu_is_refused_on_a_cpu(launch, config):
    with pytest.raises(RunError, match=r"asks for an accelerator \(use_cpu: false\)"):
        launch(0, accelerate_config="single_gpu")
    own = config("distributed_type: NO\nuse_cpu: true\n")  # which YAML reads as false
    assert "--nproc_per_node=1" in launch(0, accelerate_config=own)
    assert launch(0, values={"use_cpu": True}, accelerate_config="single_gpu")


@pytest.mark.parametrize(
    ("devices", "text", "keys", "message"),
    [
        (0, "distributed_type: MULTI_CPU", {}, "does not say how many. Give num_processes"),
        (2, "distributed_type: MULTI_CPU\nnum_processes: 2", {}, "Give use_cpu=true"),
        (4, 'distributed_type: "NO"\nnum_processes: 4', {}, "is for one process .* 4 are asked"),
        (0, "distributed_type: NO", {"num_processes": 2}, "is for one process"),
        (2, "distributed_type: FSDP\nnum_processes: 8", {}, "8 processes .* num_processes=2"),
        (2, "distributed_type: FSDP\nmachine_rank: 0", {"num_machines": 2}, "without machine_rank"),
    ],
)
def test_other_processes_than_asked_for_are_an_error(launch, config, devices, text, keys, message):
    with pytest.raises(RunError, match=message):
        launch(devices, accelerate_config=config(text), **keys)


@pytest.mark.parametrize(
    ("keys", "missing"),
    [
        ({}, "machine_rank and main_process_ip"),
        ({"machine_rank": 0}, "without main_process_ip"),
        ({"main_process_ip": "a"}, "without machine_rank"),
    ],
)
@pytest.mark.parametrize("devices", [0, 2])
def test_machines_that_do_not_know_each_other(launch, devices, keys, missing):
    with pytest.raises(RunError, match=missing):
        launch(devices, num_machines=2, num_processes=4, **keys)


SETS = {"FSDP": "ACCELERATE_USE_FSDP", "DEEPSPEED": "ACCELERATE_USE_DEEPSPEED"}


@pytest.mark.parametrize(("name", "kind"), [("fsdp2", "FSDP"), ("zero3", "DEEPSPEED")])
def test_torchrun_does_not_shard(monkeypatch, name, kind):
    for variable in SETS.values():
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(RunError, match=f"asks for {kind}.*nothing would be sharded"):
        launcher.check_launched({"accelerate_config": name})
    monkeypatch.setenv(SETS[kind], "true")
    launcher.check_launched({"accelerate_config": name})


@pytest.mark.parametrize("keys", [{}, {"accelerate_config": None}, {"accelerate_config": "ddp"}])
def test_data_parallelism_under_any_launcher(monkeypatch, keys):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    launcher.check_launched(keys)


def test_a_process_of_another_launcher_is_checked_before_it_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    output = f"output_dir={tmp_path / 'out'}"
    assert main(["train", "rwr/char_reverse", "accelerate_config=fsdp2", output]) == 1
    assert "'fsdp2' asks for FSDP" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_several_devices_in_one_process_are_refused():
    """transformers would wrap the model in DataParallel, and say nothing."""
    from trl_ext.build import _check_processes

    with pytest.raises(RunError, match=r"sees 2 devices.*num_processes=2"):
        _check_processes(types.SimpleNamespace(n_gpu=2, world_size=1))
