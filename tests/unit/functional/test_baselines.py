"""Baselines against loops, by hand, and for what makes them sound."""

import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from trl_ext.functional import Baseline, baseline, held_returns, reward_to_go, score_norms

HOWS: list[Baseline] = ["none", "batch", "group", "leave_one_out", "optimal"]
GARBAGE = [torch.nan, torch.inf, -torch.inf]


def groups(seed: int, prompts: int, group: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (P, G, T), weights and kept completions (P, G); garbage where one is dropped."""
    generator = torch.Generator().manual_seed(seed)
    returns = torch.randn(prompts, group, tokens, generator=generator, dtype=torch.float64)
    weights = torch.rand(prompts, group, generator=generator, dtype=torch.float64) + 0.1
    keep = torch.rand(prompts, group, generator=generator) < 0.7
    garbage = GARBAGE[seed % 3]
    return returns.where(keep[..., None], garbage), weights.where(keep, garbage), keep


def all_kept(seed: int = 0, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (2, 4, 3)), generator=generator, dtype=torch.float64)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 999), st.integers(1, 3), st.integers(1, 7))
def test_held_returns_is_the_loop(seed, rows, tokens):
    """A passed-over position looks ahead to the next kept token; one after the end looks back."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, tokens, generator=generator) < 0.5
    values = torch.randn(rows, tokens, generator=generator).where(mask, GARBAGE[seed % 3])
    held = held_returns(values, mask)
    for row in range(rows):
        kept = mask[row].nonzero().flatten().tolist()
        for t in range(tokens):
            ahead = [s for s in kept if s >= t] or kept[-1:]
            assert held[row, t].item() == (values[row, ahead[0]].item() if kept else 0.0)


def test_held_returns_by_hand():
    """Over a hole the return of what follows, over padding that of the last token."""
    values = torch.tensor([[5.0, torch.nan, 3.0, 2.0, torch.nan], [torch.nan] * 5])
    mask = torch.tensor([[1, 0, 1, 1, 0], [0] * 5])
    assert held_returns(values, mask).tolist() == [[5.0, 3.0, 3.0, 2.0, 2.0], [0.0] * 5]


def test_a_reward_at_the_end_is_held_at_every_position():
    mask = torch.tensor([[0, 1, 0, 0, 1, 0], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]])
    rewards = torch.zeros(3, 6)
    rewards[[0, 1, 2], [4, 5, 0]] = torch.tensor([2.0, -1.0, 3.0])
    held = held_returns(reward_to_go(rewards, mask), mask)
    assert held.tolist() == [[2.0] * 6, [-1.0] * 6, [3.0] * 6]


def test_held_returns_of_groups_are_those_of_their_rows():
    values, mask = all_kept(1, 6, 5), torch.rand(6, 5, generator=torch.Generator()) < 0.6
    grouped = held_returns(values.view(2, 3, 5), mask.view(2, 3, 5))
    assert torch.equal(grouped.view(6, 5), held_returns(values, mask))
    assert held_returns(values.bfloat16(), mask).dtype == torch.bfloat16


def slow_baseline(returns, how, keep, weights, p, i, t) -> float:
    """The definition for one completion and one position."""
    prompts = range(len(returns)) if how == "batch" else [p]
    compared = [
        (q, j)
        for q in prompts
        for j in range(returns.size(1))
        if keep[q, j] and not (how in ("leave_one_out", "optimal") and j == i)
    ]
    if how == "none" or not compared:
        return 0.0
    of_each = [weights[q, j].item() if how == "optimal" else 1.0 for q, j in compared]
    total = sum(w * returns[q, j, t].item() for w, (q, j) in zip(of_each, compared, strict=True))
    return total / sum(of_each)


@pytest.mark.parametrize("how", HOWS)
@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999), st.integers(1, 3), st.integers(1, 5), st.integers(1, 3))
def test_baseline_is_the_loop(how, seed, prompts, group, tokens):
    returns, weights, keep = groups(seed, prompts, group, tokens)
    result = baseline(returns, how, keep=keep, weights=weights if how == "optimal" else None)
    assert result.shape == returns.shape
    for p, i, t in itertools.product(range(prompts), range(group), range(tokens)):
        expected = slow_baseline(returns, how, keep, weights, p, i, t)
        assert result[p, i, t].item() == pytest.approx(expected, abs=1e-12)


