"""Peak memory of a piece of work in this process: the device's, or on Linux the resident set."""

import ctypes
import gc
from pathlib import Path

import torch


def forget_peak() -> int:
    """Give freed memory back and start the peak anew; bytes held now."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    # Not getrusage: its mark cannot be reset, and a child starts with its parent's.
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """Bytes held at most since `forget_peak`."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)
