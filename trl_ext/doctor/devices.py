"""GPUs and their driver, bf16, how GPUs reach each other, and how many processes use them."""

import os
import shutil
from pathlib import Path
from typing import Any

from trl_ext.doctor.finding import Finding
from trl_ext.doctor.probe import Probed

# Older drivers offer RTX 40 cards peer-to-peer transfers that these cards do not do, and NCCL
# hangs. The number is accelerate's (`check_cuda_p2p_ib_support`).
_RTX_40_DRIVER = (550, 40, 7)
_SHARED_MEMORY = Path("/dev/shm")
_CPU_FLAGS = Path("/proc/cpuinfo")


def check_devices(probed: Probed, cards: dict[str, Any]) -> list[Finding]:
    """Whether torch can be imported, and uses the GPUs that there are.

    Args:
        probed: what torch says.
        cards: what the driver says, from `nvidia_cards`.
    """
    if not probed.torch:
        says = f"it cannot be imported: {probed.errors.get('torch', 'it is not installed')}."
        do = "Install it for this machine: https://pytorch.org/get-started/locally"
        return [Finding("torch", "error", says, do)]
    if cards["error"]:
        do = "Reinstall or reload the driver; in a container, start it with access to the GPUs."
        return [Finding("gpu", "error", f"nvidia-smi fails: {cards['error']}.", do)]
    if probed.torch["gpus"]:
        return _gpu_findings(probed.torch, cards)
    if not cards["cards"]:
        if probed.torch["accelerator"]:
            return [Finding("gpu", "ok", f"{probed.torch['device']}.")]
        says = "there is none: runs are on the CPU, where models of a few 100M parameters train."
        return [Finding("gpu", "note", says)]
    return [_idle(probed.torch, cards)]


def _gpu_findings(torch: dict[str, Any], cards: dict[str, Any]) -> list[Finding]:
    broken = [f"{gpu['name']} ({gpu['problem']})" for gpu in torch["gpus"] if gpu["problem"]]
    if broken:
        says = f"torch {torch['version']} cannot compute on {', '.join(broken)}."
        do = "Install a torch that is built for this card, or hide it with CUDA_VISIBLE_DEVICES."
        return [Finding("gpu", "error", says, do)]
    driver = f", driver {cards['driver']}" if cards["driver"] else ""
    names = ", ".join(gpu["name"] for gpu in torch["gpus"])
    return [Finding("gpu", "ok", f"{names}; torch for {torch['built_for']}{driver}.")]


def _idle(torch: dict[str, Any], cards: dict[str, Any]) -> Finding:
    """Why torch sees none of the cards that the driver sees."""
    names = ", ".join(cards["cards"])
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch["built_for"] is None:
        says = f"torch {torch['version']} is built without CUDA and leaves {names} idle."
        do = "Install torch with CUDA: https://pytorch.org/get-started/locally"
        return Finding("gpu", "warning", says, do)
    if hidden is not None and hidden.strip() in ("", "-1"):
        says = f"CUDA_VISIBLE_DEVICES={hidden!r} hides {names}."
        return Finding("gpu", "note", says, "unset CUDA_VISIBLE_DEVICES to train on it.")
    says = f"torch, built for {torch['built_for']}, cannot use {names} (driver {cards['driver']})."
    do = "Update the driver, or install torch for an older CUDA; check CUDA_VISIBLE_DEVICES."
    return Finding("gpu", "error", says, do)


def check_bf16(probed: Probed) -> list[Finding]:
    """Whether bfloat16, in which TRL trains by default, is more than emulated."""
    if not probed.torch:
        return []
    gpus = probed.torch["gpus"]
    old = [gpu["name"] for gpu in gpus if gpu["capability"] < [8, 0]]
    if old:
        says = f"TRL trains in bf16 unless told otherwise, and {', '.join(old)} has no bf16."
        return [Finding("bf16", "warning", says, "In the recipe: bf16: false and fp16: true")]
    if gpus:
        return [Finding("bf16", "ok", "the GPU computes in it.")]
    if probed.torch["accelerator"] or not _CPU_FLAGS.exists():
        return []  # nobody here knows
    if {"avx512_bf16", "amx_bf16", "bf16"} & set(_CPU_FLAGS.read_text().split()):
        return [Finding("bf16", "ok", "the CPU computes in it.")]
    do = "In the recipe: dtype: float32 and bf16: false, if it is faster"
    return [Finding("bf16", "note", "this CPU has no bf16 of its own and emulates it.", do)]


def check_nccl(probed: Probed, cards: dict[str, Any]) -> list[Finding]:
    """Whether several GPUs can talk to each other.

    Args:
        probed: what torch says.
        cards: what the driver says, from `nvidia_cards`.
    """
    gpus = probed.torch.get("gpus", [])
    if len(gpus) < 2:
        return []
    if not probed.torch["nccl"]:
        do = "Use one GPU, or install torch with NCCL (Linux)."
        return [Finding("nccl", "warning", "this torch has none: no run over several GPUs.", do)]
    found = []
    old_driver = cards["driver"] and _numbers(cards["driver"]) < _RTX_40_DRIVER
    disabled = os.environ.get("NCCL_P2P_DISABLE") == "1"
    if any("RTX 40" in gpu["name"] for gpu in gpus) and old_driver and not disabled:
        says = f"with driver {cards['driver']} NCCL hangs between RTX 40 cards, or is wrong."
        do = (
            "export NCCL_P2P_DISABLE=1 NCCL_IB_DISABLE=1 (accelerate launch does so, torchrun does "
            "not), or a driver from 550.40.07 on"
        )
        found.append(Finding("nccl", "warning", says, do))
    elif not probed.torch["peers"] and not disabled:
        says = "the GPUs cannot read each other's memory (P2P); NCCL goes through the CPU's."
        do = "Should a run hang at its start: export NCCL_P2P_DISABLE=1; NCCL_DEBUG=INFO says more."
        found.append(Finding("nccl", "note", says, do))
    if _SHARED_MEMORY.is_dir() and (size := shutil.disk_usage(_SHARED_MEMORY).total) < 2**30:
        says = f"{_SHARED_MEMORY} has {size / 2**20:.0f} MB, through which processes talk."
        found.append(Finding("nccl", "warning", says, "docker run --ipc=host, or --shm-size=8g"))
    return found or [Finding("nccl", "ok", f"{len(gpus)} GPUs reach each other.")]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def check_one_process(probed: Probed) -> list[Finding]:
    """Several GPUs and nothing that starts a process on each."""
    count = len(probed.torch.get("gpus", []))
    if count < 2 or "LOCAL_RANK" in os.environ:
        return []
    says = f"{count} GPUs are visible, and a recipe that asks for no processes is one process."
    do = (
        f"accelerate_config=ddp or num_processes={count} for all of them; CUDA_VISIBLE_DEVICES=0 "
        "for one. torch would spread a single process over all of them (DataParallel)."
    )
    return [Finding("processes", "note", says, do)]