def test_baselines_by_hand():
    """Two prompts of three completions; weights 1, 2, 3 and 1, 0, 1; one of the second dropped."""
    returns = torch.tensor([[[1.0], [2.0], [6.0]], [[0.0], [4.0], [8.0]]])
    keep = torch.tensor([[True, True, True], [True, True, False]])
    weights = torch.tensor([[1.0, 2.0, 3.0], [1.0, 0.0, 1.0]])

    def of(how, weights=None):
        return baseline(returns, how, keep=keep, weights=weights).flatten().tolist()

    assert of("none") == [0.0] * 6
    assert of("batch") == pytest.approx([13 / 5] * 6)
    assert of("group") == [3.0, 3.0, 3.0, 2.0, 2.0, 2.0]
    assert of("leave_one_out") == [4.0, 3.5, 1.5, 4.0, 0.0, 2.0]
    # (2·2 + 3·6)/5, (1·1 + 3·6)/4, (1·1 + 2·2)/3; the fourth has an other of weight 0 only.
    assert of("optimal", weights) == pytest.approx([22 / 5, 19 / 4, 5 / 3, 0.0, 0.0, 0.0])


@pytest.mark.equation("E34")
@pytest.mark.parametrize("how", ["leave_one_out", "optimal"])
def test_no_completion_is_in_its_own_baseline(how):
    """Whatever becomes of its return, its baseline stays, and so the gradient is unbiased."""
    returns = all_kept()
    weights = torch.rand(2, 4, generator=torch.Generator()) if how == "optimal" else None
    changed = returns.clone()
    changed[1, 2] += 100.0
    before, after = (baseline(each, how, weights=weights) for each in (returns, changed))
    torch.testing.assert_close(after[1, 2], before[1, 2], rtol=0, atol=1e-11)
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
    assert (after[1, [0, 1, 3]] - before[1, [0, 1, 3]]).abs().min() > 1.0


def test_leaving_one_out_magnifies_the_advantage_over_the_group():
    """Ψ − (GΨ̄ − Ψ)/(G − 1) = G/(G − 1)·(Ψ − Ψ̄)."""
    returns = all_kept(2, 3, 5, 2)
    ours = returns - baseline(returns, "leave_one_out")
    torch.testing.assert_close(ours, 5 / 4 * (returns - baseline(returns, "group")))


def test_equal_weights_are_the_mean_of_the_others():
    returns, _, keep = groups(seed=4, prompts=3, group=4, tokens=2)
    equal = baseline(returns, "optimal", keep=keep, weights=torch.full((3, 4), 0.37))
    torch.testing.assert_close(equal, baseline(returns, "leave_one_out", keep=keep))


def test_the_batch_of_one_prompt_is_its_group():
    returns = all_kept(3, 1, 6, 2)
    torch.testing.assert_close(baseline(returns, "batch"), baseline(returns, "group"))


def test_a_group_of_one_has_no_others():
    returns = all_kept(5, 2, 1, 3)
    assert torch.equal(baseline(returns, "group"), returns)
    assert not baseline(returns, "leave_one_out").any()
    assert not baseline(returns, "optimal", weights=torch.ones(2, 1)).any()


@pytest.mark.parametrize("how", HOWS)
def test_where_all_are_dropped_there_is_no_baseline(how):
    returns, weights = torch.full((2, 3, 2), torch.nan), torch.full((2, 3), torch.inf)
    keep = torch.zeros(2, 3, dtype=torch.bool)
    result = baseline(returns, how, keep=keep, weights=weights if how == "optimal" else None)
    assert result.tolist() == [[[0.0, 0.0]] * 3] * 2


def test_others_whose_weight_is_rounding_do_not_count():
    """1 + 8e-8 − 1 is 1.2e-7 in float32, and 3 + 8e-8·500 − 3 no better: their ratio is not 500."""
    returns = torch.tensor([[[3.0], [500.0], [7.0]]])
    result = baseline(returns, "optimal", weights=torch.tensor([[1.0, 8e-8, 0.0]]))
    assert result.flatten().tolist() == pytest.approx([0.0, 3.0, 3.0], rel=1e-4)


def test_half_precision_returns_are_averaged_in_float32():
    """512 returns of 1 and one of 3 in bfloat16, whose step at 1 is 2^-7."""
    returns = torch.ones(1, 513, 1, dtype=torch.bfloat16)
    returns[0, 0] = 3.0
    result = baseline(returns, "leave_one_out")
    assert result.dtype == torch.float32
    assert result[0, :2, 0].tolist() == pytest.approx([1.0, 1 + 2 / 512])


