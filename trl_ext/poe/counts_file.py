"""Counts as a safetensors file; what is read is checked, because look-ups trust its order."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, int64

from trl_ext.errors import RunError
from trl_ext.poe.counted_files import damaged
from trl_ext.poe.counting import Counts, CountTable


def save_counts(counts: Counts, file: Path) -> None:
    """Write them.

    Raises:
        RunError: if the file cannot be written.
    """
    tensors = {"tokens": counts.tokens}
    for number, table in enumerate(counts.tables, start=1):
        tensors |= {f"pairs.{number}": table.pairs, f"counts.{number}": table.counts}
        if table.row_keys is not None:
            tensors[f"row_keys.{number}"] = table.row_keys
    try:
        save_file(tensors, file)
    except SafetensorError as error:
        raise RunError(
            f"{file} cannot be written: {error}. Free space there, or give another folder."
        ) from error


def load_counts(file: Path, *, tables: int, chained: bool, num_tokens: int) -> Counts:
    """What `save_counts` wrote, on the CPU.

    Args:
        file: the safetensors file.
        tables: how many it must have.
        chained: whether the tables are of contexts 1, 2, … long, each row of one being a row of
            the one before and a token; else of distances, their rows being tokens.
        num_tokens: the sum of the counts of tokens.

    Raises:
        ConfigError: if the file is none, or holds no such counts.
    """
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise damaged(file, f"it cannot be read as safetensors: {error}") from error
    if tensors.keys() != _names(len(tensors), tables, chained):
        raise damaged(
            file, f"it holds {', '.join(sorted(tensors))}, not the tables of length 1 to {tables}"
        )
    for name, tensor in tensors.items():
        if tensor.dim() != 1 or tensor.dtype != int64:
            raise damaged(file, f"{name} is {tuple(tensor.shape)} {tensor.dtype}, not (N,) int64")
    tokens = tensors["tokens"]
    # As floating-point numbers, whose sum does not overflow.
    if (tokens < 0).any() or tokens.double().sum().item() != num_tokens:
        raise damaged(file, f"its tokens are not {num_tokens:,}, each counted 0 times or more")
    rows, found = len(tokens), []
    for number in range(1, tables + 1):
        keys = tensors.get(f"row_keys.{number}")
        if keys is not None:
            _check_ascending(file, f"row_keys.{number}", keys, rows * len(tokens))
            rows = len(keys)
        pairs, counts = tensors[f"pairs.{number}"], tensors[f"counts.{number}"]
        _check_ascending(file, f"pairs.{number}", pairs, rows * len(tokens))
        is_whole = len(counts) == len(pairs) and bool((counts >= 1).all())
        if not is_whole or counts.double().sum().item() > num_tokens:
            raise damaged(
                file,
                f"counts.{number} must be the {len(pairs)} counts of pairs.{number}, each 1 or "
                f"more, together at most {num_tokens:,}",
            )
        found.append(CountTable(pairs, counts, len(tokens), keys))
    return Counts(tokens, found)


def _names(most: int, tables: int, chained: bool) -> set[str]:
    """Of the tensors of that many tables; `most` bounds what a wrong number makes of them."""
    numbers = range(1, min(tables, most) + 1)
    names = {f"{part}.{number}" for number in numbers for part in ("pairs", "counts")}
    return {"tokens"} | names | {f"row_keys.{number}" for number in numbers[1:] if chained}


def _check_ascending(file: Path, name: str, values: Tensor, end: int) -> None:
    """Whether these are different numbers from 0 to `end` − 1, in order."""
    if len(values) and not (values[0] >= 0 and values[-1] < end and (values.diff() > 0).all()):
        raise damaged(file, f"{name} must ascend from 0 or more to less than {end}")
