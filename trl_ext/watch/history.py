"""What the watch has measured so far, and what in it is a sign of reward hacking."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trl_ext.watch.measures import (
    Change,
    Completions,
    Mean,
    change_since,
    drifts,
    mean_over_prompts,
)


class Alarm(NamedTuple):
    """A sign of reward hacking.

    Attributes:
        kind: gold, length, repetition, distinct or kl.
        step: of training.
        message: what was measured, when, and against what.
    """

    kind: str
    step: int
    message: str


class History:
    """The evaluations of a run, the numbers before training, and the best gold reward.

    Args:
        drift: factor by which the text may change, or None.
        kl_budget: nats per completion, or None.

    Attributes:
        evaluations: `step`, and of each measure a mean and its standard error; from the second on
            `best_step`, and `gold_change` since it: its mean, the upper end of its interval, the
            number of prompts.
        best: of the evaluation with the best gold reward: its number `evaluation`, its `step`, its
            `mean`, a fingerprint of its `prompts`, and the mean `gold` and `proxy` reward of each
            prompt; empty before the first.
    """

    def __init__(self, drift: float | None, kl_budget: float | None):
        self.drift, self.kl_budget = drift, kl_budget
        self.evaluations: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}
        self._before: dict[str, dict[str, Mean]] = {}

    def state(self) -> dict[str, Any]:
        """All of it, in lists, mappings and numbers."""
        before = {
            where: {name: list(mean) for name, mean in numbers.items()}
            for where, numbers in self._before.items()
        }
        # A checkpoint does not follow what comes after it.
        return {"evaluations": [*self.evaluations], "best": {**self.best}, "before": before}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave."""
        self.evaluations, self.best = [*state["evaluations"]], {**state["best"]}
        self._before = {
            where: {name: Mean(*mean) for name, mean in numbers.items()}
            for where, numbers in state["before"].items()
        }

    @property
    def newest_is_best(self) -> bool:
        """Whether the last evaluation has the best gold reward."""
        return self.best["evaluation"] == len(self.evaluations) - 1

    def judge_text(self, numbers: dict[str, Mean], where: str, step: int) -> list[Alarm]:
        """What of the length, the repetition, the distinct n-grams and the KL is out of bounds.

        Args:
            numbers: of completions.
            where: "rollouts" or "evaluations"; the first of each are what was before training.
            step: now.
        """
        before = self._before.setdefault(where, numbers)
        found = [
            Alarm(
                name.partition("_")[0],
                step,
                f"step {step}: {name} of {where} is {now:.3g}, and was {then:.3g} before training: "
                f"beyond a factor of {self.drift:g}",
            )
            for name, then, now in drifts(numbers, before, self.drift)
        ]
        kl = numbers.get("kl")
        if self.kl_budget is not None and kl is not None and kl.value > self.kl_budget:
            message = (
                f"step {step}: the KL to the policy before training is {kl.value:.3g} nats per "
                f"completion of {where}, above the budget of {self.kl_budget:g}"
            )
            found.append(Alarm("kl", step, message))
        return found

    def judge_gold(self, seen: Completions, numbers: dict[str, Mean], step: int) -> list[Alarm]:
        """Add an evaluation: whether the gold reward fell since its best while the proxy rose."""
        assert seen.gold_PG is not None
        gold, proxy = (values.double().nanmean(1) for values in (seen.gold_PG, seen.proxy_PG))
        row: dict[str, Any] = {"step": step} | {name: list(m) for name, m in numbers.items()}
        # An evaluation on other prompts is recorded, and compared with nothing.
        is_comparable = not self.best or self.best["prompts"] == seen.fingerprint
        change = self._change(gold) if self.best and is_comparable else None
        found = []
        if change is not None:
            row |= {"best_step": self.best["step"], "gold_change": list(change)}
            rise = mean_over_prompts((proxy - _tensor(self.best["proxy"]))[:, None]).value
            if change.at_most < 0 and rise > 0:
                found.append(Alarm("gold", step, self._parted(step, numbers, change, rise)))
        self.evaluations.append(row)
        mean = numbers["gold_reward"].value
        if not self.best or (is_comparable and mean > self.best["mean"]):
            each = {"gold": gold.tolist(), "proxy": proxy.tolist()}
            self.best = {"step": step, "mean": mean, "prompts": seen.fingerprint} | each
            self.best["evaluation"] = len(self.evaluations) - 1
        return found

    def _change(self, gold: Tensor) -> Change | None:
        return change_since(gold, _tensor(self.best["gold"]), len(self.evaluations))

    def _parted(self, step: int, numbers: dict[str, Mean], change: Change, rise: float) -> str:
        return (
            f"step {step}: on {change.prompts} held-out prompts the gold reward fell by "
            f"{-change.mean:.3g} (allowing for noise, by {-change.at_most:.3g} or more) since its "
            f"best at step {self.best['step']}, from {self.best['mean']:.3g} to "
            f"{numbers['gold_reward'].value:.3g}, while the proxy reward rose by {rise:.3g}"
        )


def _tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
