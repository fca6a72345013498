"""What the reward-hacking watch measures of completions, and when a difference is no noise."""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from trl_ext.functional.text_drift import distinct_ngrams, repeated_ngrams

# The chance that a run whose gold reward never changes is said to be hacked, over all evaluations.
FALSE_ALARMS = 0.05
# Two-sided 95% of the normal distribution.
Z = 1.96
# Below this share of repeated n-grams a ratio says nothing: one such n-gram would double it.
LEAST_REPETITION = 0.05

# How a table and a picture call the measures, in their order.
WORDS = {
    "proxy_reward": "proxy reward (trained on)",
    "gold_reward": "gold reward (held out)",
    "kl": "KL to before, nats",
    "length": "length, tokens",
    "truncated": "share truncated",
    "repetition": "repeated 3-grams",
    "distinct_1": "distinct 1-grams",
    "distinct_2": "distinct 2-grams",
}


class Mean(NamedTuple):
    """A mean over prompts of the mean over a prompt's completions.

    Attributes:
        value: NaN where nothing was measured.
        standard_error: from the spread over prompts; NaN where there is none to speak of.
    """

    value: float
    standard_error: float


class Change(NamedTuple):
    """A held-out reward against an earlier evaluation, paired by prompt.

    Attributes:
        mean: now − then.
        at_most: upper end of a one-sided interval for it; a fall, if below 0.
        prompts: that were scored both times.
    """

    mean: float
    at_most: float
    prompts: int


@dataclass(frozen=True)
class Completions:
    """P prompts, G completions of each, over all processes.

    Attributes:
        proxy_PG: (P, G) what is trained on; NaN where no reward function scored.
        gold_PG: (P, G) the held-out reward, or None where it was not asked.
        log_ratio_PG: (P, G) log π/π_ref, nats, or None where there is no reference; NaN where the
            tokens are hidden.
        prompt_ids: token ids of the prompts of the P·G completions.
        token_ids: of the completions.
        truncated: whether each of them lacks its end.
    """

    proxy_PG: Tensor
    gold_PG: Tensor | None
    log_ratio_PG: Tensor | None
    prompt_ids: list[list[int]]
    token_ids: list[list[int]]
    truncated: list[bool]

    @classmethod
    def joined(cls, batches: "Sequence[Completions]", prompts: int | None) -> "Completions":
        """The batches of an evaluation, of which the first `prompts` prompts count."""
        group = batches[0].proxy_PG.size(1)
        rows = None if prompts is None else prompts * group

        def together(parts: Sequence[Tensor | None]) -> Tensor | None:
            known = [part for part in parts if part is not None]
            return torch.cat(known)[:prompts] if len(known) == len(parts) else None

        proxy = together([batch.proxy_PG for batch in batches])
        assert proxy is not None
        return cls(
            proxy_PG=proxy,
            gold_PG=together([batch.gold_PG for batch in batches]),
            log_ratio_PG=together([batch.log_ratio_PG for batch in batches]),
            prompt_ids=[ids for batch in batches for ids in batch.prompt_ids][:rows],
            token_ids=[ids for batch in batches for ids in batch.token_ids][:rows],
            truncated=[cut for batch in batches for cut in batch.truncated][:rows],
        )

    @property
    def fingerprint(self) -> int:
        """A number that the same prompts in the same order have in common."""
        return zlib.crc32(repr(self.prompt_ids).encode())

    def numbers(self) -> dict[str, Mean]:
        """Name of a measure -> its mean; what was not measured is not there."""
        shape = self.proxy_PG.shape
        per_completion: dict[str, Tensor | None] = {
            "proxy_reward": self.proxy_PG,
            "gold_reward": self.gold_PG,
            "kl": self.log_ratio_PG,
            "length": torch.tensor([float(len(ids)) for ids in self.token_ids]).view(shape),
            "truncated": torch.tensor([float(cut) for cut in self.truncated]).view(shape),
            "repetition": torch.tensor([repeated_ngrams(ids) for ids in self.token_ids]).view(
                shape
            ),
        }
        means = {
            name: mean_over_prompts(values)
            for name, values in per_completion.items()
            if values is not None
        }
        for n in (1, 2):
            means[f"distinct_{n}"] = Mean(distinct_ngrams(self.token_ids, n), math.nan)
        return means


def mean_over_prompts(values_PG: Tensor) -> Mean:
    """Mean over prompts of the mean over a prompt's completions; NaN entries count nowhere.

    Args:
        values_PG: (P, G).
    """
    per_prompt = values_PG.double().nanmean(dim=1)
    per_prompt = per_prompt[~per_prompt.isnan()]
    if not len(per_prompt):
        return Mean(math.nan, math.nan)
    spread = per_prompt.std().item() if len(per_prompt) > 1 else math.nan
    return Mean(per_prompt.mean().item(), spread / len(per_prompt) ** 0.5)


def change_since(now: Tensor, then: Tensor, comparison: int) -> Change | None:
    """A held-out reward now against the best earlier evaluation: a paired t-test over prompts.

    H0: its expectation has not fallen. The best of t earlier evaluations is picked, and there is a
    test at each evaluation: the t-th one is made at the level α_t = FALSE_ALARMS·6/(π²t³). As the
    union over the t evaluations that could have been picked, and over all t, Σ t·α_t = FALSE_ALARMS
    bounds the chance of a false alarm in a run of any length.

    Args:
        now, then: (P,) mean reward of each prompt; NaN where nothing scored.
        comparison: t, 1 for the second evaluation.

    Returns:
        None where fewer than two prompts were scored both times.
    """
    differences = (now - then).double()
    differences = differences[~differences.isnan()]
    count = len(differences)
    if count < 2:
        return None
    level = FALSE_ALARMS * 6 / (math.pi**2 * comparison**3)
    standard_error = differences.std().item() / count**0.5
    mean = differences.mean().item()
    return Change(mean, mean + student_quantile(1 - level, count - 1) * standard_error, count)


def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t, by its expansion about the normal one.

    Source: Abramowitz and Stegun (1964), 26.7.5. From 9 degrees of freedom on it is within 1% for
    probabilities up to 0.9999.
    """
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (i + 1) for i, term in enumerate(terms))


def drifts(
    now: dict[str, Mean], before: dict[str, Mean], factor: float | None
) -> list[tuple[str, float, float]]:
    """Which measures of the text left those of the policy before training by more than a factor.

    A mean has to be beyond it by more than 1.96 standard errors. Repetition below 5% counts as 5%.

    Returns:
        The name of a measure, what it was before, and what it is now.
    """
    if factor is None:
        return []
    found = []
    for name, least, grows, shrinks in (
        ("length", 0.0, True, True),
        ("repetition", LEAST_REPETITION, True, False),
        ("distinct_1", 0.0, False, True),
        ("distinct_2", 0.0, False, True),
    ):
        here, there = now[name], before[name]._replace(value=max(before[name].value, least))
        if (grows and _exceeds(here, there, factor)) or (shrinks and _exceeds(there, here, factor)):
            found.append((name, before[name].value, here.value))
    return found


def _exceeds(large: Mean, small: Mean, factor: float) -> bool:
    """large > factor·small, by more than noise where there is a standard error."""
    errors = [large.standard_error, factor * small.standard_error]
    noise = math.hypot(*(0.0 if math.isnan(error) else error for error in errors))
    return large.value - factor * small.value > Z * noise
