"""Other libraries' messages and bars as models load, which no user can act on, kept back."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_messages() -> Iterator[None]:
    """Keep back what is said as transformers, peft and bitsandbytes are imported or load."""
    # Of a kernel that nothing here uses; it reads as if the installation had failed.
    kernels = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = kernels.level
    kernels.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # peft's own use of names that transformers renames.
            for name in ("gradient_checkpointing.*", "is_gradient_checkpointing.*"):
                warnings.filterwarnings("ignore", message=f"`?{name} is deprecated")
            yield
    finally:
        kernels.setLevel(level)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without messages, and with transformers' bars on a terminal only; afterwards as it was."""
    from transformers.utils import logging as of_transformers

    hides = not sys.stderr.isatty() and of_transformers.is_progress_bar_enabled()
    if hides:
        of_transformers.disable_progress_bar()
    try:
        with without_messages():
            yield
    finally:
        if hides:
            of_transformers.enable_progress_bar()
