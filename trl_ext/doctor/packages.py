"""Installed packages against the supported ranges; quantisation and flash attention."""

import platform
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from trl_ext.doctor.finding import Finding
from trl_ext.doctor.probe import Probed

# Extras that a run never imports.
_NOT_FOR_RUNS = {"test", "dev"}


def check_versions() -> list[Finding]:
    """Python and each package that trl_ext or an extra of TRL needs, in its range."""
    try:
        python = metadata.metadata("trl-ext")["Requires-Python"]
    except metadata.PackageNotFoundError:
        says = "trl_ext is on Python's path and not installed, so its version ranges are unknown."
        return [Finding("versions", "warning", says, "pip install -e .")]
    wrong = [*_python_findings(python), *_range_findings("trl-ext", required=True)]
    names = [finding.name for finding in wrong]
    wrong += [f for f in _range_findings("trl", required=False) if f.name not in names]
    if wrong:
        return wrong
    says = "Python and all packages are in the ranges that trl_ext supports."
    return [Finding("versions", "ok", says)]


def _python_findings(needed: str | None) -> Iterator[Finding]:
    from packaging.specifiers import SpecifierSet

    if needed and not SpecifierSet(needed).contains(platform.python_version(), prereleases=True):
        says = f"Python {platform.python_version()} runs; trl_ext needs {needed}."
        yield Finding("python", "error", says, "Make a virtual environment with another Python.")


def _range_findings(distribution: str, *, required: bool) -> Iterator[Finding]:
    """Packages that are missing or out of range; of extras, those that are installed.

    packaging is imported where it is used: without it the other checks still run.
    """
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        return  # its own absence is a finding of trl_ext's requirements
    extras = set(metadata.metadata(distribution).get_all("Provides-Extra") or []) - _NOT_FOR_RUNS
    for need in map(Requirement, lines):
        always = need.marker is None or need.marker.evaluate({"extra": ""})
        by_extra = any(need.marker and need.marker.evaluate({"extra": e}) for e in extras)
        try:
            found = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            found = None
        if always and required and found is None:
            says = f"{need.name} is not installed; trl_ext needs {need.name}{need.specifier}."
            yield Finding(need.name, "error", says, _pip(need))
        elif found and not need.specifier.contains(found, prereleases=True):
            says = f"{need.name} {found} is installed; supported is {need.specifier}."
            if always and required:
                yield Finding(need.name, "error", says, _pip(need))
            elif by_extra:
                yield Finding(need.name, "warning", says, _pip(need))


def _pip(need: Any) -> str:
    return f'pip install "{need.name}{need.specifier}"'


def check_quantization(probed: Probed) -> list[Finding]:
    """Whether bitsandbytes loads, finds the GPU, and has gradients in 4-bit."""
    name = "bitsandbytes"
    if not probed.torch:
        return []  # it needs torch, which is a finding of its own
    if name in probed.errors:
        says = f"it cannot be imported, and peft imports it for every LoRA: {probed.errors[name]}."
        return [Finding(name, "error", says, "Reinstall it, or pip uninstall bitsandbytes.")]
    if name not in probed.facts:
        says = "it is not installed: no load_in_4bit, load_in_8bit or 8-bit optimizers."
        return [Finding(name, "note", says, 'For QLoRA: pip install "trl-ext[quant]"')]
    facts = probed.facts[name]
    if facts["device"] == "cuda" and not facts["gpu_library"]:
        built_for = probed.torch.get("built_for")
        says = f"its library for this GPU was not found (torch is built for {built_for})."
        do = "Upgrade it, unset BNB_CUDA_VERSION; python -m bitsandbytes says what it looked for."
        return [Finding(name, "warning", says, do)]
    if facts["trains"]:
        says = f"NF4 does not train on the {_place(facts)}: {facts['trains']}."
        return [Finding(name, "warning", says, "Leave load_in_4bit out: LoRA instead of QLoRA.")]
    works = Finding(name, "ok", f"NF4 has the right gradients on the {_place(facts)}.")
    if not facts["trains_after_evaluation"]:
        return [works]
    says = (
        "after an evaluation pass on this CPU (AVX512-BF16) NF4 loses its gradients: "
        f"{facts['trains_after_evaluation']}. The trainers of trl_ext mend that."
    )
    do = "In a script of your own: trl_ext.models.adapter.keep_nf4_gradients_on_cpu(model)"
    return [works, Finding(name, "note", says, do)]


def _place(facts: dict[str, object]) -> str:
    return "GPU" if facts["device"] == "cuda" else "CPU"


def check_flash_attention(probed: Probed) -> list[Finding]:
    """Whether `attn_implementation: flash_attention_2` can work."""
    name, instead = "flash-attn", "attn_implementation: sdpa, torch's own, needs nothing."
    if not probed.torch:
        return []
    if "flash_attn" in probed.errors:
        says = f"it is installed and cannot be imported: {probed.errors['flash_attn']}."
        do = f"Reinstall it for torch {probed.torch.get('version', '')}; or {instead}"
        return [Finding(name, "warning", says, do)]
    if "flash_attn" not in probed.facts:
        return [Finding(name, "note", "it is not installed; few runs need it.", instead)]
    gpus = probed.torch.get("gpus", [])
    old = [gpu["name"] for gpu in gpus if gpu["capability"] < [8, 0]]
    if old or not gpus:
        where = f"does not run on {', '.join(old)}" if old else "runs on CUDA cards alone"
        return [Finding(name, "warning", f"it is installed and {where}.", instead)]
    return [Finding(name, "ok", f"version {probed.facts['flash_attn']['version']} is importable.")]
