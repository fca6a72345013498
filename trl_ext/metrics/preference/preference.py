"""How well a reward model forecasts which of two completions is preferred.

evaluate reads the imports of this file line by line.
"""

import datasets
import evaluate
import torch

from trl_ext.errors import DataError
from trl_ext.metrics.columns import CheckedColumns
from trl_ext.metrics.comparisons import comparison_scores

_INPUTS = """
Args:
    predictions: reward of the first completion minus that of the second, of each comparison.
    references: 1 where the first is preferred, 0 where the second is.
    bins: number of bins of the forecast σ(|difference|), between 0.5 and 1.

Returns:
    accuracy: part whose preferred completion has the higher reward; the same reward is wrong.
    margin: mean reward of the preferred minus that of the other.
    log_loss: mean of −log σ(margin), nats.
    brier: mean of (1 − σ(margin))².
    ece: expected calibration error of the forecasts; None if all rewards are the same.
    by_margin: from, to, accuracy and count, for each range of |margin| that is not empty.
    bins: for each bin that is not empty its mean_predicted, observed, count and standard_error, of
        the observed rate; None for a single forecast.
    num_comparisons, num_ties: how many there are, and how many have the same reward twice.
"""


class Preference(CheckedColumns, evaluate.Metric):
    """Accuracy and calibration of a reward model, by `trl_ext.metrics.comparisons`."""

    def _info(self):
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description="Accuracy and calibration of the preferences that rewards forecast.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": number, "references": number}),
        )

    def _compute(self, predictions, references, bins=10):
        differences, preferred = torch.tensor([predictions, references], dtype=torch.float64)
        wrong = preferred[(preferred != 0) & (preferred != 1)]
        if len(wrong):
            raise DataError(
                f"references holds {wrong[0].item()}; the first completion is preferred, 1, or "
                "the second, 0. Leave out ties."
            )
        if not differences.isfinite().all():
            raise DataError(
                f"predictions holds {differences[~differences.isfinite()][0].item()}; it must be a "
                "finite difference of rewards. Leave out comparisons without one."
            )
        try:
            found = comparison_scores(differences * (2 * preferred - 1), bins)
        except ValueError as error:
            raise DataError(str(error)) from error
        rows = [
            dict(zip(found.bins._fields, row, strict=True))
            for row in zip(*(column.tolist() for column in found.bins), strict=True)
            if row[2]
        ]
        for row in rows:
            row["standard_error"] = row["standard_error"] if row["count"] > 1 else None
        return {
            "accuracy": found.accuracy,
            "margin": found.margin,
            "log_loss": found.log_loss,
            "brier": found.brier,
            "ece": found.ece if rows else None,
            "by_margin": [
                dict(zip(("from", "to", "accuracy", "count"), row, strict=True))
                for row in found.by_margin
            ],
            "bins": rows,
            "num_comparisons": len(differences),
            "num_ties": found.num_ties,
        }
