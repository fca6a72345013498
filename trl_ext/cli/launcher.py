"""The command that runs `trl_ext train` in several processes, or an error where it would run one.

`accelerate launch` runs a single process on a machine without an accelerator, whatever it is asked
for, and says nothing. There torch's own launcher is used, and a config that needs devices refused.
"""

import os
import sys
from pathlib import Path
from typing import Any

from trl_ext.errors import RunError
from trl_ext.recipe import Recipe
from trl_ext.recipe.shipped import find_accelerate_config, read_accelerate_config

# What an Accelerate config may call training without an accelerator.
_ON_CPU = ("NO", "MULTI_CPU")
# What `accelerate launch` sets for the processes that it starts with such a config.
_SHARDED = {"FSDP": "ACCELERATE_USE_FSDP", "DEEPSPEED": "ACCELERATE_USE_DEEPSPEED"}


def wants_processes(launcher: dict[str, Any]) -> bool:
    """Whether a recipe asks for more than the process that reads it."""
    many = (launcher.get("num_processes") or 1) > 1 or (launcher.get("num_machines") or 1) > 1
    return many or bool(launcher.get("accelerate_config"))


def check_launched(launcher: dict[str, Any]) -> None:
    """Whether a process that another launcher started runs as the recipe's Accelerate config says.

    torchrun does not read it: what should be sharded would be data-parallel, and nothing said.

    Raises:
        RunError: if the config shards and this process was told nothing of it.
    """
    name = launcher.get("accelerate_config")
    kind = _kind(read_accelerate_config(name))
    variable = _SHARDED.get(kind)
    if variable and os.environ.get(variable) != "true":
        raise RunError(
            f"accelerate_config {name!r} asks for {kind}, and the launcher that started this "
            "process does not read it: nothing would be sharded. Run `trl_ext train` itself, "
            f"which launches {kind}, or leave accelerate_config out for data parallelism."
        )


def launch_command(recipe: Recipe, arguments: list[str]) -> list[str]:
    """The launcher's command line for `trl_ext` with these arguments, which named the recipe.

    Raises:
        RunError: if this machine cannot run as many processes as the recipe asks for.
    """
    config = read_accelerate_config(recipe.launcher.get("accelerate_config"))
    use_cpu = recipe.values.get("use_cpu", config.get("use_cpu"))
    devices = 0 if use_cpu else _device_count()
    launcher = _counted(_merged(recipe.launcher, config), config, devices)
    _check_machines(launcher)
    if devices == 0:
        _refuse_devices(launcher, config, use_cpu)
        if use_cpu and "use_cpu" not in recipe.values:
            arguments = [*arguments, "use_cpu=true"]
        if "ddp_backend" not in recipe.values:
            # Without a name for it, transformers 5.23 lets each process on a CPU train alone.
            arguments = [*arguments, "ddp_backend=gloo"]
        return _torch_command(launcher, arguments)
    _check_devices(launcher, config, devices)
    return _accelerate_command(launcher, config, arguments)


def _merged(launcher: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The launcher's keys, and what the Accelerate config says where they are silent."""
    told = {key: config.get(key) for key in _ACCELERATE_NAMES}
    if (config.get("num_machines") or 1) == 1:
        del told["machine_rank"]  # 0 by convention: of several machines it would be each one's
    given = {key: value for key, value in launcher.items() if value is not None}
    return {key: value for key, value in (told | given).items() if value is not None}


def _counted(launcher: dict[str, Any], config: dict[str, Any], devices: int) -> dict[str, Any]:
    """The launcher's keys with how many machines and processes there are.

    A config for several devices that names no number is for all that there are.
    """
    machines, processes = launcher.get("num_machines", 1), launcher.get("num_processes")
    if processes is None and _kind(config) == "MULTI_CPU":
        raise RunError(
            f"accelerate_config {launcher['accelerate_config']!r} is for several processes on the "
            "CPU and does not say how many. Give num_processes, such as num_processes=2."
        )
    if processes is None:
        processes = machines * (1 if _kind(config) == "NO" else max(devices, 1))
    if processes % machines:
        raise RunError(
            f"num_processes {processes} (over all machines) is not a multiple of num_machines "
            f"{machines}. Every machine runs the same number of processes."
        )
    if processes > 1 and config and _kind(config) == "NO":
        raise RunError(
            f"accelerate_config {launcher['accelerate_config']!r} is for one process "
            f"(distributed_type NO), and {processes} are asked for: one alone would run. Give "
            "accelerate_config=ddp, or num_processes=1."
        )
    return launcher | {"num_processes": processes, "num_machines": machines}


def _kind(config: dict[str, Any]) -> str:
    """What an Accelerate config calls its way of running; NO where it, or the config, is left out.

    YAML reads an unquoted NO as false.
    """
    return str(config.get("distributed_type") or "NO").upper()


def _device_count() -> int:
    """The number of accelerators. Training follows, so importing torch costs nothing here."""
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def _check_machines(launcher: dict[str, Any]) -> None:
    """Each of several machines knows which it is, and where the first one is."""
    missing = [key for key in ("machine_rank", "main_process_ip") if key not in launcher]
    if launcher["num_machines"] > 1 and missing:
        raise RunError(
            f"num_machines is {launcher['num_machines']}, without {' and '.join(missing)}. "
            "On each machine give machine_rank=0, 1, …, and on all of them "
            "main_process_ip=(the address of the machine with rank 0)."
        )


def _refuse_devices(launcher: dict[str, Any], config: dict[str, Any], use_cpu: object) -> None:
    wants_one = _kind(config) == "NO" and config.get("use_cpu") is False and not use_cpu
    if _kind(config) not in _ON_CPU or wants_one:
        asked = "an accelerator (use_cpu: false)" if wants_one else _kind(config)
        raise RunError(
            f"accelerate_config {launcher['accelerate_config']!r} asks for {asked}, and this "
            "machine has no accelerator: it would not run as that config says. Leave "
            "accelerate_config out; num_processes=2 then means two processes on the CPU."
        )


def _check_devices(launcher: dict[str, Any], config: dict[str, Any], devices: int) -> None:
    machines = launcher["num_machines"]
    here = launcher["num_processes"] // machines
    if here > devices:
        raise RunError(
            f"{here} processes are asked for on this machine, which has {devices} "
            f"accelerator{'s' if devices > 1 else ''}. Give num_processes={devices * machines}."
        )
    if _kind(config) == "MULTI_CPU":
        raise RunError(
            f"accelerate_config {launcher['accelerate_config']!r} asks for MULTI_CPU and not for "
            "use_cpu, and this machine has an accelerator: one process would run. Give "
            "use_cpu=true, or another accelerate_config, such as ddp."
        )


def _torch_command(launcher: dict[str, Any], arguments: list[str]) -> list[str]:
    machines = launcher["num_machines"]
    flags = [f"--nproc_per_node={launcher['num_processes'] // machines}"]
    if machines > 1:
        flags += [f"--nnodes={machines}", *_flags(launcher, _TORCH_NAMES)]
    else:
        flags.append("--standalone")  # any free port, so that two runs do not meet
    return [sys.executable, "-m", "torch.distributed.run", *flags, "-m", "trl_ext", *arguments]


def _accelerate_command(
    launcher: dict[str, Any], config: dict[str, Any], arguments: list[str]
) -> list[str]:
    flags = _flags(launcher, _ACCELERATE_NAMES)
    name = launcher.get("accelerate_config")
    path = find_accelerate_config(name) if name else None
    if path:
        flags.insert(0, f"--config_file={Path(path)}")
        if _kind(config) == "NO" and config.get("gpu_ids") in (None, "all"):
            # transformers would spread one process over every GPU that it sees (DataParallel).
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") or "0"
            flags.append(f"--gpu_ids={visible.split(',')[0]}")
    elif launcher["num_processes"] > 1:
        flags.insert(0, "--multi_gpu")
    return [sys.executable, "-m", "accelerate.commands.launch", *flags, "-m", "trl_ext", *arguments]


_TORCH_NAMES = {
    "machine_rank": "node_rank",
    "main_process_ip": "master_addr",
    "main_process_port": "master_port",
}
_ACCELERATE_NAMES = {key: key for key in ("num_processes", "num_machines", *_TORCH_NAMES)}


def _flags(launcher: dict[str, Any], names: dict[str, str]) -> list[str]:
    given = {flag: launcher.get(key) for key, flag in names.items()}
    return [f"--{flag}={value}" for flag, value in given.items() if value is not None]
