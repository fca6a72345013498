"""How far predicted probabilities of success can be believed.

evaluate reads the imports of this file line by line.
"""

import datasets
import evaluate
import torch

from trl_ext.errors import DataError
from trl_ext.functional.calibration import Binning, brier, expected_calibration_error, reliability
from trl_ext.metrics.columns import CheckedColumns

_INPUTS = """
Args:
    predictions: predicted probabilities, between 0 and 1.
    references: outcomes, 1 for a success, else 0.
    bins: number of bins.
    binning: "width" for bins of equal width, "mass" for as many predictions in each.

Returns:
    ece: expected calibration error.
    brier: mean squared error of the probabilities.
    bins: for each bin that is not empty its mean_predicted, observed, count and standard_error, of
        the observed rate; None for a single prediction.
"""


class Calibration(CheckedColumns, evaluate.Metric):
    """Calibration error, Brier score and reliability, by `trl_ext.functional.calibration`."""

    def _info(self):
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description="Expected calibration error, Brier score and reliability by bins.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": number, "references": number}),
        )

    def _compute(self, predictions, references, bins=10, binning: Binning = "width"):
        predicted, observed = torch.tensor([predictions, references], dtype=torch.float64)
        try:
            columns = reliability(predicted, observed, bins, binning=binning)
        except ValueError as error:
            raise DataError(str(error)) from error
        rows = [
            dict(zip(columns._fields, row, strict=True))
            for row in zip(*(column.tolist() for column in columns), strict=True)
            if row[2]
        ]
        for row in rows:
            row["standard_error"] = row["standard_error"] if row["count"] > 1 else None
        return {
            "ece": expected_calibration_error(predicted, observed, bins, binning=binning).item(),
            "brier": brier(predicted, observed).item(),
            "bins": rows,
        }
