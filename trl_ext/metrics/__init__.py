"""Metrics for Hugging Face `evaluate`, from local files: nothing is fetched from a hub.

`load_metric("preference")` is `evaluate.load` of the file's path; both have `compute`, `add_batch`
and the rest. A column holds no None: leave out an entry without a value.
"""

import difflib
from pathlib import Path
from typing import Any

from trl_ext.errors import UnknownNameError

METRICS = (
    "best_of_n",
    "calibration",
    "chrf",
    "first_error",
    "preference",
    "rank_agreement",
    "rouge",
)


def metric_path(name: str) -> Path:
    """The file that `evaluate.load` takes.

    Raises:
        UnknownNameError: if there is no such metric.
    """
    if name not in METRICS:
        close = difflib.get_close_matches(str(name), METRICS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UnknownNameError(
            f"There is no metric {name!r}.{hint} There are {', '.join(METRICS)}; evaluate.load "
            "opens others."
        )
    return Path(__file__).parent / name / f"{name}.py"


def load_metric(name: str, **options: Any) -> Any:
    """A metric as an `evaluate.EvaluationModule`.

    Args:
        name: one of `METRICS`.
        options: for `evaluate.load`, such as `keep_in_memory` or `experiment_id`.

    Raises:
        UnknownNameError: if there is no such metric.
    """
    path = metric_path(name)
    import evaluate  # a second that most users of the package need not wait for

    return evaluate.load(str(path), **options)
