"""Threads, disks and caches."""

import math
import os
import shutil
import tempfile
from pathlib import Path

from trl_ext.bundled import cache_dir
from trl_ext.doctor.finding import Finding
from trl_ext.doctor.probe import Probed

# Weights, gradients' moments and a second checkpoint of a model of 1.5B parameters in bf16 need
# some 12 GB; the bundled model, saved once, 0.5 GB.
_AMPLE, _LITTLE = 10 * 2**30, 2**30
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def check_threads(probed: Probed) -> list[Finding]:
    """Whether torch takes as many threads as there are cores for it."""
    given, cores = os.environ.get("OMP_NUM_THREADS"), usable_cores()
    if given is not None and not all(_is_count(part) for part in given.split(",")):
        says = f"OMP_NUM_THREADS={given!r} is no positive whole number, and is ignored."
        return [Finding("threads", "warning", says, f"export OMP_NUM_THREADS={cores}")]
    threads = probed.torch.get("threads", cores)
    if threads > cores:
        says = f"torch takes {threads} threads, and there are {cores} cores for it: much slower."
        return [Finding("threads", "warning", says, f"export OMP_NUM_THREADS={cores}")]
    found = [Finding("threads", "ok", f"torch takes {threads} of {cores} cores.")]
    waits = os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"
    if not probed.torch.get("accelerator") and not waits and threads > max(cores // 2, 1):
        says = "two runs at once on these cores wait for each other spinning, ten times as slow."
        do = f"For two runs: export OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS={max(cores // 2, 1)}"
        found.append(Finding("threads", "note", says, do))
    return found


def usable_cores() -> int:
    """Cores that this process may run on: its affinity, and the quota of its container."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux has it
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota, _, period = (
        _CPU_QUOTA.read_text().partition(" ") if _CPU_QUOTA.exists() else ("", "", "")
    )
    if quota.isdecimal():
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return cores


def _is_count(text: str) -> bool:
    return text.strip().isdecimal() and int(text) > 0


def check_disk(output: str) -> list[Finding]:
    """Whether what a run writes to can be written, and has room.

    Args:
        output: the folder that runs write to.
    """
    places = {"output": Path(output), **cache_folders(), "temporary": Path(tempfile.gettempdir())}
    return [_place_finding(name, place) for name, place in places.items()]


def cache_folders() -> dict[str, Path]:
    """Where models, datasets and trl_ext's own models are kept."""
    from huggingface_hub import constants

    home = Path(constants.HF_HOME)
    return {
        "model cache": Path(constants.HF_HUB_CACHE),
        # As datasets has it: importing it for this would take a second.
        "dataset cache": Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets"),
        "trl_ext cache": cache_dir(),
    }


def _place_finding(name: str, place: Path) -> Finding:
    above = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        why = "is a file" if not above.is_dir() else "may not be written"
        do = "Give another folder, or the right to write there."
        return Finding(name, "error", f"{place}: {above} {why}.", do)
    free = shutil.disk_usage(above).free
    says = f"{place} has {free / 2**30:.1f} GB free."
    if free >= _AMPLE:
        return Finding(name, "ok", says)
    do = "Make room, or move it: output_dir, HF_HOME, TRL_EXT_CACHE, TMPDIR; save_total_limit: 1"
    return Finding(name, "error" if free < _LITTLE else "warning", says, do)


def check_caches() -> list[Finding]:
    """Settings of the hub's libraries that do nothing, or more than is seen."""
    from huggingface_hub import constants

    found = []
    if "TRANSFORMERS_CACHE" in os.environ:
        says = f"TRANSFORMERS_CACHE={os.environ['TRANSFORMERS_CACHE']!r} is ignored since 5.0."
        found.append(Finding("caches", "warning", says, "Set HF_HOME instead."))
    if constants.HF_HUB_OFFLINE:
        says = "HF_HUB_OFFLINE is set: of the hub, only what is in the cache can be opened."
        found.append(Finding("caches", "note", says, "unset HF_HUB_OFFLINE to download."))
    for end in ("yaml", "json"):
        default = Path(constants.HF_HOME, "accelerate", f"default_config.{end}")
        if default.exists():
            says = f"{default} changes every launched run that names no accelerate_config."
            do = "Name one, such as accelerate_config=ddp, or remove the file."
            found.append(Finding("caches", "note", says, do))
    return found
