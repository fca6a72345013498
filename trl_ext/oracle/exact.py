"""Exact quantities and gradients on enumerated completions.

`logps` are log-probabilities of all N completions of each prompt, as `Enumeration.logps` gives
them, (P, N) in nats; `ref_logps` are those of h = π_ref. Rewards are (P, N) or (N,). Each value
is one number a prompt, (P,), the sum over all completions. Everything is differentiable.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trl_ext.oracle.enumeration import Enumeration, check_beta


def log_partition(ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """log Z(x) = log E_h[exp(r/β)], (P,) nats. Equation E3.

    Raises:
        ValueError: beta is not positive (infinity is allowed, and gives 0).
    """
    return _tilted(ref_logps, rewards, beta).logsumexp(-1)


def gibbs_logps(ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """log π*(y|x) = r/β + log h − log Z, (P, N) nats. Equation E4.

    Raises:
        ValueError: beta is not positive (infinity is allowed, and gives h).
    """
    return _tilted(ref_logps, rewards, beta).log_softmax(-1)


def _tilted(ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    return ref_logps + rewards / check_beta(beta)


def expected_reward(logps: Tensor, rewards: Tensor) -> Tensor:
    """E_π[r], (P,) in units of the reward: J of Equation E31."""
    return (logps.exp() * rewards).sum(-1)


def kl_divergence(logps: Tensor, other_logps: Tensor) -> Tensor:
    """KL(p‖q) = Σ_y p log p/q of whole completions, (P,) nats. Equation E26.

    Completions of probability 0 under p count nothing, whatever q is there.
    """
    supported = logps > -torch.inf
    log_ratio = torch.where(supported, logps, 0.0) - torch.where(supported, other_logps, 0.0)
    return (logps.exp() * log_ratio).sum(-1)


def regularised_reward(logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """E_π[r] − β KL(π‖h), (P,) in units of the reward: what π* maximises.

    Equations E1, E2. It equals β log Z − β KL(π‖π*) (Equation E5), and −1/β times it is
    KL(π‖π*) − log Z, the loss of a reverse projection (Equation E6).
    """
    return expected_reward(logps, rewards) - beta * kl_divergence(logps, ref_logps)


def projection_loss(logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """−E_{π*}[log π], (P,) nats: KL(π*‖π) up to a constant of π. Equation E7."""
    target = gibbs_logps(ref_logps, rewards, beta).exp()
    return -(target * torch.where(target > 0, logps, 0.0)).sum(-1)


def exact_gradient(
    objective: Callable[[Tensor], Tensor], model: nn.Module, enumeration: Enumeration
) -> dict[str, Tensor]:
    """Gradient of `objective(logps)`, averaged over the prompts, for each trainable parameter.

    Args:
        objective: (P, N) log-probabilities of the model -> a scalar or (P,), for example
            `lambda logps: expected_reward(logps, rewards)`.
        model: a causal LM over the enumeration's tokens; LoRA models too.
        enumeration: the completions.

    Returns:
        name -> gradient in the shape and dtype of the parameter; use `model.double()` where
        float32 is not exact enough. A parameter that plays no part has a gradient of zeros.
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    value = objective(enumeration.logps(model)).mean()
    gradients = torch.autograd.grad(value, list(parameters.values()), materialize_grads=True)
    return dict(zip(parameters, gradients, strict=True))
