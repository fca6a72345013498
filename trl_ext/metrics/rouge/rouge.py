"""ROUGE: how many n-grams, or how long a subsequence, a text shares with a reference.

evaluate reads the imports of this file line by line.
"""

import datasets
import evaluate
from rouge_score import rouge_scorer

TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_INPUTS = """
Args:
    predictions: texts.
    references: a text each, or a list of texts, of which the best fitting one counts.
    use_stemmer: compare stems of English words.

Returns:
    rouge1, rouge2, rougeL, rougeLsum: F measures between 0 and 1, means over the predictions.
"""


class Rouge(evaluate.Metric):
    """The F measures of the package rouge-score, under the names of the hub's metric."""

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="F measures of shared n-grams and subsequences (Lin, 2004).",
            citation="",
            inputs_description=_INPUTS,
            features=[
                datasets.Features({"predictions": text, "references": text}),
                datasets.Features({"predictions": text, "references": datasets.List(text)}),
            ],
        )

    def _compute(self, predictions, references, use_stemmer=False):
        scorer = rouge_scorer.RougeScorer(list(TYPES), use_stemmer=use_stemmer)
        found = [
            scorer.score_multi([right] if isinstance(right, str) else right, said)
            for said, right in zip(predictions, references, strict=True)
        ]
        return {kind: sum(each[kind].fmeasure for each in found) / len(found) for kind in TYPES}
