"""The command that runs `trl_ext train` in several processes, or an error where it would run one.

`accelerate launch` runs a single process on a machine without an accelerator, whatever it is asked
for, and says nothing. There torch's own launcher is used, and a config that needs devices refused.
"""

import sys
from pathlib import Path
from typing import Any

from trl_ext.errors import RunError
from trl_ext.recipe import Recipe
from trl_ext.recipe.shipped import find_accelerate_config, read_accelerate_config

# What an Accelerate config may call training without an accelerator.
_ON_CPU = ("NO", "MULTI_CPU")


def wants_processes(launcher: dict[str, Any]) -> bool:
    """Whether a recipe asks for more than the process that reads it."""
    many = (launcher.get("num_processes") or 1) > 1 or (launcher.get("num_machines") or 1) > 1
    return many or bool(launcher.get("accelerate_config"))


def launch_command(recipe: Recipe, arguments: list[str]) -> list[str]:
    """The launcher's command line for `trl_ext` with these arguments, which named the recipe.

    Raises:
        RunError: if this machine cannot run as many processes as the recipe asks for.
    """
    launcher = recipe.launcher
    config = read_accelerate_config(launcher.get("accelerate_config"))
    machines = launcher.get("num_machines") or config.get("num_machines") or 1
    processes = launcher.get("num_processes") or config.get("num_processes") or machines
    if processes % machines:
        raise RunError(
            f"num_processes {processes} (over all machines) is not a multiple of num_machines "
            f"{machines}. Every machine runs the same number of processes."
        )
    launcher = launcher | {"num_processes": processes, "num_machines": machines}
    devices = 0 if recipe.values.get("use_cpu") else _device_count()
    if devices == 0:
        _refuse_devices(launcher, config)
        if "ddp_backend" not in recipe.values:
            # Without a name for it, transformers 5.23 lets each process on a CPU train alone.
            arguments = [*arguments, "ddp_backend=gloo"]
        return _torch_command(launcher, arguments)
    if processes // machines > devices:
        raise RunError(
            f"{processes // machines} processes are asked for on this machine, which has {devices} "
            f"accelerator{'s' if devices > 1 else ''}. Give num_processes={devices * machines}."
        )
    return _accelerate_command(launcher, arguments)


def _device_count() -> int:
    """The number of accelerators. Training follows, so importing torch costs nothing here."""
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def _refuse_devices(launcher: dict[str, Any], config: dict[str, Any]) -> None:
    kind = str(config.get("distributed_type", "NO"))
    if kind.upper() not in _ON_CPU:
        raise RunError(
            f"accelerate_config {launcher['accelerate_config']!r} asks for {kind}, and this "
            "machine has no accelerator: it would not run as that config says. Leave "
            "accelerate_config out; num_processes=2 then means two processes on the CPU."
        )


def _torch_command(launcher: dict[str, Any], arguments: list[str]) -> list[str]:
    machines = launcher["num_machines"]
    flags = [f"--nproc_per_node={launcher['num_processes'] // machines}"]
    if machines > 1:
        flags += [f"--nnodes={machines}", *_flags(launcher, _TORCH_NAMES)]
    else:
        flags.append("--standalone")  # any free port, so that two runs do not meet
    return [sys.executable, "-m", "torch.distributed.run", *flags, "-m", "trl_ext", *arguments]


def _accelerate_command(launcher: dict[str, Any], arguments: list[str]) -> list[str]:
    flags = _flags(launcher, _ACCELERATE_NAMES)
    name = launcher.get("accelerate_config")
    path = find_accelerate_config(name) if name else None
    if path:
        flags.insert(0, f"--config_file={Path(path)}")
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
