"""Versions, devices and the commit: what a run or a bug report has to say about its machine."""

import platform
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from trl_ext import __version__

_PACKAGES = (
    "trl",
    "transformers",
    "torch",
    "peft",
    "accelerate",
    "datasets",
    "evaluate",
    "bitsandbytes",
    "deepspeed",
    "vllm",
)


def environment(device: str | None = None) -> dict[str, Any]:
    """Name -> version or fact; None for what is not installed.

    Args:
        device: what is known of the devices already; by default torch is asked.
    """
    return {
        "trl_ext": __version__,
        **{package: _version(package) for package in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": devices() if device is None else device,
        "git_commit": _git_commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def devices() -> str:
    """The names of the accelerators, or CPU; imports torch."""
    if find_spec("torch") is None:
        return "unknown without torch"
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return ", ".join(names)
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "CPU" if kind is None else str(kind)


def _git_commit() -> str | None:
    """The commit of the folder the command runs in, with "+changes" if its tree differs from it."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+changes", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None


def command_name() -> str:
    """What to type for `trl_ext`: its name where the shell finds it, else with its interpreter."""
    return "trl_ext" if shutil.which("trl_ext") else f"{shlex.quote(sys.executable)} -m trl_ext"
