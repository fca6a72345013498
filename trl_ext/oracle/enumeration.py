"""Every completion of a small shape, and what a policy does on each of them, exactly.

All results are float64, on the CPU, and differentiable with respect to the policy. Shapes: P
prompts, N completions, T tokens, V vocabulary, R = `num_prefixes` table rows of a prompt.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trl_ext.oracle.prefixes import END, IMPOSSIBLE, TabularLMConfig

# A hidden state of a TabularLM is as wide as its table: prefixes are fed in batches of this size.
PREFIXES_A_FORWARD = 256

Policy = nn.Module | Tensor
"""A causal LM over the tokens of the shape, or its logits (P, R, V) at each prefix."""


class Enumeration:
    """The N completions of a shape, and the tree of their prefixes.

    A completion is K-ary letters and then the end token, or T letters (truncated: `generate` with
    `max_new_tokens=T` stops there too). Completion n is the prefix of number n, ended if it has
    fewer than T letters (see `trl_ext.oracle.prefixes` for the numbers).

    Args:
        config: the shape; use `model.config` for a TabularLM. For any other causal LM over the
            same tokens, a TabularLMConfig of its vocabulary and length.

    Attributes:
        tokens: (N, T) int64, padded with the end token.
        mask: (N, T) bool, 1 = token (the end token included), 0 = padding.
        nodes: (N, T+1) int64, what y_≤t is, for t = 0..T: the number of a prefix, or N + n once
            completion n has ended.
    """

    def __init__(self, config: TabularLMConfig):
        self.config = config
        self._letters = config.vocab_size - 1
        self.tokens = _letters_of_all_prefixes(self._letters, config.max_completion_length)
        lengths = (self.tokens != END).sum(-1, keepdim=True)
        self.mask = torch.arange(config.max_completion_length) <= lengths
        self.nodes = self._nodes(lengths)

    def __len__(self) -> int:
        """N."""
        return len(self.tokens)

    def _nodes(self, lengths: Tensor) -> Tensor:
        number = torch.zeros(len(self), dtype=torch.long)
        ended = len(self) + torch.arange(len(self))
        nodes = [number]
        for t in range(self.config.max_completion_length):
            number = self._letters * number + self.tokens[:, t]
            nodes.append(torch.where(t < lengths[:, 0], number, ended))
        return torch.stack(nodes, dim=1)

    def index(self, completion_ids: Tensor) -> Tensor:
        """(B, S) completions, S ≤ T, as `generate` gives them -> (B,) their numbers n.

        What follows the first end token is ignored; a completion without one counts as ended
        where the tensor ends.
        """
        number = torch.zeros_like(completion_ids[:, 0])
        alive = torch.ones_like(number, dtype=torch.bool)
        for token in completion_ids.unbind(1):
            alive = alive & (token != END)
            number = torch.where(alive, self._letters * number + token, number)
        return number

    def logits(self, policy: Policy) -> Tensor:
        """Next-token logits at each prefix, (P, R, V). Put a module with dropout in eval mode."""
        if isinstance(policy, Tensor):
            return policy.double()
        shape = self.config
        prefixes = self.tokens[: shape.num_prefixes, : shape.max_completion_length - 1]
        prompts = torch.arange(1, shape.num_prompts + 1).repeat_interleave(len(prefixes))
        ids = torch.cat([prompts[:, None], prefixes.repeat(shape.num_prompts, 1)], dim=1)
        last = (ids[:, 1:] != END).sum(-1)
        device = next(policy.parameters()).device
        batches = zip(ids.split(PREFIXES_A_FORWARD), last.split(PREFIXES_A_FORWARD), strict=True)
        rows = [_last_logits(policy, i.to(device), at.to(device)) for i, at in batches]
        return torch.cat(rows).unflatten(0, (shape.num_prompts, len(prefixes)))

    def token_logps(self, policy: Policy) -> Tensor:
        """log π(y_t|x, y_<t) of each token of each completion, (P, N, T) nats; 0 on padding."""
        logps = self.logits(policy).log_softmax(-1)
        rows = self.nodes[:, :-1].where(self.mask, 0)
        return logps[:, rows, self.tokens].masked_fill(~self.mask, 0.0)

    def logps(self, policy: Policy) -> Tensor:
        """log π(y|x) of each completion, (P, N) nats; their exponentials sum to 1 over N.

        Equation E31: a step adds its token to the prefix for certain, so that the product over
        tokens is all there is.
        """
        return self.token_logps(policy).sum(-1)

    def rewards(self, reward: Callable[[int, list[int]], float]) -> Tensor:
        """`reward(prompt token, completion tokens)` of each completion, (P, N).

        The list ends with the end token (0) unless the completion is truncated.
        """
        completions = [
            tokens[kept].tolist() for tokens, kept in zip(self.tokens, self.mask, strict=True)
        ]
        prompts = range(1, self.config.num_prompts + 1)
        values = [[float(reward(x, y)) for y in completions] for x in prompts]
        return torch.tensor(values, dtype=torch.float64)

    def prefix_values(self, policy: Policy, rewards: Tensor, beta: float) -> Tensor:
        """log E_h[exp(r/β) | y_≤t] for t = 0..T, (P, N, T+1) nats. Equation E23.

        Index 0 is log Z(x), index t the value after t tokens, r/β once the completion has ended.
        Minus index 0 it is log π*(y_≤t)/h(y_≤t).

        Args:
            policy: h, which completes the prefixes.
            rewards: (P, N) or (N,).
            beta: β > 0, in units of the reward; infinity gives 0.

        Raises:
            ValueError: beta is not positive.
        """
        leaves = self._of_each_prompt(rewards) / check_beta(beta)
        logps = self.logits(policy).log_softmax(-1)
        return self._along(leaves, self._back_up(leaves, logps, _log_mean_exp))

    def expected_values(self, policy: Policy, rewards: Tensor) -> Tensor:
        """E_π[r | y_≤t] for t = 0..T, (P, N, T+1), in units of the reward: a critic's target.

        Index t is the value V after t tokens, r once the completion has ended (Equation E39 with
        no reward before the end and no discount). Neighbours differ by the advantage A = Q − V, and
        E of the advantages' sum under another policy is by how much that policy is better (Equation
        E43).
        """
        logps = self.logits(policy).log_softmax(-1)
        leaves = self._of_each_prompt(rewards)
        return self._along(leaves, self._back_up(leaves, logps, _mean))

    def table_of(self, logps: Tensor) -> Tensor:
        """The table (P, R, V) of normalised logits whose completions have log-probability `logps`.

        Args:
            logps: (P, N) or (N,), normalised over N; -inf is allowed, and becomes a token of
                probability exactly 0. A prefix that cannot occur gets uniform logits.
        """
        leaves = self._of_each_prompt(logps)
        mass = self._back_up(leaves, torch.zeros(()), _log_mean_exp)
        table = self._outcomes(leaves, mass) - mass[:, : self.config.num_prefixes, None]
        return table.nan_to_num(nan=0.0).clamp(min=IMPOSSIBLE)

    def _of_each_prompt(self, values: Tensor) -> Tensor:
        return values.double().expand(self.config.num_prompts, len(self))

    def _outcomes(self, leaves: Tensor, values: Tensor) -> Tensor:
        """Values after each next token, (P, R, V): rows 0..R-1 have the children 1..N-1 in turn."""
        children = values[:, 1:].unflatten(1, (-1, self._letters))
        return torch.cat([leaves[:, : self.config.num_prefixes, None], children], dim=-1)

    def _back_up(
        self, leaves: Tensor, logps: Tensor, combine: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Values of all prefixes, (P, N), from those of completions (P, N), deepest level first."""
        stop = self.config.num_prefixes
        values = leaves[:, stop:]
        levels = [values]
        for depth in reversed(range(self.config.max_completion_length)):
            level = slice(stop - self._letters**depth, stop)
            stop = level.start
            children = values.unflatten(1, (-1, self._letters))
            outcomes = torch.cat([leaves[:, level, None], children], dim=-1)
            values = combine(logps[:, level] if logps.ndim else logps, outcomes)
            levels.insert(0, values)
        return torch.cat(levels, dim=1)

    def _along(self, leaves: Tensor, values: Tensor) -> Tensor:
        return torch.cat([values, leaves], dim=1)[:, self.nodes]


