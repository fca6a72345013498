"""What comes of model files that are cut, damaged or another model's."""

from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from trl_ext.errors import TrlExtError

_KINDS = (
    OSError,  # missing, not to be read; also what huggingface_hub raises
    ValueError,  # JSON, UTF-8, and whatever transformers and peft check
    LookupError,  # keys that a configuration lacks
    TypeError,  # JSON of another kind than expected
    AttributeError,
    ArithmeticError,  # sizes of 0
    ImportError,  # a quantisation whose package is not installed
    RuntimeError,  # weights of another shape, or cut ones in torch's format; memory
    EOFError,
    UnpicklingError,
    SafetensorError,
    StrictDataclassError,
)


class Unreadable(Exception):
    """The reason, on one line, why files could not be opened as what they should be."""


@contextmanager
def reading_files() -> Iterator[None]:
    """Opens a model, an adapter or a tokenizer.

    Raises:
        Unreadable: it is not there, or its files are damaged or do not fit.
    """
    try:
        yield
    except (TrlExtError, Unreadable):
        raise
    except Exception as error:
        # The tokenizers package raises Exception itself.
        if isinstance(error, _KINDS) or type(error) is Exception:
            raise Unreadable(_reason(error)) from error
        raise


def _reason(error: Exception) -> str:
    """The first line, with the one behind it where that one only announces it."""
    first, *rest = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    if first.endswith(":") and rest:
        first = f"{first} {rest[0]}"
    # A KeyError's text is the key alone.
    says = first if first and not isinstance(error, KeyError) else f"{type(error).__name__} {first}"
    return says.strip().rstrip(".:!")
