"""Facts that only the heavy libraries know, asked for in a process of their own.

What is broken may crash or hang when it is imported; then that is what is known of it. Run as
`python -m trl_ext.doctor.probe NAME …` this prints a line of JSON a name.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# A first import without bytecode, on a busy machine or a network disk, takes half a minute.
_SECONDS = 120


@dataclass(frozen=True)
class Probed:
    """What was learnt of each library.

    Attributes:
        facts: name -> what it says of itself, for those that could be imported.
        errors: name -> why it could not be.
    """

    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def torch(self) -> dict[str, Any]:
        """The facts of torch; none where it is missing or broken."""
        return self.facts.get("torch", {})


@cache  # a process sees one machine
def probe() -> Probed:
    """What torch, bitsandbytes and flash-attn say; a few seconds, without their noise."""
    names = [name for name in _FACTS if find_spec(name) is not None]
    facts: dict[str, dict[str, Any]] = {}
    errors: dict[str, str] = {}
    while names:
        heard, ending = _heard(names)
        facts |= {line["name"]: line["facts"] for line in heard if "facts" in line}
        errors |= {line["name"]: line["error"] for line in heard if "error" in line}
        names = [name for name in names if name not in facts | errors]
        if names:
            errors[names.pop(0)] = ending
        if "torch" in errors:
            break  # the others need it
    return Probed(facts, errors)


def _heard(names: list[str]) -> tuple[list[dict[str, Any]], str]:
    """What a process says of these, a line each, and how it ended."""
    # -P: the current folder is searched last, as it is by the command, not first.
    printed, ending = _run([sys.executable, "-P", "-m", __name__, *names])
    lines = [line for line in printed.splitlines() if line.startswith('{"name"')]
    return [json.loads(line) for line in lines], ending


def _run(command: list[str]) -> tuple[str, str]:
    """What a command prints, and how it ended."""
    home = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    try:
        printed, noise = process.communicate(timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0], f"the import took longer than {_SECONDS} seconds"
    code, last = process.returncode, (noise.strip().splitlines() or [""])[-1]
    return printed, f"Python died of signal {-code}" if code < 0 else f"it ended Python: {last}"


def nvidia_cards() -> dict[str, Any]:
    """What the driver says without torch: `cards` (names), `driver`, `error`."""
    if shutil.which("nvidia-smi") is None:
        return {"cards": [], "driver": None, "error": None}
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return {"cards": [], "driver": None, "error": "it took longer than 30 seconds"}
    if asked.returncode:
        said = (asked.stdout + asked.stderr).strip().splitlines() or ["no reason is given"]
        return {"cards": [], "driver": None, "error": said[0]}
    rows = [line.rpartition(", ") for line in asked.stdout.splitlines() if line.strip()]
    driver = rows[0][2].strip() if rows else None
    return {"cards": [name for name, _, _ in rows], "driver": driver, "error": None}


def _torch_facts() -> dict[str, Any]:
    import torch

    from trl_ext.environment import devices

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "version": torch.__version__,
        "built_for": torch.version.cuda or torch.version.hip,
        "device": devices(),
        "accelerator": torch.accelerator.is_available(),
        "gpus": [_gpu_facts(index) for index in range(count)],
        "peers": count < 2 or torch.cuda.can_device_access_peer(0, 1),
        "nccl": torch.distributed.is_available() and torch.distributed.is_nccl_available(),
        "threads": torch.get_num_threads(),
    }


def _gpu_facts(index: int) -> dict[str, Any]:
    import torch

    try:  # a card that is listed may still be unable to compute; that is one of the findings
        ones = torch.ones(8, 8, device=f"cuda:{index}")
        problem = None if (ones @ ones).sum().item() == 512 else "8×8 ones multiplied are not 8"
    except (RuntimeError, AssertionError) as error:
        problem = str(error).strip().splitlines()[0]
    return {
        "name": torch.cuda.get_device_name(index),
        "capability": list(torch.cuda.get_device_capability(index)),
        "problem": problem,
    }


def _bitsandbytes_facts() -> dict[str, Any]:
    import torch
    from bitsandbytes import cextension

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "gpu_library": bool(getattr(cextension.lib, "compiled_with_cuda", False)),
        "device": device,
        "trains": nf4_problem(device),
        "trains_after_evaluation": nf4_problem(device, after_evaluation=True),
    }


def nf4_problem(device: str, *, after_evaluation: bool = False) -> str | None:
    """What is wrong with the gradient of an NF4 layer; None if it is that of its weights.

    Args:
        device: "cuda" or "cpu".
        after_evaluation: make a forward pass in evaluation mode first.
    """
    import torch
    from bitsandbytes import functional, nn

    torch.manual_seed(0)
    try:  # bitsandbytes raises errors of many kinds, and each is what is asked for here
        layer: Any = nn.Linear4bit(64, 64, bias=False, quant_type="nf4").to(device)
        weights = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        inputs = torch.randn(4, 64, device=device)
        if after_evaluation:
            with torch.no_grad():
                layer.eval()(inputs)
            layer.train()
        outputs = layer(inputs.requires_grad_())
        (gradient,) = torch.autograd.grad(outputs.sum(), inputs, allow_unused=True)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    if gradient is None:
        return "there is no gradient"
    # Of the sum of W·x with respect to x: the columns of W added up; in half precision at worst.
    off = (gradient - weights.float().sum(0)).abs().max().item()
    return None if off < 0.1 else f"the gradient is off by {off:.2g}"


def _flash_attn_facts() -> dict[str, Any]:
    import flash_attn  # pyright: ignore[reportMissingImports]

    return {"version": flash_attn.__version__}


# In the order of their imports.
_FACTS = {
    "torch": _torch_facts,
    "bitsandbytes": _bitsandbytes_facts,
    "flash_attn": _flash_attn_facts,
}


def _main(names: list[str]) -> None:
    for name in names:
        try:  # whatever an import raises is what was asked for
            line = {"name": name, "facts": _FACTS[name]()}
        except Exception as error:
            reason = str(error).strip().splitlines() or [""]
            line = {"name": name, "error": f"{type(error).__name__}: {reason[0]}"}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    _main(sys.argv[1:])
