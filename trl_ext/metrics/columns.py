"""What the metrics ask of the columns that they are given, whole or by batches."""

from numbers import Real
from typing import Any

from trl_ext.errors import DataError


class CheckedColumns:
    """Before `evaluate.Metric` among the bases: columns that do not fit are a `DataError`."""

    def add_batch(self, **columns: Any) -> None:
        """As evaluate's; a batch without entries adds nothing.

        Raises:
            DataError: a column is missing or of another length, or holds None or another type.
        """
        metric: Any = super()
        if _size(metric._feature_names(), columns):
            metric.add_batch(**columns)

    def compute(self, **given: Any) -> dict[str, Any] | None:
        """As evaluate's.

        Raises:
            DataError: as `add_batch`, or there is no entry at all.
        """
        metric: Any = super()
        itself: Any = self
        names = metric._feature_names()
        columns = {name: given[name] for name in names if given.get(name) is not None}
        if not (_size(names, columns) if columns else itself.writer):
            raise DataError(
                f"There is no entry to compute from. Give {' and '.join(names)}, or add_batch them."
            )
        return metric.compute(**given)


def _size(names: list[str], columns: dict[str, Any]) -> int:
    """The length of all columns."""
    lengths = {name: len(columns[name]) for name in names if columns.get(name) is not None}
    if len(lengths) < len(names):
        missing = " and ".join(name for name in names if name not in lengths)
        raise DataError(f"The column {missing} is missing; give {', '.join(names)}.")
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{size} {name}" for name, size in lengths.items())
        raise DataError(f"The columns must have one length, got {told}.")
    for name in names:
        _check_entries(name, columns[name])
    return lengths[names[0]]


def _check_entries(name: str, column: Any) -> None:
    listed = column.tolist() if hasattr(column, "tolist") else column
    for row, entry in enumerate(listed):
        if not isinstance(entry, (str | int) if name == "groups" else Real):
            kind = "a text or a whole number" if name == "groups" else "a number"
            raise DataError(
                f"Entry {row} of {name} is {entry!r}; it must be {kind}. Leave out entries without "
                "one."
            )
