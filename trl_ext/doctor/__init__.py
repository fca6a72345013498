"""What may keep a run from working on this machine, and what to do about it."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from trl_ext.doctor.devices import check_bf16, check_devices, check_nccl, check_one_process
from trl_ext.doctor.finding import Finding
from trl_ext.doctor.hub import check_hub
from trl_ext.doctor.machine import check_caches, check_disk, check_threads
from trl_ext.doctor.packages import check_flash_attention, check_quantization, check_versions
from trl_ext.doctor.probe import Probed, nvidia_cards

__all__ = ["Finding", "Probed", "diagnose"]


def diagnose(probed: Probed, *, output: str | Path = "outputs", hub: bool = False) -> list[Finding]:
    """Every finding on this machine, those in order included.

    Args:
        probed: from `trl_ext.doctor.probe.probe`, what the heavy libraries say.
        output: the folder that runs write to.
        hub: ask the hub whether it answers; nothing else here uses the network.
    """
    cards = nvidia_cards()
    checks: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("versions", check_versions),
        ("devices", partial(check_devices, probed, cards)),
        ("bf16", partial(check_bf16, probed)),
        ("nccl", partial(check_nccl, probed, cards)),
        ("processes", partial(check_one_process, probed)),
        ("bitsandbytes", partial(check_quantization, probed)),
        ("flash-attn", partial(check_flash_attention, probed)),
        ("threads", partial(check_threads, probed)),
        ("disk", partial(check_disk, os.fspath(output))),
        ("caches", check_caches),
    ]
    if hub:
        checks.append(("hub", check_hub))
    return [finding for name, check in checks for finding in _made(name, check)]


def _made(name: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """What a check finds. One that fails is a finding too: the others are still needed."""
    try:
        return check()
    except Exception as error:
        says = f"could not be looked at: {type(error).__name__}: {error}"
        return [Finding(name, "warning", says, "Report this with the lines above.")]
