"""How good a choice among n completions is, in expectation over which n of G were drawn.

A prompt has G completions, a selector sees n of them, drawn without replacement. Averaging over
all subsets takes out the luck of one draw. Results are float64.
"""

import math
from itertools import combinations

import torch
from torch import Tensor

from trl_ext.functional.ranking import counts_below, kept

# Two sums of the same weights in another order differ by less than this part of them.
_ROUNDING = 1e-12


def best_of_n_accuracy(
    scores_PG: Tensor, correct_PG: Tensor, n: int, mask: Tensor | None = None
) -> Tensor:
    """Expected correctness of the highest-scored of n completions drawn without replacement.

    Σ_i c_i·[C(b_i + e_i, n) − C(b_i, n)] / (e_i·C(G, n)), where b_i completions score below i and
    e_i score the same, itself included: the best of the draw is among those e_i if all n are of
    the b_i + e_i but not all of the b_i, and then each of the e_i is as likely; ties are shared
    equally. n = 1 is the mean correctness, n = G that of the best, and scores = correctness give
    pass@n. Source: order statistics of a draw without replacement; pass@n is Chen et al. (2021),
    arXiv 2107.03374, Equation 1.

    Args:
        scores_PG: (…, G), any dtype. NaN marks a completion without a score, left out as if it
            was masked.
        correct_PG: (…, G) correctness, 0 or 1, or any reward.
        n: number of completions drawn, 1 ≤ n ≤ G.
        mask: (…, G), 1 or True = keep. What is masked is never touched.

    Returns:
        (…) in the units of `correct_PG`, float64; NaN where fewer than n are kept.

    Raises:
        ValueError: if n is not between 1 and G.
    """
    _check_draw(n, scores_PG.shape[-1])
    keep = kept(scores_PG, mask)
    below, not_above = counts_below(scores_PG, keep)
    size = keep.sum(-1, keepdim=True)
    is_best = _all_drawn_from(not_above, size, n) - _all_drawn_from(below, size, n)
    shares = is_best / (not_above - below).clamp(min=1)
    expected = torch.where(keep, shares * correct_PG.double(), 0.0).sum(-1)
    return torch.where(size[..., 0] >= n, expected, torch.nan)


def majority_accuracy(
    answers_PG: Tensor,
    correct_PG: Tensor,
    n: int,
    *,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    max_subsets: int = 10_000,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Expected correctness of the answer with most votes among n drawn without replacement.

    Tied answers are shared equally. With weights the vote of completion i is exp(w_i). Where there
    are at most `max_subsets` subsets all are enumerated; else as many are drawn at random. Source:
    Wang et al. (2022), "Self-consistency improves chain of thought reasoning", arXiv 2203.11171.

    Args:
        answers_PG: (…, G) integers: completions with the same answer have the same number.
        correct_PG: (…, G) correctness, 0 or 1. An answer's is the mean over its completions.
        n: number of completions drawn, 1 ≤ n ≤ G.
        weights: (…, G) logarithms of the votes, such as scores divided by β, nats; None: a vote
            each. NaN marks a completion without a weight, left out as if it was masked.
        mask: (…, G), 1 or True = keep.
        max_subsets: up to how many subsets a prompt is enumerated, and how many are drawn else.
        seed: of the random draws.

    Returns:
        Two tensors (…), float64: the expectation, and the standard error of its estimate, 0 where
        all subsets were enumerated. NaN where fewer than n are kept.

    Raises:
        ValueError: if n is not between 1 and G, or there are fewer than two subsets to draw.
    """
    size = answers_PG.shape[-1]
    _check_draw(n, size)
    if max_subsets < 2:
        raise ValueError(f"max_subsets must be at least 2, got {max_subsets}; try 10000.")
    log_votes = torch.zeros_like(answers_PG).double() if weights is None else weights.double()
    rows = [
        tensor.reshape(-1, size).cpu()
        for tensor in (answers_PG, correct_PG.double(), log_votes, kept(log_votes, mask))
    ]
    generator = torch.Generator().manual_seed(seed)
    results = [
        _majority(answers[keep], correct[keep], votes[keep], n, max_subsets, generator)
        for answers, correct, votes, keep in zip(*rows, strict=True)
    ]
    both = torch.tensor(results, dtype=torch.float64, device=answers_PG.device).reshape(-1, 2)
    mean, standard_error = both.T
    return mean.reshape(answers_PG.shape[:-1]), standard_error.reshape(answers_PG.shape[:-1])


def _check_draw(n: int, size: int) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= size:
        raise ValueError(
            f"n must be a whole number between 1 and the {size} completions of a prompt, got {n!r}."
        )


def _all_drawn_from(part: Tensor, size: Tensor, n: int) -> Tensor:
    """C(part, n)/C(size, n): how probable it is that all n drawn belong to that part."""
    probability = torch.ones_like(part, dtype=torch.float64)
    for drawn in range(n):
        probability = probability * (part - drawn).clamp(min=0) / (size - drawn).clamp(min=1)
    return probability


def _majority(
    answers: Tensor,
    correct: Tensor,
    log_votes: Tensor,
    n: int,
    max_subsets: int,
    generator: torch.Generator,
) -> tuple[float, float]:
    """Expectation and standard error for one prompt, with everything left out taken away."""
    size = len(answers)
    if size < n:
        return math.nan, math.nan
    _, answer_of, members = answers.unique(return_inverse=True, return_counts=True)
    correct_answer = torch.zeros(len(members), dtype=torch.float64)
    correct_answer = correct_answer.index_add(0, answer_of, correct) / members
    number = math.comb(size, n)
    if number <= max_subsets:
        drawn = torch.tensor(list(combinations(range(size), n)))
    else:
        # The n lowest of G random numbers are a uniform draw without replacement.
        drawn = torch.rand(max_subsets, size, generator=generator).argsort(-1)[:, :n]
    won = _winners(answer_of[drawn], log_votes[drawn], len(members)) @ correct_answer
    exact = number <= max_subsets
    return won.mean().item(), 0.0 if exact else (won.std() / max_subsets**0.5).item()


def _winners(answers: Tensor, log_votes: Tensor, num_answers: int) -> Tensor:
    """(S, n) answers of S draws and their votes -> (S, num_answers) shares of the victory."""
    most = log_votes.amax(-1, keepdim=True)
    # Relative to the largest vote of the draw, without the NaN of inf - inf.
    votes = torch.where(log_votes == most, 0.0, log_votes - most).exp()
    totals = torch.zeros(len(answers), num_answers, dtype=torch.float64)
    totals = totals.scatter_add(-1, answers, votes)
    is_winner = (totals >= totals.amax(-1, keepdim=True) * (1 - _ROUNDING)).double()
    return is_winner / is_winner.sum(-1, keepdim=True)