@pytest.mark.parametrize("how", HOWS)
def test_a_baseline_has_no_gradient(how):
    returns = all_kept().requires_grad_()
    weights = torch.ones(2, 4, requires_grad=True) if how == "optimal" else None
    assert not baseline(returns, how, weights=weights).requires_grad


def test_weights_go_with_optimal_alone():
    with pytest.raises(ValueError, match=r"no other, got how='optimal'"):
        baseline(torch.zeros(1, 2, 1), "optimal")
    with pytest.raises(ValueError, match=r"no other, got how='group'"):
        baseline(torch.zeros(1, 2, 1), "group", weights=torch.ones(1, 2))


def score_squares(logits: Tensor) -> Tensor:
    """(V,) ‖∇ log softmax‖² by the logits for each token, by autograd."""
    logps = logits.requires_grad_().log_softmax(-1)
    gradients = [torch.autograd.grad(each, logits, retain_graph=True)[0] for each in logps]
    return torch.stack([each.square().sum() for each in gradients])


@pytest.mark.equation("E35")
def test_the_optimal_baseline_has_the_least_variance():
    """One step over 4 tokens drawn in proportion 1:2:3:4, in a group that has each 1000 times so.

    Σ_a π(a) ‖∇log π(a)‖² (R(a) − b)² is a parabola in b with its minimum at E[wR]/E[w].
    """
    counts = torch.tensor([1, 2, 3, 4])
    probabilities = counts.double() / 10
    rewards = torch.tensor([0.0, 1.0, 0.0, 4.0], dtype=torch.float64)
    norms = score_squares(probabilities.log())

    def variance(b):
        return (probabilities * norms * (rewards - b).square()).sum().item()

    drawn = torch.arange(4).repeat_interleave(counts * 1000)
    b = baseline(rewards[drawn].view(1, -1, 1), "optimal", weights=norms[drawn][None])[0, :, 0]
    best = (probabilities * norms * rewards).sum() / (probabilities * norms).sum()
    assert (b - best).abs().max() < 1e-3, "but for the one that is left out"
    assert abs(best - (probabilities * rewards).sum()) > 0.1, "not the mean"
    for away in (-0.01, 0.01):
        assert variance(best + away) > variance(best)


@pytest.mark.equation("E35")
def test_score_norms_expect_what_the_scores_square_to():
    """Σ_a π(a) ‖e_a − π‖² = 1 − Σ π² = Σ_a π(a)(1 − π(a)), summed over steps."""
    logits = all_kept(7, 3, 5)
    logps = logits.log_softmax(-1)
    exact = sum((row.softmax(-1) * score_squares(row)).sum().item() for row in logits.clone())
    # Every completion of three steps with its probability.
    expected = 0.0
    for tokens in itertools.product(range(5), repeat=3):
        of_tokens = logps[range(3), tokens]
        expected += of_tokens.sum().exp().item() * score_norms(of_tokens, torch.ones(3)).item()
    assert expected == pytest.approx(exact, rel=1e-12)


def test_score_norms_by_hand():
    logps = torch.tensor([[0.5, 0.25, 1.0]]).log()
    assert score_norms(logps, torch.tensor([[1, 1, 1]])).item() == pytest.approx(1.25)
    garbage = torch.tensor([[math.log(0.5), torch.nan, torch.inf], [torch.nan] * 3])
    assert score_norms(garbage, torch.tensor([[1, 0, 0], [0, 0, 0]])).tolist() == [0.5, 0.0]
    assert score_norms(torch.tensor([-torch.inf]), torch.ones(1)).item() == 1.0


def test_score_norms_of_tokens_that_are_all_but_certain():
    """1 − exp(−1e-8) is 0 in float32 as written; four of them in bfloat16 add up in float32."""
    logps = torch.full((2, 4), -1e-8, requires_grad=True)
    norms = score_norms(logps, torch.ones(2, 4))
    assert norms.tolist() == pytest.approx([4e-8] * 2) and not norms.requires_grad
    half = score_norms(torch.full((300,), -8.0, dtype=torch.bfloat16), torch.ones(300))
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(300 * (1 - math.exp(-8)))


@given(st.lists(st.floats(-50, 0), min_size=1, max_size=9))
def test_score_norms_are_between_0_and_the_number_of_tokens(logps):
    norm = score_norms(torch.tensor(logps, dtype=torch.float64), torch.ones(len(logps))).item()
    assert 0 <= norm <= len(logps)
    assert norm == pytest.approx(sum(1 - math.exp(each) for each in logps), abs=1e-12)
