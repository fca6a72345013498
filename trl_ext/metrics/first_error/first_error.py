"""ProcessBench's measure of first errors: accuracy on erroneous and correct solutions, and F1.

evaluate reads the imports of this file line by line.
"""

import dataclasses

import datasets
import evaluate

from trl_ext.metrics.columns import CheckedColumns
from trl_ext.metrics.processbench import f1

_INPUTS = """
Args:
    predictions: the first wrong step of each solution, counted from 0; −1 for none.
    references: the true ones.

Returns:
    accuracy_error: part of the erroneous solutions whose first error is predicted exactly.
    accuracy_correct: part of the correct solutions that are predicted to have none.
    f1: harmonic mean of the two; 0 if both are.
    num_error, num_correct: numbers of solutions.
"""


class FirstError(CheckedColumns, evaluate.Metric):
    """F1 of predicted first errors, by `f1` of processbench.py."""

    def _info(self):
        # As whole numbers, evaluate would cut 1.7 down to 1 without a word.
        step = datasets.Value("float64")
        return evaluate.MetricInfo(
            description="ProcessBench's F1 of predicted first errors.",
            citation="Zheng et al. (2024), ProcessBench, arXiv 2412.06559",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": step, "references": step}),
        )

    def _compute(self, predictions, references):
        return dataclasses.asdict(f1(_steps(predictions), _steps(references)))


def _steps(column):
    return [int(value) if value.is_integer() else value for value in column]
