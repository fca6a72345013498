"""How alike two scorers order the completions or prefixes of each prompt.

evaluate reads the imports of this file line by line.
"""

import dataclasses

import datasets
import evaluate

from trl_ext.metrics.agreement import score_agreement
from trl_ext.metrics.columns import CheckedColumns

_INPUTS = """
Args:
    predictions: the score of each entry by one scorer.
    references: the score of each by the other.
    groups: the prompt of each, a text or a whole number.

Returns:
    kendall_tau_b, spearman: rank correlations within prompts, mean over prompts.
    kendall_interval, spearman_interval: 95% bootstrap intervals over prompts; None for one prompt.
    num_prompts, num_pairs: that count; num_undefined: prompts in which a scorer is constant.
"""


class RankAgreement(CheckedColumns, evaluate.Metric):
    """Kendall's τ_b and Spearman's ρ within prompts, by `score_agreement`."""

    def _info(self):
        numbers = {
            "predictions": datasets.Value("float64"),
            "references": datasets.Value("float64"),
        }
        return evaluate.MetricInfo(
            description="Rank correlations of two lists of scores within groups.",
            citation="",
            inputs_description=_INPUTS,
            features=[
                datasets.Features(numbers | {"groups": datasets.Value(kind)})
                for kind in ("string", "int64")
            ],
        )

    def _compute(self, predictions, references, groups):
        return dataclasses.asdict(score_agreement(predictions, references, groups))
