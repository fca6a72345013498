"""What a method's penalty is worth, exactly: every completion of a small language is enumerated.

No number here is sampled. Expectations are sums over all completions, weighted by their
probability under the policy that samples; standard deviations are those of a single sample.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trl_ext.functional import exact_forward_kl, exact_kl
from trl_ext.kl_table.methods import Method
from trl_ext.kl_table.samples import Samples, penalty_terms
from trl_ext.oracle import (
    Enumeration,
    TabularLMConfig,
    expected_reward,
    gibbs_logps,
    kl_divergence,
)

# Relative to the exact gradient: far above the rounding of float64, far below any bias.
EXACT = 1e-9
VOCABULARY, LENGTH = 4, 3


@dataclass(frozen=True)
class Grade:
    """One method against one pair of policies, in units of the exact value.

    Attributes:
        value_bias, value_sd: of the estimate of KL(π‖π_ref), divided by it.
        gradient_bias: ‖E[g] − ∇KL‖ / ‖∇KL‖ of the gradient of the sequence KL.
        gradient_sd: (E‖g − E[g]‖²)^½ / ‖∇KL‖.
        part: what E[g] is: "whole" (∇KL of sequences), "per step" (each step's own KL, at the
            prefixes that were sampled), "forward per step" (the same of KL(π_ref‖π)), "zero", or
            "biased".
    """

    value_bias: float
    value_sd: float
    gradient_bias: float
    gradient_sd: float
    part: str


class Bench:
    """A policy, its reference and the policy that samples, with all that is exact about them.

    Args:
        seed: of the random tables.
        off_policy: how far, in standard deviations of the logits, the sampling policy is from
            the policy; 0 is on-policy.
    """

    def __init__(self, seed: int = 0, off_policy: float = 0.0):
        self.space = Enumeration(
            TabularLMConfig(vocab_size=VOCABULARY, max_completion_length=LENGTH)
        )
        generator = torch.Generator().manual_seed(seed)
        shape = (3, 1, self.space.config.num_prefixes, self.space.config.vocab_size)
        ref, step, drift = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.ref_table = ref
        self.table = (ref + 0.5 * step).requires_grad_()
        self.old_table = (self.table + off_policy * drift).detach()

    def samples(self, table: Tensor, old_table: Tensor) -> Samples:
        """All N completions, as if each had been drawn once."""
        space = self.space
        rows = space.nodes[:, :-1].where(space.mask, 0)
        policies = (table, old_table, self.ref_table)
        logps, old_logps, ref_logps = (space.token_logps(each)[0] for each in policies)
        logits, ref_logits = table[0][rows], self.ref_table[0][rows]
        return Samples(logps, old_logps, ref_logps, logits, ref_logits, space.mask)

    def probabilities(self, table: Tensor) -> Tensor:
        """(N,) of each completion."""
        return self.space.logps(table.detach())[0].exp()

    def gradient(self, value: Tensor) -> Tensor:
        """∇ of a scalar with respect to the policy's table, flat."""
        (gradient,) = torch.autograd.grad(value, self.table, retain_graph=True, allow_unused=True)
        return torch.zeros_like(self.table).flatten() if gradient is None else gradient.flatten()

    def targets(self) -> dict[str, Tensor]:
        """The gradients that a method's expected gradient may be."""
        samples = self.samples(self.table, self.old_table)
        sampled = self.probabilities(self.old_table)
        sequences = kl_divergence(self.space.logps(self.table), self.space.logps(self.ref_table))
        pairs = (samples.logits, samples.ref_logits)
        steps = {"per step": exact_kl(*pairs), "forward per step": exact_forward_kl(*pairs)}
        return {"whole": self.gradient(sequences.sum())} | {
            part: self.gradient((sampled[:, None] * each * samples.mask).sum())
            for part, each in steps.items()
        }

    def grade(self, method: Method) -> Grade:
        """Bias and standard deviation of a method's value and gradient."""
        samples = self.samples(self.table, self.old_table)
        sampled = self.probabilities(self.old_table)
        estimates = torch.where(samples.mask, method.formula(samples), 0.0).sum(dim=1).detach()
        exact = kl_divergence(self.space.logps(self.table), self.space.logps(self.ref_table)).item()
        mean = (sampled * estimates).sum()
        spread = (sampled * (estimates - mean).square()).sum().sqrt()
        terms = penalty_terms(samples, method.formula, method.placement)
        gradients = torch.stack([self.gradient(term) for term in terms])
        expected = sampled @ gradients
        variance = sampled @ (gradients - expected).square().sum(dim=1)
        targets = self.targets()
        size = targets["whole"].norm()
        return Grade(
            value_bias=(mean.item() - exact) / exact,
            value_sd=spread.item() / exact,
            gradient_bias=((expected - targets["whole"]).norm() / size).item(),
            gradient_sd=(variance.sqrt() / size).item(),
            part=_part(expected, targets),
        )


def _part(expected: Tensor, targets: dict[str, Tensor]) -> str:
    size = targets["whole"].norm()
    for part, target in (targets | {"zero": torch.zeros_like(expected)}).items():
        if (expected - target).norm() <= EXACT * size:
            return part
    return "biased"


def distance_after_training(
    method: Method, *, beta: float = 0.5, steps: int = 1500, seed: int = 0
) -> float:
    """KL(π‖π*), nats, after training on E[r] − β·penalty with the method's expected gradient.

    On-policy, from π_ref, with Adam and a learning rate that falls to 0: what is left is the bias
    of the fixed point, and not noise (under 1e-4 after 1500 steps: prefixes that hardly occur move
    slowly). Rewards are random, one for each completion.
    """
    bench = Bench(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    rewards = torch.randn(len(bench.space), generator=generator, dtype=torch.float64)
    table = bench.ref_table.clone().requires_grad_()
    optimizer = torch.optim.Adam([table], lr=0.05)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        samples = bench.samples(table, table.detach())
        terms = penalty_terms(samples, method.formula, method.placement)
        penalty = (bench.probabilities(table) * terms).sum()
        loss = beta * penalty - expected_reward(bench.space.logps(table), rewards).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    target = gibbs_logps(bench.space.logps(bench.ref_table), rewards, beta)
    return kl_divergence(bench.space.logps(table), target).item()
