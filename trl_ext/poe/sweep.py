"""How a product of two experts changes with their weights 1 − α and α."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

from trl_ext.errors import ConfigError, RewardError
from trl_ext.registry import Registry
from trl_ext.rewards.guard import FAILURES, raised
from trl_ext.rewards.returned import FLOAT32_MAX, cut

if TYPE_CHECKING:
    from trl_ext.poe.drawing import Sampling
    from trl_ext.poe.product import ProductOfExperts

MOST_POINTS = 1000
METRICS = Registry(
    "metric",
    "trl_ext.metrics",
    {"sentiment": "trl_ext.rewards.vader:sentiment", "words": "trl_ext.poe.sweep:words"},
    "a function (texts) -> one number a text",
)

Metric = Callable[[list[str]], Sequence[float]]


class Mean(NamedTuple):
    """A mean over prompts and its standard error; NaN for a single prompt."""

    mean: float
    standard_error: float


@dataclass(frozen=True)
class Point:
    """What the product of weights 1 − α and α samples.

    Means are over prompts; what is per token is first averaged over the tokens of a prompt's
    samples, end tokens included.

    Attributes:
        alpha: the weight of the expert that is swept.
        log_likelihood: name -> nats per token of the samples under that expert.
        log_z: nats per token.
        perplexity: exp of minus the mean log-likelihood under the reference expert.
        distinct_2: distinct pairs of neighbouring tokens, over all pairs.
        tokens: sampled, of all prompts.
        metric: of the texts, if there is one.
        texts: the samples, a list a prompt.
    """

    alpha: float
    log_likelihood: dict[str, Mean]
    log_z: Mean
    perplexity: float
    distinct_2: float
    tokens: int
    metric: Mean | None
    texts: list[list[str]]

    def record(self) -> dict[str, Any]:
        """For JSON: a mean is {mean, standard_error}."""
        return asdict(self) | {
            "log_likelihood": {name: m._asdict() for name, m in self.log_likelihood.items()},
            "log_z": self.log_z._asdict(),
            "metric": self.metric and self.metric._asdict(),
        }


def parse_alphas(text: str) -> list[float]:
    """The weights that `0:1:0.25` (start:stop:step, stop included) or `0,0.3,1` names.

    Raises:
        ConfigError: if it is neither.
    """
    allowed = "write start:stop:step, such as 0:1:0.25, or a list, such as 0,0.3,1."
    try:
        numbers = [float(part) for part in text.split(":" if ":" in text else ",")]
    except ValueError:
        raise ConfigError(f"A sweep over {text!r} names no numbers; {allowed}") from None
    if not all(map(math.isfinite, numbers)) or (":" in text and len(numbers) != 3):
        raise ConfigError(f"A sweep over {text!r} cannot be read; {allowed}")
    if ":" not in text:
        return numbers
    start, stop, step = numbers
    if step <= 0 or stop < start:
        raise ConfigError(
            f"A sweep over {text!r} has no values: the step must be greater than 0 and stop at "
            f"least start; {allowed}"
        )
    # 0.3/0.1 is 2.9999999999999996.
    count = math.floor((stop - start) / step + 1e-9) + 1
    if count > MOST_POINTS:
        raise ConfigError(
            f"A sweep over {text!r} has {count} values; at most {MOST_POINTS} are taken; {allowed}"
        )
    return [round(start + place * step, 12) for place in range(count)]


def load_metric(name: str) -> Metric:
    """A metric by name or `package.module:function`, tried on two texts.

    Raises:
        UnknownNameError, PluginError: if it cannot be loaded.
        RewardError: if it raises, or does not return one number a text.
    """
    metric = METRICS.load(name)
    measure(metric, name, ["One text.", "Another one."])
    return metric


def measure(metric: Metric, name: str, texts: list[str]) -> list[float]:
    """A metric's numbers, checked.

    Raises:
        RewardError: as `load_metric`.
    """
    try:
        values = [float(value) for value in metric(texts)]
    except FAILURES as error:  # a user's function may fail in any way
        raise RewardError(
            f"The metric {name!r} raised {raised(error)}, on {len(texts)} texts. It must be "
            f"{METRICS.must_be}."
        ) from error
    if len(values) != len(texts):
        raise RewardError(
            f"The metric {name!r} returned {len(values)} numbers for {len(texts)} texts. It must "
            f"be {METRICS.must_be}."
        )
    for value, text in zip(values, texts, strict=True):
        if not abs(value) <= FLOAT32_MAX:
            raise RewardError(
                f"The metric {name!r} returned {value} for the text {cut(text)}. It must be "
                f"{METRICS.must_be}, each finite: return one for any text, an empty one too."
            )
    return values


def words(texts: list[str]) -> list[float]:
    """How many words each text has."""
    return [float(len(text.split())) for text in texts]


def weights_at(experts: Sequence[str], name: str, alpha: float) -> dict[str, float]:
    """α for the expert of that name and 1 − α for the other, in the experts' order."""
    return {expert: alpha if expert == name else 1 - alpha for expert in experts}


