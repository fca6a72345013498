"""Variance of REINFORCE's gradient under each baseline, on a language that can be enumerated.

Batches of 2 prompts with 8 completions each; rewards of the two prompts differ by a constant that
no policy can change. The spread is √tr Var of the batch's gradient over ‖∇J‖, where a group's own
share in its mean is divided out; intervals are over ten repetitions.

    python benchmarks/baselines.py [--batches 20000]
"""

import argparse
import json
import math
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from trl_ext.environment import environment
from trl_ext.functional import Baseline, baseline, held_returns, reward_to_go, score_norms
from trl_ext.oracle import (
    Enumeration,
    TabularLM,
    TabularLMConfig,
    exact_gradient,
    regularised_reward,
)

RESULTS = Path(__file__).parent / "results" / "baselines.json"
SHAPE = TabularLMConfig(vocab_size=4, max_completion_length=3, num_prompts=2)
GROUP, BETA, REPEATS = 8, 0.3, 10


class Bench:
    """A policy, its reference and its rewards, and what every completion adds to a gradient."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.space = Enumeration(SHAPE)
        self.model, reference = TabularLM(SHAPE).double(), TabularLM(SHAPE).double()
        self.rewards = torch.rand(2, len(self.space), dtype=torch.float64)
        self.rewards[1] += 2.0  # the second prompt is the easier one
        ref_logps = self.space.logps(reference).detach()
        exact = exact_gradient(
            lambda logps: regularised_reward(logps, ref_logps, self.rewards, BETA),
            self.model,
            self.space,
        )["model.table.weight"]
        self.size = exact.norm().item()
        self.logps = self.space.token_logps(self.model).detach()
        per_token = -BETA * (self.logps - self.space.token_logps(reference).detach())
        last = self.space.mask.sum(1, keepdim=True) == torch.arange(1, 4)
        per_token = (per_token + self.rewards[..., None] * last) * self.space.mask
        mask = self.space.mask.expand_as(per_token)
        self.to_go = reward_to_go(per_token.flatten(0, 1), mask.flatten(0, 1)).view_as(per_token)
        self.held = held_returns(self.to_go, mask)
        self.scores = self._scores()

    def _scores(self) -> Tensor:
        """(P, N, T, P·R·V) ∇ log π(y_t) by the table."""
        probabilities = self.space.logits(self.model).softmax(-1).detach()  # (P, R, V)
        rows = self.space.nodes[:, :-1].where(self.space.mask, 0)
        scores = torch.zeros(2, len(self.space), 3, 2, SHAPE.num_prefixes, SHAPE.vocab_size)
        for prompt in range(2):
            for n, t in self.space.mask.nonzero().tolist():
                row, token = int(rows[n, t]), int(self.space.tokens[n, t])
                scores[prompt, n, t, prompt, row] -= probabilities[prompt, row]
                scores[prompt, n, t, prompt, row, token] += 1
        return scores.flatten(3).double()

    def spread(self, how: Baseline, batches: int, norms: str = "approximate") -> float:
        """√tr Var of a batch's gradient over ‖∇J‖."""
        chances = self.logps.sum(-1).exp()
        drawn = torch.multinomial(chances, batches * GROUP, replacement=True)
        drawn = drawn.view(2, batches, GROUP).transpose(0, 1)  # (M, P, G)
        prompts = torch.arange(2)[None, :, None].expand_as(drawn)
        weights = None
        if how == "optimal" and norms == "approximate":
            weights = score_norms(self.logps, self.space.mask.expand_as(self.logps))
        elif how == "optimal":
            weights = self.scores.sum(2).square().sum(-1)
        returns = self.held[prompts, drawn]
        if how == "batch":
            compared = returns.mean((1, 2), keepdim=True).expand_as(returns)
        else:
            each = None if weights is None else weights[prompts, drawn].flatten(0, 1)
            compared = baseline(returns.flatten(0, 1), how, weights=each).view_as(returns)
        credit = (self.to_go[prompts, drawn] - compared) * self.space.mask[drawn]
        gradients = torch.zeros(batches, self.scores.size(-1), dtype=torch.float64)
        for prompt in range(2):
            scores = self.scores[prompt, drawn[:, prompt]]  # (M, G, T, K)
            gradients += (credit[:, prompt, ..., None] * scores).sum((1, 2)) / (2 * GROUP)
        shrunk = {"group": 1 - 1 / GROUP, "batch": 1 - 1 / (2 * GROUP)}.get(how, 1.0)
        return gradients.var(0).sum().sqrt().item() / self.size / shrunk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=20_000)
    options = parser.parse_args()
    bench, rows = Bench(), {}
    cases = [(how, how, "approximate") for how in get_args(Baseline)]
    cases.append(("optimal, ‖∇log π‖² exact", "optimal", "exact"))
    table = Table(title="Spread of a batch's gradient, in units of ‖∇J‖")
    for column in ("baseline", "√tr Var", "± 2 SE"):
        table.add_column(column, justify="left" if column == "baseline" else "right")
    for name, how, norms in cases:
        found = [bench.spread(how, options.batches // REPEATS, norms) for _ in range(REPEATS)]
        mean = sum(found) / REPEATS
        error = math.sqrt(sum((x - mean) ** 2 for x in found) / (REPEATS - 1) / REPEATS)
        rows[name] = {"spread": mean, "two_standard_errors": 2 * error}
        table.add_row(name, f"{mean:.3f}", f"{2 * error:.3f}")
    Console().print(table)
    record = {"options": vars(options), "environment": environment(), "rows": rows}
    RESULTS.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    print(f"Written to {RESULTS}")


if __name__ == "__main__":
    main()
