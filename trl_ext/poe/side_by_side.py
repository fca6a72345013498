"""What a product of experts answers, beside what each of its experts answers alone."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from trl_ext.poe.corpora import Prompt
from trl_ext.poe.drawing import Sampling, draw, repeated, score, texts_of, with_weights
from trl_ext.poe.product import ProductOfExperts

PRODUCT = "product"


@dataclass(frozen=True)
class Row:
    """An answer of the product to a prompt, and what its experts say.

    Attributes:
        prompt: as it was given.
        sample: which answer to that prompt, from 0.
        product: the answer.
        experts: name -> the answer that the expert gives alone; empty if it was not asked for.
        weights: name -> weight.
        log_likelihood: name -> nats per token of the product's answer under the expert, and under
            the product as `product`. The end token counts.
        log_z: nats, mean over the tokens of the answer.
        tokens: of the product's answer, the end token included.
    """

    prompt: Prompt
    sample: int
    product: str
    experts: dict[str, str]
    weights: dict[str, float]
    log_likelihood: dict[str, float]
    log_z: float
    tokens: int

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class SideBySide:
    """Answers prompts with a product, and with each expert alone, on the same random numbers.

    With the same random numbers an expert that is the whole product gives the product's answer.

    Args:
        product: with `tokenizer`; its generation config is replaced.
        weights: name -> weight, for the record.
        sampling: how answers are drawn.
        own_answers: whether the experts answer too. One expert alone is the product.
    """

    def __init__(
        self,
        product: ProductOfExperts,
        weights: Mapping[str, float],
        sampling: Sampling,
        *,
        own_answers: bool = True,
    ):
        self.product = product
        self.tokenizer = product.tokenizer
        self.weights = dict(weights)
        self.sampling = sampling
        config = sampling.config(product)
        product.generation_config = config
        self._clocks = {PRODUCT: _Clock()}
        self._alone: dict[str, ProductOfExperts] = {}
        for name in product.experts if own_answers and len(product.experts) > 1 else ():
            self._alone[name] = with_weights(product, {name: 1.0})
            self._alone[name].generation_config = config
            self._clocks[name] = _Clock()
        self._seeds = sampling.seeds()

    @property
    def names(self) -> list[str]:
        """Of those who answer: the experts, and the product last."""
        return [*self._alone, PRODUCT]

    def answer(self, prompts: Sequence[Prompt], prompt_ids: Sequence[list[int]]) -> list[Row]:
        """Rows of a batch of prompts: each prompt's samples behind one another."""
        seed = next(self._seeds)
        completions = self._drawn(PRODUCT, self.product, prompt_ids, seed)
        own = {
            name: self._texts(self._drawn(name, expert, prompt_ids, seed))
            for name, expert in self._alone.items()
        }
        return self._rows(prompts, prompt_ids, completions, own)

    def stream(self, prompt: Prompt, ids: list[int], announce: Any) -> list[Row]:
        """As `answer`, to one prompt, printing tokens as they come.

        Args:
            announce: called with the name of who answers, before it does.
        """
        from transformers import TextStreamer

        seed, several = next(self._seeds), [ids] * self.sampling.num_samples
        answers: dict[str, list[list[int]]] = {}
        for name, expert in {PRODUCT: self.product, **self._alone}.items():
            answers[name] = []
            for place, one in enumerate(several):
                announce(name)
                streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
                more = {"streamer": streamer, "num_return_sequences": 1}
                answers[name] += self._drawn(name, expert, [one], seed + place, **more)
        own = {name: self._texts(answers[name]) for name in self._alone}
        return self._rows([prompt], [ids], answers[PRODUCT], own)

    def speeds(self) -> dict[str, float]:
        """Name -> tokens per second so far; who has drawn nothing is left out."""
        return {name: clock.speed for name, clock in self._clocks.items() if clock.seconds}

    def _drawn(
        self,
        name: str,
        expert: ProductOfExperts,
        prompt_ids: Sequence[list[int]],
        seed: int,
        **more: Any,
    ) -> list[list[int]]:
        clock = self._clocks[name]
        if not clock.seconds and expert.device.type != "cpu":
            draw(expert, prompt_ids, seed, max_new_tokens=1)  # the first kernels are slow
        begin = time.perf_counter()
        completions = draw(expert, prompt_ids, seed, **more)
        clock.add(sum(map(len, completions)), time.perf_counter() - begin)
        return completions

    def _texts(self, completions: Sequence[list[int]]) -> list[str]:
        return texts_of(self.tokenizer, completions)

    def _rows(
        self,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[list[int]],
        completions: Sequence[list[int]],
        own: Mapping[str, Sequence[str]],
    ) -> list[Row]:
        each = self.sampling.num_samples
        scores = score(self.product, repeated(prompt_ids, each), completions)
        under = {**scores.experts, PRODUCT: scores.product}
        return [
            Row(
                prompt=prompts[place // each],
                sample=place % each,
                product=text,
                experts={name: texts[place] for name, texts in own.items()},
                weights=self.weights,
                log_likelihood={name: fmean(logps[place]) for name, logps in under.items()},
                log_z=fmean(scores.log_z[place]),
                tokens=len(completions[place]),
            )
            for place, text in enumerate(self._texts(completions))
        ]


class _Clock:
    """Tokens and the seconds that they took."""

    def __init__(self) -> None:
        self.tokens, self.seconds = 0, 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self.tokens += tokens
        self.seconds += seconds

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds
