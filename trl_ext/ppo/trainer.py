"""PPO on top of TRL's generation, reward and logging machinery."""

from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from accelerate.utils import broadcast
from torch import Tensor
from transformers import TrainerCallback

from trl_ext.errors import ConfigError, RunError
from trl_ext.functional import clipped_surrogate, gae, k3, masked_moments, masked_sum, value_loss
from trl_ext.kl_penalty import KLController
from trl_ext.models.adapter import keep_nf4_gradients_on_cpu
from trl_ext.packing import backbone_states
from trl_ext.policy_config import PolicyConfig
from trl_ext.ppo.beginning import make_critic
from trl_ext.ppo.config import PPOConfig
from trl_ext.ppo.sharding import CriticOptimizer, check_sharding
from trl_ext.rollout import MicroBatch, Rollout, whole
from trl_ext.trl_adapter import PolicyTrainer

# Keeps advantages that are all alike from being blown up to deviation 1.
_LEAST_DEVIATION = 1e-8


class PPOTrainer(PolicyTrainer):
    """Proximal policy optimisation: clipped or penalised steps along a critic's advantages.

    Source: Schulman et al. (2017), "Proximal policy optimization algorithms"; Equations E39-E46.
    The process is that of tokens: a state is a prefix, a reward that of a token (`token_rewards`:
    −β·KL_t, plus the completion's own on its last token), an advantage GAE(γ, λ) over the critic's
    values. Each token's loss is −min(ρA, clip(ρ)A), or −ρA + c·KL(π_old‖π) with c adapted, and for
    the critic ½(V − R)². The two share a step and no gradient: a head on the policy's hidden states
    does not train what is below it.

    Differs from `GRPOTrainer`: credit is a token's and comes from a critic, so that a prompt needs
    one completion only.

    Logged under `ppo/`: `value_error`, the root mean square of return minus value, and
    `explained_variance` of each rollout; `old_kl`, KL(π_old‖π) a token, `clip_fraction`, the share
    of tokens that the clip gives no gradient, `critic_grad_norm`, `stopped_early` of each step. The
    `loss` is that of policy and critic together.

    Takes the arguments of `trl.GRPOTrainer`, with a `PPOConfig`. A reward function may return a
    list of one number a token instead of one number.
    """

    config_class: ClassVar[type[PolicyConfig]] = PPOConfig
    args: PPOConfig

    _tag_names: ClassVar[list[str]] = ["trl_ext", "ppo"]
    _name = "PPO"
    _paper: ClassVar[dict[str, str]] = {}
    # Where the policy is in shards, and its optimizer has these alone.
    critic_optimizer: CriticOptimizer | None = None

    def set_up(self) -> None:
        args = self.args
        check_sharding(self)
        self.critic = make_critic(
            args.critic,
            self.model,
            args.critic_model_name_or_path,
            dtype=self.model.dtype,
            **({"quantization_config": q} if (q := _quantization(self.model)) else {}),
        ).to(args.device)
        if args.critic == "head":
            self.read_hidden = lambda hidden: self.critic.of_hidden(hidden.detach())
        elif args.gradient_checkpointing:
            backbone: Any = self.critic.backbone
            # transformers renamed it within 5.x.
            enable = getattr(backbone, "activation_checkpointing_enable", None)
            (enable or backbone.gradient_checkpointing_enable)({"use_reentrant": False})
        keep_nf4_gradients_on_cpu(self.critic)
        with torch.no_grad():
            # TRL seeds each process differently, and adapters begin at random.
            for parameter in self.critic.trained():
                parameter.copy_(cast(Tensor, broadcast(parameter.detach())))
        self.old_kl = KLController("adaptive", args.old_kl_coef, args.old_kl_target)
        # KL(π_old‖π), clipped tokens, tokens: of the micro-batches of one step.
        self._counted = torch.zeros(3)
        self._last_old_kl = float("nan")
        self.add_callback(_CriticSteps(self))

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """As transformers, with the critic's parameters as a group of their own.

        One that was given to the trainer gets that group too. Under FSDP2 the critic has an
        optimizer of its own.
        """
        optimizer = super().create_optimizer(model)
        if self.is_fsdp_enabled:
            self.critic_optimizer = self.critic_optimizer or CriticOptimizer(self)
            return optimizer
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        critic = self.critic.trained()
        if id(critic[0]) not in known:
            if self.lr_scheduler is not None:
                raise ConfigError(
                    "A scheduler was given by hand, and its optimizer does not train the critic: "
                    "what PPO adds to it, the scheduler would not follow. Give the optimizer alone "
                    "(optimizers=(optimizer, None)), and lr_scheduler_type."
                )
            optimizer.add_param_group({"params": critic, "lr": self.args.critic_learning_rate})
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers; the critic goes to the folder `critic` beside the policy."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir or ".")
            self.critic.save(folder / "critic")
            if self.critic_optimizer is not None and _internal_call and output_dir:
                self.critic_optimizer.save(folder)

    def restore(self, checkpoint: Path) -> None:
        self.critic.load(checkpoint / "critic")
        if self.critic_optimizer is not None:
            self.critic_optimizer.load(checkpoint)

    def extra_state(self) -> dict[str, Any]:
        return {"old_kl_coef": self.old_kl.beta, "last_old_kl": self._last_old_kl}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.old_kl.beta, self._last_old_kl = state["old_kl_coef"], state["last_old_kl"]

    def assign_credit(self, rollout: Rollout) -> Tensor:
        if not self.model.training:
            return rollout.batch["advantages"]
        self._adapt_penalty()
        mask = rollout.mask
        values = self._values_of_rollout(rollout)
        cut_off = self._cut_off(rollout)
        rewards = self.token_rewards(rollout, unfinished=cut_off)
        # What would follow the last token; it counts where the completion was cut off.
        following = (values[:, 1:] * rollout.last_tokens).sum(1) * cut_off
        of_lambda = partial(
            gae, rewards, values[:, :-1], mask, gamma=self.args.gamma, last_values=following
        )
        advantages, _ = of_lambda(lam=self.args.lam)
        _, returns = of_lambda(lam=self.args.critic_lam)
        scored = rollout.local(~rollout.rewards_PG.isnan())[:, None] * mask
        self._log_fit(values[:, :-1], returns, scored, rollout)
        rollout.batch["returns"], rollout.batch["old_values"] = returns, values[:, :-1]
        rollout.batch["scored"] = scored
        if self.args.whiten_advantages:
            mean, deviation = self._moments(advantages, scored, rollout)
            advantages = (advantages - mean) / (deviation + _LEAST_DEVIATION)
        return advantages * scored

    def policy_loss(self, micro_batch: MicroBatch) -> Tensor:
        logps, old_logps = micro_batch.per_token_logps, micro_batch.old_per_token_logps
        old_kl = k3(old_logps, logps)  # of π_old's samples: unbiased for KL(π_old‖π)
        self._count(old_kl, micro_batch)
        is_clip = self.args.surrogate == "clip"
        per_token = clipped_surrogate(
            logps,
            old_logps,
            micro_batch.credit,
            clip_low=self.epsilon_low if is_clip else torch.inf,
            clip_high=self.epsilon_high if is_clip else torch.inf,
        )
        if not is_clip:
            per_token = per_token + self.old_kl.beta * old_kl
        batch = micro_batch.batch
        of_values = value_loss(
            self._values(micro_batch),
            batch["returns"],
            old_values=batch["old_values"],
            clip=self.args.value_clip,
        )
        return per_token + of_values * batch["scored"]

    def _count(self, old_kl: Tensor, micro_batch: MicroBatch) -> None:
        """Add this step's tokens: their KL(π_old‖π), and how many the clip gives no gradient."""
        ratio, credit = micro_batch.log_ratios.exp(), micro_batch.credit
        is_clipped = ((ratio < 1 - self.epsilon_low) & (credit < 0)) | (
            (ratio > 1 + self.epsilon_high) & (credit > 0)
        )
        each = torch.stack([old_kl.detach(), is_clipped.float(), torch.ones_like(ratio)])
        sums = masked_sum(each, micro_batch.mask).sum(-1)
        self._counted = self._counted.to(sums) + sums

    def after_gradients(self) -> None:
        """Share the critic's gradients and clip them; leave the rollout if π is far from π_old."""
        for parameter in self.critic.trained():
            if parameter.grad is not None:
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        limit = self.args.max_grad_norm if self.args.max_grad_norm > 0 else torch.inf
        norm = torch.nn.utils.clip_grad_norm_(self.critic.trained(), limit)
        if not norm.isfinite():
            raise RunError(
                f"The critic's gradient in step {self.state.global_step + 1} is not finite; the "
                "weights are as they were before it. A lower critic_learning_rate is the usual "
                "cure; a reward of extreme size is another cause."
            )
        counted = self.accelerator.reduce(self._counted.to(self.args.device))
        self._counted = torch.zeros(3)
        old_kl, clipped, tokens = counted.tolist()
        if not tokens:
            return
        self.log_metric("ppo/critic_grad_norm", norm.item())
        self._last_old_kl = old_kl / tokens
        self.log_metric("ppo/old_kl", self._last_old_kl)
        if self.args.surrogate == "clip":
            self.log_metric("ppo/clip_fraction", clipped / tokens)
        limit = self.args.early_stop_kl
        is_far = limit is not None and self._last_old_kl > limit
        if limit is not None:
            self.log_metric("ppo/stopped_early", float(is_far))
        if is_far:
            self.end_rollout()
            # Without gradients the optimizer leaves parameters and moments as they are.
            for parameter in (*self.model.parameters(), *self.critic.parameters()):
                parameter.grad = None

    def _adapt_penalty(self) -> None:
        if self.args.surrogate == "penalty":
            self.old_kl.update(self._last_old_kl, 0)
            self.log_metric("ppo/old_kl_coef", self.old_kl.beta)

    def _values_of_rollout(self, rollout: Rollout) -> Tensor:
        """(B, T+1) of the states before each token and after the last, without gradient."""
        if self.args.critic == "head":
            return self.sampler_readout(rollout)
        with torch.no_grad():
            return self._own_values(rollout.batch)

    def _values(self, micro_batch: MicroBatch) -> Tensor:
        """(B, T) with gradient to the critic."""
        if micro_batch.readout is not None:
            return micro_batch.readout[:, :-1]
        return self._own_values(micro_batch.batch)[:, :-1]

    def _own_values(self, batch: Any) -> Tensor:
        """(B, T+1) from the critic's own backbone."""
        if "pixel_values" in batch:
            raise ConfigError(
                f"critic={self.args.critic!r} reads text alone, and these prompts have images. Use "
                "critic='head', which reads the policy's own states."
            )
        args, backbone = self.args, self.critic.backbone
        ids, mask = whole(batch)
        states = partial(
            backbone_states,
            backbone,
            backbone,
            kept=batch["completion_ids"].size(1),
            trim_padding=args.trim_padding,
            share_prompts=args.share_prompts,
        )
        self.critic.train(torch.is_grad_enabled())
        rows = args.per_device_train_batch_size
        with self.accelerator.autocast():
            parts = zip(ids.split(rows), mask.split(rows), strict=True)
            return torch.cat([self.critic.of_hidden(states(i, m)) for i, m in parts])

    def _cut_off(self, rollout: Rollout) -> Tensor:
        """(B,) bool: completions whose end is bootstrapped, as they did not come to one."""
        ids = rollout.batch["completion_ids"]
        if not self.args.bootstrap_truncated:
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        ends = torch.isin(ids, torch.tensor(self.eos_token_ids, device=ids.device))
        return rollout.mask.any(1) & ~(ends & rollout.last_tokens).any(1)

    def _moments(self, values: Tensor, keep: Tensor, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over the kept tokens of all processes."""
        return masked_moments(self.over_groups(values, rollout), self.over_groups(keep, rollout))

    def _log_fit(self, values: Tensor, returns: Tensor, keep: Tensor, rollout: Rollout) -> None:
        """Log how much of the returns' variance the critic explains: 1 all of it, a mean 0."""
        mean, deviation = self._moments(returns - values, keep, rollout)
        _, spread = self._moments(returns, keep, rollout)
        self.log_metric("ppo/value_error", torch.hypot(mean, deviation).item())
        if spread > 0:
            self.log_metric("ppo/explained_variance", 1 - (deviation / spread).square().item())


class _CriticSteps(TrainerCallback):
    """The critic's part of a step: its parameters are not the model's, which the trainer minds."""

    def __init__(self, trainer: PPOTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.after_gradients()

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer.critic_optimizer is not None:
            self.trainer.critic_optimizer.step()
        self.trainer.critic.zero_grad()


def _quantization(model: Any) -> Any:
    return getattr(model.config, "quantization_config", None)