def check_alphas(
    experts: Sequence[str], name: str, alphas: Sequence[float], plausibility: float | None
) -> None:
    """Whether a product can be made at each α.

    Raises:
        ConfigError: if not; with the α.
    """
    from trl_ext.poe.weights import WeightRule

    for alpha in alphas:
        weights = weights_at(experts, name, alpha)
        try:
            WeightRule(experts, weights, [0.0] * len(experts), plausibility is not None)
        except ConfigError as error:
            raise ConfigError(f"The sweep cannot go to α = {alpha:g}. {error}") from error


def sweep(
    product: "ProductOfExperts",
    name: str,
    alphas: Sequence[float],
    prompt_ids: Sequence[list[int]],
    sampling: "Sampling",
    *,
    reference: str,
    batch_size: int,
    metric: tuple[str, Metric] | None = None,
) -> Iterator[Point]:
    """Sample from the product of two experts at each α. Equation E14.

    The same random numbers are used at each.

    Args:
        product: of two experts; its weights are not used.
        name: of the expert with the weight α; the other has 1 − α.
        alphas: the weights.
        prompt_ids: token ids of the prompts.
        sampling: how answers are drawn.
        reference: the expert that gives the perplexity.
        batch_size: prompts at a time.
        metric: its name, and a function of texts.

    Raises:
        ConfigError: if the weights of an α are none; before anything is sampled.
    """
    from trl_ext.poe.drawing import with_weights

    experts = list(product.experts)
    check_alphas(experts, name, alphas, product.plausibility)
    config = sampling.config(product)
    for alpha in alphas:
        at_alpha = with_weights(product, weights_at(experts, name, alpha))
        at_alpha.generation_config = config
        yield _point(at_alpha, alpha, prompt_ids, sampling, reference, batch_size, metric)


def _point(
    product: "ProductOfExperts",
    alpha: float,
    prompt_ids: Sequence[list[int]],
    sampling: "Sampling",
    reference: str,
    batch_size: int,
    metric: tuple[str, Metric] | None,
) -> Point:
    from trl_ext.poe.drawing import draw, repeated, score, texts_of

    each, seeds = sampling.num_samples, sampling.seeds()
    completions: list[list[int]] = []
    logps: dict[str, list[list[float]]] = {name: [] for name in product.experts}
    log_z: list[list[float]] = []
    for begin in range(0, len(prompt_ids), batch_size):
        batch = prompt_ids[begin : begin + batch_size]
        drawn = draw(product, batch, next(seeds))
        scores = score(product, repeated(batch, each), drawn)
        completions += drawn
        log_z += scores.log_z
        for expert, rows in scores.experts.items():
            logps[expert] += rows
    texts = texts_of(product.tokenizer, completions)
    means = {expert: mean_of(_by_prompt(rows, each)) for expert, rows in logps.items()}
    measured = None
    if metric is not None:
        values = [[value] for value in measure(metric[1], metric[0], texts)]
        measured = mean_of(_by_prompt(values, each))
    return Point(
        alpha=alpha,
        log_likelihood=means,
        log_z=mean_of(_by_prompt(log_z, each)),
        perplexity=perplexity_of(means[reference].mean),
        distinct_2=distinct_2(completions),
        tokens=sum(map(len, completions)),
        metric=measured,
        texts=list(_grouped(texts, each)),
    )


def _by_prompt(rows: Sequence[Sequence[float]], each: int) -> list[float]:
    """The mean of each prompt, over all values of its samples."""
    return [fmean(v for row in group for v in row) for group in _grouped(rows, each)]


def _grouped(rows: Sequence[Any], each: int) -> Iterator[list[Any]]:
    left = iter(rows)
    while group := list(islice(left, each)):
        yield group


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and standard error of values that are independent; NaN if one is not finite."""
    is_known = len(values) > 1 and all(map(math.isfinite, values))
    error = stdev(values) / len(values) ** 0.5 if is_known else math.nan
    return Mean(fmean(values), error)


def perplexity_of(log_likelihood: float) -> float:
    """exp of minus a mean log-likelihood in nats per token; inf where that is too large."""
    try:
        return math.exp(-log_likelihood)
    except OverflowError:
        return math.inf


def distinct_2(completions: Sequence[Sequence[int]]) -> float:
    """Distinct pairs of neighbouring tokens over all pairs; NaN if there is none.

    Source: Li et al. (2016), "A diversity-promoting objective function" (arXiv:1510.03055).
    """
    pairs = [pair for ids in completions for pair in pairwise(ids)]
    return len(set(pairs)) / len(pairs) if pairs else math.nan


def as_mapping(points: Sequence[Point], **facts: Any) -> Mapping[str, Any]:
    """A sweep for JSON: facts about it, and its points."""
    return {**facts, "points": [point.record() for point in points]}
