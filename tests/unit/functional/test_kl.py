import math
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_ext.functional import k1, k2, k3

# Below 1e-150 the square is subnormal, where no relative precision is left.
log_ratios = st.floats(-30, 30).filter(lambda value: value == 0 or abs(value) > 1e-150)


def exact_k3(d: float) -> float:
    """exp(-d) - 1 + d in 400 digits: where d is 1e-150, the difference begins at the 300th."""
    with localcontext(prec=400):
        x = Decimal(-d)
        return float(x.exp() - 1 - x)


@pytest.mark.equation("E28")
@given(log_ratios)
def test_k1_k2_k3_are_their_definitions(d):
    logps, ref_logps = torch.tensor(d, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    assert k1(logps, ref_logps).item() == d
    assert k2(logps, ref_logps).item() == 0.5 * d * d
    assert k3(logps, ref_logps).item() == pytest.approx(exact_k3(d), rel=1e-14)


@pytest.mark.parametrize(
    "d", [1e-8, 1e-6, 3e-4, 0.01, 0.2499, 0.2501, 1.0, 20.0, -1e-6, -0.25, -3.0, -50.0]
)
def test_k3_in_float32_is_right_to_rounding(d):
    """As written, exp(-d) - 1 + d is 0 in float32 for |d| ≤ 3e-4."""
    logps = torch.tensor(d, dtype=torch.float32)
    got = k3(logps, torch.tensor(0.0)).item()
    exact = math.expm1(-logps.double().item()) + logps.double().item()
    exact = exact if abs(d) > 0.1 else exact_k3(logps.double().item())
    assert got == pytest.approx(exact, rel=5e-7)


def test_k3_saturates_instead_of_overflowing():
    logps = torch.tensor([-1000.0, 1000.0, 0.0], requires_grad=True)
    value = k3(logps, torch.tensor([0.0, 0.0, 0.0]))
    value.sum().backward()
    assert torch.isfinite(value).all() and value.min() >= 0
    assert value[1].item() == pytest.approx(999.0)
    # The saturated exponential has no slope; what is left of d(exp(-d) - 1 + d) is 1.
    assert logps.grad is not None
    assert logps.grad.tolist() == [1.0, 1.0, 0.0]


def test_bfloat16_inputs_are_subtracted_in_float32():
    logps, ref_logps = torch.tensor([-1.0], dtype=torch.bfloat16), torch.tensor([-1.0078125])
    for estimate in (k1, k2, k3):
        assert estimate(logps, ref_logps).dtype == torch.float32
    assert k1(logps, ref_logps).item() == 0.0078125


def test_gradients():
    logps = torch.tensor(
        [-3.0, -0.2, -1e-3, 0.0, 1e-3, 0.2, 3.0], dtype=torch.float64, requires_grad=True
    )
    for estimate in (k1, k2, k3):
        assert torch.autograd.gradcheck(lambda x, f=estimate: f(x, torch.zeros_like(x)), (logps,))


@pytest.mark.equation("E26", "E28")
def test_means_over_samples_agree_with_the_exact_kl():
    """Two distributions over 5 tokens, 200 000 draws of π: within 4 standard errors.

    k2 is not unbiased: its mean is ½E[k1²], which is checked instead.
    """
    logits = torch.tensor(
        [[0.0, 0.5, -1.0, 0.3, 1.0], [0.2, 0.0, -0.5, 0.9, 0.4]], dtype=torch.float64
    )
    log_p, log_q = logits.log_softmax(-1)
    p = log_p.exp()
    cross_entropy, entropy = -(p * log_q).sum(), -(p * log_p).sum()
    exact = (cross_entropy - entropy).item()
    drawn = torch.multinomial(
        p, 200_000, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    for estimate, expected in (
        (k1, exact),
        (k2, (0.5 * p * (log_p - log_q).square()).sum().item()),
        (k3, exact),
    ):
        values = estimate(log_p[drawn], log_q[drawn])
        assert abs(values.mean().item() - expected) <= 4 * values.std().item() / 200_000**0.5
