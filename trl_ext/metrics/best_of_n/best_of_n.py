"""How good the highest-scored of n completions of a prompt is, on average over prompts and draws.

evaluate reads the imports of this file line by line.
"""

import datasets
import evaluate
import torch

from trl_ext.errors import DataError
from trl_ext.functional.selection import best_of_n_accuracy
from trl_ext.metrics.agreement import rows_by_name
from trl_ext.metrics.columns import CheckedColumns

_INPUTS = """
Args:
    predictions: the score of each completion. NaN: it has none, and is left out.
    references: the correctness of each, 0 or 1.
    groups: the prompt of each, a text or a whole number.
    n: number of completions drawn of each prompt without replacement.

Returns:
    accuracy: expected correctness of the best of n, mean over prompts.
    standard_error: of that mean, over prompts; None for one prompt.
    num_groups: number of prompts.
"""


class BestOfN(CheckedColumns, evaluate.Metric):
    """Expected correctness of the highest-scored of n completions, by `best_of_n_accuracy`."""

    def _info(self):
        numbers = {
            "predictions": datasets.Value("float64"),
            "references": datasets.Value("float64"),
        }
        return evaluate.MetricInfo(
            description="Expected correctness of the highest-scored of n completions.",
            citation="",
            inputs_description=_INPUTS,
            features=[
                datasets.Features(numbers | {"groups": datasets.Value(kind)})
                for kind in ("string", "int64")
            ],
        )

    def _compute(self, predictions, references, groups, n=1):
        scores = torch.tensor(predictions, dtype=torch.float64)
        correct = torch.tensor(references, dtype=torch.float64)
        wrong = correct[(correct != 0) & (correct != 1)]
        if len(wrong):
            raise DataError(
                f"references holds {wrong[0].item()}; a completion is right, 1, or wrong, 0."
            )
        rows = rows_by_name(groups)
        for group, members in rows.items():
            scored = len(members) - int(scores[members].isnan().sum())
            if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= scored:
                raise DataError(
                    f"n must be a whole number between 1 and the {scored} scored completions of "
                    f"group {group!r}, got {n!r}."
                )
        found = torch.stack([best_of_n_accuracy(scores[m], correct[m], n) for m in rows.values()])
        spread = (found.std() / len(found) ** 0.5).item() if len(found) > 1 else None
        return {
            "accuracy": found.mean().item(),
            "standard_error": spread,
            "num_groups": len(found),
        }
