"""Absorbing Markov chains: values as the solution of a linear system.

The judge where a process has states but no closed form; where it has one, as gambler's ruin, each
checks the other.
"""

import torch
from torch import Tensor

# A row of probabilities may miss 1 by rounding, not by more.
_ROUNDING = 1e-9


def absorption(within: Tensor, out: Tensor, per_step: Tensor) -> tuple[Tensor, Tensor]:
    """(I−Q)⁻¹R, where the chain ends, and (I−Q)⁻¹c, what it collects until then. Equation E54.

    Args:
        within: Q, (S, S) probabilities of a step from one transient state to another.
        out: R, (S, A) probabilities of a step from a transient state to an absorbing one; with Q's
            they sum to 1.
        per_step: c, (S,) expected reward of the step from each transient state; 1 counts steps.

    Returns:
        (S, A) probabilities and (S,) in units of `per_step`, float64, differentiable.

    Raises:
        ValueError: rows that are no probabilities, or a state from which nothing absorbs.
    """
    within, out, per_step = within.double(), out.double(), per_step.double()
    steps = torch.cat([within, out], dim=1)
    if not ((steps >= 0).all() and ((steps.sum(1) - 1).abs() < _ROUNDING).all()):
        raise ValueError(
            "Each row of Q and R together must be probabilities that sum to 1, got sums "
            f"{steps.sum(1).tolist()} and a least entry of {steps.min().item()}."
        )
    stuck = (~_ends(within > 0, (out > 0).any(1))).nonzero().flatten().tolist()
    if stuck:
        raise ValueError(f"No absorbing state can be reached from transient states {stuck}.")
    system = torch.eye(len(within), dtype=torch.float64, device=within.device) - within
    solved = torch.linalg.solve(system, torch.cat([out, per_step[:, None]], dim=1))
    return solved[:, :-1], solved[:, -1]


def _ends(reaches: Tensor, ends: Tensor) -> Tensor:
    """(S,) whether a chain in each state can end; I − Q is singular if it cannot in one of them."""
    for _ in range(len(ends)):
        ends = ends | (reaches & ends).any(1)
    return ends
