"""chrF: how many character n-grams a text shares with a reference, in any language.

evaluate reads the imports of this file line by line.
"""

import datasets
import evaluate
from sacrebleu.metrics import CHRF

_INPUTS = """
Args:
    predictions: texts.
    references: a text each, or a list of texts, of which the best fitting one counts.
    word_order: 0 for chrF, 2 for chrF++, which counts pairs of words as well.

Returns:
    score: between 0 and 100, of the predictions together.
"""


class Chrf(evaluate.Metric):
    """chrF of the package sacrebleu, under the names of the hub's metric."""

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="F measure of shared character n-grams (Popovic, 2015).",
            citation="",
            inputs_description=_INPUTS,
            features=[
                datasets.Features({"predictions": text, "references": text}),
                datasets.Features({"predictions": text, "references": datasets.List(text)}),
            ],
        )

    def _compute(self, predictions, references, word_order=0):
        several = [[right] if isinstance(right, str) else right for right in references]
        # sacrebleu has a row for each set of references, and None where a text has fewer.
        width = max(map(len, several))
        rows: list = [
            [each[i] if i < len(each) else None for each in several] for i in range(width)
        ]
        return {"score": CHRF(word_order=word_order).corpus_score(predictions, rows).score}