def check_beta(beta: float) -> float:
    """`beta`, which must be positive.

    Raises:
        ValueError: beta is not a positive number or infinity.
    """
    if not beta > 0:
        raise ValueError(f"beta must be a positive number or infinity, got {beta}")
    return beta


def _log_mean_exp(logps: Tensor, outcomes: Tensor) -> Tensor:
    return (logps + outcomes).logsumexp(-1)


def _mean(logps: Tensor, outcomes: Tensor) -> Tensor:
    return (logps.exp() * outcomes).sum(-1)


def _letters_of_all_prefixes(letters: int, length: int) -> Tensor:
    """Prefixes of 0..length letters in the order of their numbers, (N, length), padded."""
    levels = [torch.full((1, length), END)]
    for t in range(length):
        level = levels[-1].repeat_interleave(letters, dim=0)
        level[:, t] = torch.arange(1, letters + 1).repeat(letters**t)
        levels.append(level)
    return torch.cat(levels)


def _last_logits(policy: nn.Module, ids: Tensor, last: Tensor) -> Tensor:
    mask = (torch.arange(ids.shape[1], device=ids.device) <= last[:, None]).long()
    logits = policy(input_ids=ids, attention_mask=mask).logits
    return logits[torch.arange(len(ids), device=ids.device), last].cpu().double()
