"""What an algorithm overrides, and what its hooks call."""

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import PreTrainedModel
from trl import GRPOTrainer as TRLGRPOTrainer

from trl_ext.kl_term import KLTerm
from trl_ext.packing import rescales_with_length, why_not_packed
from trl_ext.policy_config import PolicyConfig
from trl_ext.rollout import MicroBatch, Rollout


class Hooks(TRLGRPOTrainer):
    """`trl.GRPOTrainer` with hooks for score, credit and loss that do what TRL does."""

    config_class: ClassVar[type[PolicyConfig]] = PolicyConfig
    # Their own annotations are wider than what a policy trainer can hold.
    args: PolicyConfig
    model: Any
    accelerator: Any
    kl: KLTerm
    process_reward: Any
    # What to compute from the policy's hidden states (b, T+1, H) whenever it scores completions:
    # those that predict the tokens 0..T-1 and what would follow. Set before training, or None.
    read_hidden: Callable[[Tensor], Tensor] | None = None
    # What it is at: load, generate, reward, score (a pass without gradient), train, save. The last
    # one is what ran out of memory, if anything did.
    phase = "load"
    _is_built = False

    def set_up(self) -> None:
        """What a trainer adds to itself, once TRL's is built. TRL: nothing."""

    def uses_reference(self, args: PolicyConfig) -> bool:
        """Whether the reference model is loaded and scores every rollout. TRL: if β is not 0.

        Asked only of a trainer with a `policy_loss` of its own.
        """
        return args.beta != 0.0

    @property
    def reads_ref_logps(self) -> bool:
        """Whether `ref_per_token_logps` is wanted beside a KL over the vocabulary."""
        return False

    def needs_every_row(self, batch: Mapping[str, Any]) -> bool:
        """Whether a completion with credit 0 may have a gradient in `policy_loss`. TRL's has none.

        Args:
            batch: tensors of the rollout, as of a `MicroBatch`.
        """
        return self._replaces_loss

    def score_completions(self, score_once: Callable[[], Tensor]) -> Tensor:
        """Rewards (P·G, number of reward functions) over all processes, NaN for not applicable."""
        return score_once()

    def assign_credit(self, rollout: Rollout) -> Tensor:
        """Credit (B,) or (B, T) of local completions. TRL: group-normalised advantages (E48)."""
        return rollout.batch["advantages"]

    def policy_loss(self, micro_batch: MicroBatch) -> Tensor:
        """Loss of a micro-batch instead of TRL's surrogate: a mean over its rows, or (B, T).

        A loss per token is added up as `loss_type` says. Accumulation and processes are averaged
        over by the caller; the KL penalty, TRL's entropy bonus and router loss stay.
        """
        raise AssertionError(
            "PolicyTrainer leaves the loss to TRL unless a subclass overrides policy_loss."
        )

    def restore(self, checkpoint: Path) -> None:
        """Load what `save_model` added to a checkpoint. TRL: nothing."""

    def extra_state(self) -> dict[str, Any]:
        """Numbers and tensors that a checkpoint keeps for `load_extra_state`."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take over what `extra_state` gave when the checkpoint was written."""

    @property
    def group_size(self) -> int:
        """G, completions of a prompt: `num_generations`, in evaluation `num_generations_eval`."""
        group = self.num_generations if self.model.training else self.num_generations_eval
        assert group is not None
        return group

    def log_metric(self, name: str, value: float) -> None:
        """Record a number, the same on all processes; a log line has the mean since the last."""
        self._metrics["train" if self.model.training else "eval"][name].append(value)

    def over_groups(self, values: Tensor, rollout: Rollout) -> Tensor:
        """(B,) or (B, T) of this process -> (P, G) or (P, G, T) over all, padded with 0."""
        if values.dim() > 1:
            values = self.accelerator.pad_across_processes(values, dim=1)
        return self.accelerator.gather(values).unflatten(0, rollout.rewards_PG.shape)

    def token_rewards(self, rollout: Rollout, *, unfinished: Tensor | None = None) -> Tensor:
        """(B, T) reward of each token: a completion's own on its last, minus β·KL_t. Equation E30.

        A reward function that gave one number a token has them there. What no function scored has
        reward 0. The KL is that of the policy that made the rollout, with kl_placement "reward".

        Args:
            rollout: the completions.
            unfinished: (B,) bool, completions that get no reward of their own: their end is not
                there yet.
        """
        total = rollout.local(rollout.rewards_PG).nan_to_num(nan=0.0).to(rollout.mask.device)
        rewards = self._dense_rewards(rollout)
        of_all = total - rewards.sum(1)
        if unfinished is not None:
            of_all = of_all.masked_fill(unfinished, 0.0)
        rewards = rewards + rollout.last_tokens * of_all[:, None]
        if self.kl.enters("reward"):
            rewards = rewards - self.kl.beta * self.kl.of_rollout(rollout)
        return rewards * rollout.mask

    def _dense_rewards(self, rollout: Rollout) -> Tensor:
        """(B, T) weighted sum of the rewards that were given token by token."""
        dense = torch.zeros(rollout.mask.shape, device=rollout.mask.device)
        for reward_func, weight in zip(self.reward_funcs, self.reward_weights, strict=True):
            checked = getattr(reward_func, "checked", None)
            for row, numbers in (checked.token_rewards if checked else {}).items():
                dense[row, : len(numbers)] += weight.item() * dense.new_tensor(numbers)
        # What a tool's answer earned is earned by the token that called it.
        positions = torch.arange(dense.size(1), device=dense.device).where(rollout.mask.bool(), -1)
        earned_by = positions.cummax(dim=1).values.clamp(min=0)
        return torch.zeros_like(dense).scatter_add(1, earned_by, dense)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model, adapters inside it included."""
        return self.model.get_base_model() if is_peft_model(self.model) else self.model

    def add_callback(self, callback: Any) -> None:
        """As transformers; one that has a `begin` is shown this trainer.

        A callback may also have `on_rollout` (completions of a rollout or an evaluation are scored;
        with `rollout`), and `on_held_out_begin` and `on_held_out_end` (of an evaluation, not yet
        logged; with its number of `prompts`); each is called as transformers' events are, with
        `trainer`. What its `extra_state` gives, a checkpoint keeps for its `load_extra_state`.
        """
        super().add_callback(callback)
        if self._is_built:
            self._begin_callbacks()

    def _begin_callbacks(self) -> None:
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "begin"):
                callback.begin(self)

    def _tell(self, event: str, **given: Any) -> None:
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, event):
                getattr(callback, event)(self.args, self.state, self.control, trainer=self, **given)

    @property
    def packs(self) -> bool:
        """Whether the policy's rows are run packed (`trl_ext.packing`)."""
        return self._trims and why_not_packed(self.model) is None

    @property
    def _trims(self) -> bool:
        """Whether rows are run without padding, be it that of all rows of a pass alone."""
        # A compiled model is compiled anew for each shape.
        is_wanted = self.args.trim_padding and not self.args.torch_compile
        return is_wanted and not rescales_with_length(self.model)

    @property
    def _keeps_last(self) -> bool:
        """Whether packed passes run the last token of each completion too, for its state."""
        return self.read_hidden is not None or self.kl.over_vocabulary

    @property
    def _accumulated(self) -> int:
        """Micro-batches of an optimizer step, over which the trainer itself takes the mean."""
        return self.current_gradient_accumulation_steps if self.model.training else 1

    @property
    def _generate_every(self) -> int:
        """Micro-batches between two rollouts."""
        return self._steps_per_generation * self.num_iterations

    @property
    def _steps_per_generation(self) -> int:
        """Micro-batches of a rollout."""
        assert self.args.steps_per_generation is not None
        return self.args.steps_per_generation

    @property
    def _replaces_loss(self) -> bool:
        return type(self).policy_loss is not Hooks.policy_loss

    @contextmanager
    def _trl_beta(self, value: float):
        """What TRL takes for β meanwhile: 0 for no KL in its loss, and no pass of the reference."""
        beta, self.beta = self.beta, value
        try:
            yield
        finally:
            self.beta = beta
