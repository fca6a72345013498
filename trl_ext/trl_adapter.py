"""The seam to TRL: the only file that names TRL's and transformers' underscore methods.

`PolicyTrainer` post-processes what `trl.GRPOTrainer` computes and copies none of it. Algorithms
override three hooks: what a completion is worth (`score_completions`), what credit it gets
(`assign_credit`) and what the loss of a micro-batch is (`policy_loss`). With the hooks left alone
it is `trl.GRPOTrainer`, number for number.
"""

import math
import os
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer, TrainerState
from trl import GRPOTrainer as TRLGRPOTrainer
from trl.trainer.utils import use_adapter

from trl_ext.bundled import resolve_model
from trl_ext.errors import ConfigError, RewardError, RunError
from trl_ext.functional import TokenAggregation, aggregate_tokens, k1, masked_sum
from trl_ext.kl_term import KLTerm
from trl_ext.models.adapter import keep_nf4_gradients_on_cpu
from trl_ext.policy_config import PolicyConfig
from trl_ext.registry import load_process_reward
from trl_ext.rewards.columns import (
    asked_of_trainer,
    check_reference_can_be_had,
    show_policy,
    with_columns,
)
from trl_ext.rewards.guard import guarded_all, is_async
from trl_ext.rollout import MicroBatch, Rollout, generated, whole
from trl_ext.tasks.columns import check_datasets, check_size
from trl_ext.vocabulary_kl import hidden_states_of
from trl_ext.watch import RewardHackingWatch

# What TRL's rollouts carry for models that read images, and its log-probability method takes.
_MULTIMODAL_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
# TRL's loss type -> how it adds up a loss per token.
_AGGREGATION: dict[str, TokenAggregation] = {
    "grpo": "completion means",
    "sapo": "completion means",
    "bnpo": "tokens",
    "dr_grpo": "fixed length",
    "luspo": "completion sums",
}
# Loss types that divide by the number of tokens of all micro-batches and processes.
_OVER_THE_BATCH = ("dapo", "cispo", "vespo")


class PolicyTrainer(TRLGRPOTrainer):
    """`trl.GRPOTrainer` with hooks for score, credit and loss; base of the policy trainers here.

    Takes the arguments of `trl.GRPOTrainer`. With the hooks as they are here it gives the same
    losses, gradients and parameters (`tests/parity`). It also ends a completion at `stop_strings`,
    names the reward function and the sample when a reward fails, checks the dataset before it loads
    a model, restores a half-used rollout on resume, and keeps the gradients of NF4 models on CPUs.

    Takes also `process_reward`: an object whose `token_rewards(prompt_ids, completion_ids)` gives a
    list of one number a token for each completion, such as a `GibbsScorer`; their credit is added
    as the options `process_level` to `process_gamma` say. Or the option `process_reward` names one.
    """

    config_class: ClassVar[type[PolicyConfig]] = PolicyConfig
    # Their own annotations are wider than what a policy trainer can hold.
    args: PolicyConfig
    model: Any
    accelerator: Any
    # What to compute from the policy's hidden states (b, T+1, H) whenever it scores completions:
    # those that predict the tokens 0..T-1 and what would follow. Set before training, or None.
    read_hidden: Callable[[Tensor], Tensor] | None = None
    _is_built = False

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Any = None,
        args: PolicyConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *positional: Any,
        process_reward: Any = None,
        **trl_arguments: Any,
    ):
        model = resolve_model(model) if isinstance(model, str) else model
        args = self._own_config(model, args)
        self.kl = KLTerm(args, self)
        self.process_reward = _process_reward(args, process_reward, model)
        if not trl_arguments.get("environment_factory"):
            check_datasets(train_dataset, eval_dataset)
        watch = None if args.gold_reward_funcs is None else RewardHackingWatch.from_config(args)
        self._given_rewards = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        reward_funcs = guarded_all(reward_funcs, args.reward_timeout)
        self._asked_for = asked_of_trainer(reward_funcs or [])
        check_reference_can_be_had(
            reward_funcs or [],
            masks_truncated=args.mask_truncated_completions,
            has_reference=(
                isinstance(model, str)
                or trl_arguments.get("peft_config") is not None
                or is_peft_model(model)
                or bool(model.config._name_or_path)
            ),
        )
        with self._reference_only_if_used(args):
            super().__init__(
                model,
                reward_funcs,
                args,
                train_dataset,
                eval_dataset,
                *positional,
                **trl_arguments,
            )
        self._check_reference(model)
        if not self._replaces_loss:
            self.beta = args.beta
        show_policy(self.reward_funcs, self.model, self._tokenizer)
        self._rewards_per_func: Tensor | None = None
        self._evaluation_rewards: list[Tensor] = []
        # Log-probabilities and readout of each scoring pass since the last rollout or loss.
        self._scored: list[tuple[Tensor, Tensor | None]] = []
        self._sampled: Tensor | None = None
        self._prompt_ids: list[list[int]] = []
        self._shown_ref_logps: Tensor | None = None
        self._rollout_is_spent = False
        self._is_first_sample = True
        self._train_sampler: Any = None
        if isinstance(self.train_dataset, Dataset):
            assert args.generation_batch_size is not None and args.num_generations is not None
            check_size(len(self.train_dataset), args.generation_batch_size, args.num_generations)
        self.args.use_bias_correction_kl = args.kl_is_correction
        self._stop_at(args.stop_strings or [])
        keep_nf4_gradients_on_cpu(self.model)
        self._begins_as_base = trl_arguments.get("peft_config") is not None
        self._is_built = True
        if watch is not None:
            self.callback_handler.add_callback(watch)
        self._begin_callbacks()
        self.set_up()
        if self.process_reward is not None:
            self.process_reward.set_up(self)

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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers; one that learns process rewards to `process_reward/scorer`."""
        super().save_model(output_dir, _internal_call)
        if self.process_reward is not None and self.args.should_save:
            folder = Path(output_dir or self.args.output_dir or ".")
            self.process_reward.save(folder / "process_reward")

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
    def completion_ids(self) -> list[list[int]]:
        """Token ids of the completions of the rollout under way, those of this process."""
        return self._to_score[3]

    @property
    def prompt_ids(self) -> list[list[int]]:
        """Token ids of their prompts, one list a completion."""
        return self._prompt_ids

    def held_out_rewards(self, reward_funcs: list[Any]) -> list[Any]:
        """Reward functions as `score_held_out` takes them.

        Raises:
            ConfigError: if one is trained on, or is not an ordinary function.
        """
        for reward_func in reward_funcs:
            name = getattr(reward_func, "__name__", reward_func)
            if any(reward_func is given for given in self._given_rewards):
                raise ConfigError(
                    f"The gold reward {name!r} is also trained on: it would measure nothing held "
                    "out. Give one that training never sees, or remove it from reward_funcs."
                )
            if isinstance(reward_func, str | torch.nn.Module) or is_async(reward_func):
                raise ConfigError(
                    f"The gold reward {name!r} must be an ordinary function (prompts, completions, "
                    "**columns) -> one number a completion: neither async nor a model. Wrap it."
                )
        guarded = guarded_all(reward_funcs, self.args.reward_timeout)
        if "ref_per_token_logps" in asked_of_trainer(guarded):
            raise ConfigError(
                "A gold reward asks for ref_per_token_logps, which only rewards that are trained "
                "on are given. Give another."
            )
        show_policy(guarded, self.model, self._tokenizer)
        return guarded

    def score_held_out(self, reward_funcs: list[Any]) -> Tensor:
        """(P·G, n) what n `held_out_rewards` give the completions of the rollout under way.

        Over all processes; NaN for not applicable. Nothing of it is logged or trained on.

        Raises:
            RewardError: if one fails.
        """
        inputs, *rest = self._to_score
        if "prompt_ids" in asked_of_trainer(reward_funcs):
            inputs = with_columns(inputs, {"prompt_ids": self._prompt_ids})
        trained_on = self.reward_funcs, self.reward_func_names, self.reward_processing_classes
        self.reward_funcs = reward_funcs
        self.reward_func_names = [f"gold/{each.__name__}" for each in reward_funcs]
        self.reward_processing_classes = [None] * len(reward_funcs)
        try:
            return super()._calculate_rewards(inputs, *rest)
        except RewardError as error:
            raise type(error)(f"A gold reward failed. {error}") from error
        finally:
            self.reward_funcs, self.reward_func_names, self.reward_processing_classes = trained_on
            self._pending_extra_logs.clear()
            self._pending_metrics.clear()

    def log_ratio_to_reference(self, rollout: Rollout) -> Tensor | None:
        """(P, G) log π/π_ref of each completion of the rollout under way, nats.

        Its mean estimates KL(π‖π_ref) of completions without bias (Equation E28, k1).

        Returns:
            None where the policy before training is not at hand: there is no reference model and no
            new adapter to switch off. NaN for completions whose tokens are masked.
        """
        reference = self._reference_logps(rollout.batch)
        if reference is None:
            return None
        ratios = masked_sum(k1(self.sampler_logps(rollout), reference), rollout.mask)
        return self.over_groups(ratios.masked_fill(~rollout.mask.any(dim=1), torch.nan), rollout)

    def _reference_logps(self, batch: dict[str, Any]) -> Tensor | None:
        if "ref_per_token_logps" in batch:
            return batch["ref_per_token_logps"]
        if self.ref_model is not None:
            return self._logps_under(self.ref_model, batch)
        if not self._begins_as_base:
            return None
        with use_adapter(self.accelerator.unwrap_model(self.model), adapter_name=None):
            return self._logps_under(self.model, batch)

    def _logps_under(self, model: Any, batch: dict[str, Any]) -> Tensor:
        """(B, T) nats, one pass without gradient."""
        with torch.no_grad():
            return self._get_per_token_logps_and_entropies(
                model,
                *whole(batch),
                batch["completion_ids"].size(1),
                batch_size=self.args.per_device_train_batch_size,
                **{name: batch[name] for name in _MULTIMODAL_INPUTS if name in batch},
            )[0]

    def save_policy(self, folder: Path) -> None:
        """Save the policy as `save_model`, and push it nowhere."""
        self.save_model(str(folder), _internal_call=True)

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers, with the events that `add_callback` describes."""
        self._tell("on_held_out_begin")
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        # Several processes fill up their last batch with the first prompts again.
        sized = hasattr(getattr(dataloader, "dataset", None), "__len__")
        self._tell("on_held_out_end", prompts=len(dataloader.dataset) if sized else None)
        return output

    def evaluation_rewards(self) -> list[list[float | None]]:
        """Of the last evaluation: the rewards of each prompt's completions, in a fixed order.

        None marks a completion that no reward function scored.
        """
        # Several processes fill up their last batch with the first prompts again.
        prompts = torch.cat(self._evaluation_rewards).tolist()
        if isinstance(self.eval_dataset, Dataset):
            prompts = prompts[: len(self.eval_dataset)]
        return [[None if math.isnan(reward) else reward for reward in group] for group in prompts]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `transformers.Trainer.evaluate`; keeps every reward for `evaluation_rewards`."""
        self._evaluation_rewards = []
        # The order of prompts is drawn from the seed when a loader is made: one that persistent
        # workers keep would go on drawing, and evaluations could not be paired by prompt.
        self.__dict__.pop("_eval_dataloaders", None)
        return super().evaluate(*args, **kwargs)

    def sample_and_score(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """`num_generations_eval` completions of each prompt and their rewards; nothing is trained.

        Log-probabilities are those at the sampling `temperature`, before top_p, top_k, min_p and a
        repetition penalty.

        Args:
            rows: of this process, each with a `prompt`; as many of them on every process.

        Returns:
            A mapping a completion, those of the first row first: `completion` (text or messages),
            `reward` (the weighted sum; None if no function scored it), `rewards` (one of each
            function, or None), `prompt_ids`, `completion_ids`, `logp` (Σ_t log π, nats, under the
            policy that sampled), `ref_logp` (the same under the reference) where one is loaded,
            and `is_truncated`.

        Raises:
            ConfigError: if the completions hold what the policy did not write, as tools do.
        """
        if self._is_first_sample:
            # As evaluation does: mixed precision is what this puts around the model.
            self.accelerator.prepare_model(self.model, evaluation_mode=True)
            self._is_first_sample = False
        self.model.eval()
        rollout = self._rollout([dict(row) for row in rows for _ in range(self.group_size)])
        if "tool_mask" in rollout.batch:
            raise ConfigError(
                "The completions hold answers of tools or of an environment, which are no samples "
                "of the policy: they cannot be collected. Leave out tools, environment_factory and "
                "rollout_func."
            )
        columns = self._sampled_columns(rollout)
        self._forget_passes()
        self._metrics["eval"].clear()
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _sampled_columns(self, rollout: Rollout) -> dict[str, list[Any]]:
        assert self._rewards_per_func is not None
        _, _, texts, ids = self._to_score
        ends = [*self.eos_token_ids, self._tokenizer.pad_token_id]
        columns = {
            "completion": texts,
            "reward": _with_none(rollout.local(rollout.rewards_PG)),
            "rewards": [_with_none(row) for row in self._rewards_per_func[rollout.local_rows]],
            "prompt_ids": self._prompt_ids,
            "completion_ids": ids,
            "logp": _sums(self.sampler_logps(rollout), rollout.mask),
        }
        if "ref_per_token_logps" in rollout.batch:
            columns["ref_logp"] = _sums(rollout.batch["ref_per_token_logps"], rollout.mask)
        return columns | {"is_truncated": [row[-1] not in ends for row in ids]}

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """As TRL, but a loss of our own is not evaluated: on fresh samples it measures nothing.

        A forward pass over the evaluation set is saved; rewards are measured as ever.
        """
        if not self._replaces_loss:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        self._prepare_inputs(inputs)
        return None, None, None

    def sampler_logps(self, rollout: Rollout) -> Tensor:
        """(B, T) per-token log-probabilities, nats, under the policy that generated the rollout."""
        batch = rollout.batch
        for known in ("sampling_per_token_logps", "old_per_token_logps"):
            if known in batch:
                return batch[known]
        return self._sampler_pass(rollout)[0]

    def sampler_readout(self, rollout: Rollout) -> Tensor:
        """What `read_hidden` made of the policy that generated the rollout, (B, …)."""
        readout = self._sampler_pass(rollout)[1]
        assert readout is not None
        return readout

    def _sampler_pass(self, rollout: Rollout) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities and readout of the policy now, which is the one that sampled."""
        batch = rollout.batch
        known = batch.get("old_per_token_logps", self._sampled)
        for logps, readout in self._scored:
            if logps is known:
                return logps, readout
        self._sampled = self._logps_under(self.model, batch)
        return self._scored[-1]

    def _generate(self, prompts):
        result = super()._generate(prompts)
        self._prompt_ids = result[0]
        return result

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self._to_score = inputs, prompts, completions, completion_ids_list
        inputs = with_columns(inputs, self._offered_columns(completion_ids_list))

        def score_once() -> Tensor:
            # One row a completion in the completions table, however often a completion is scored.
            self._pending_extra_logs.clear()
            return super(PolicyTrainer, self)._calculate_rewards(
                inputs, prompts, completions, completion_ids_list
            )

        self._rewards_per_func = self.score_completions(score_once)
        return self._rewards_per_func

    def _offered_columns(self, completion_ids: list[list[int]]) -> dict[str, list]:
        """The columns that a reward function asks for, a row a local completion."""
        columns: dict[str, list] = {}
        if "prompt_ids" in self._asked_for:
            columns["prompt_ids"] = self._prompt_ids
        if "ref_per_token_logps" in self._asked_for:
            # TRL scores under the old policy, then under the reference, then calls the rewards.
            self._shown_ref_logps = self._scored[-1][0]
            columns["ref_per_token_logps"] = [
                row[: len(ids)]
                for row, ids in zip(self._shown_ref_logps.tolist(), completion_ids, strict=True)
            ]
        return columns

    def _generate_and_score_completions(self, inputs):
        rollout = self._rollout(inputs)
        batch = rollout.batch
        batch["advantages"] = self.assign_credit(rollout)
        if self.process_reward is not None and self.model.training:
            batch["advantages"] = self.process_reward.added(batch["advantages"], rollout)
        self._show_credit(batch["advantages"])
        if not self.model.training:
            self._evaluation_rewards.append(rollout.rewards_PG)
        elif self.kl.enters("reward") and not self._replaces_loss:
            batch["advantages"] = self.kl.minus_to_go(batch["advantages"], rollout)
        self._tell("on_rollout", rollout=rollout)
        self._forget_passes()
        return batch

    def _rollout(self, inputs) -> Rollout:
        """Completions as TRL generates and scores them, before a hook gives them credit."""
        if self.model.training:
            completions = len(inputs) * self.accelerator.num_processes
            if self.kl.adapt(completions) and not self._replaces_loss:
                self.beta = self.kl.beta
            self._rollout_is_spent = False
        self._scored = []
        # A KL over the vocabulary runs the reference itself, where it has the policy's states.
        asked = "ref_per_token_logps" in self._asked_for
        unused = self.kl.over_vocabulary and not self.reads_ref_logps and not asked
        with self._trl_beta(0.0 if unused else self.beta or float(asked)):
            batch = super()._generate_and_score_completions(inputs)
        assert not asked or self._shown_ref_logps is batch["ref_per_token_logps"]
        first = self.accelerator.process_index * len(inputs)
        local_rows = slice(first, first + len(inputs))
        return Rollout(self._summed_rewards().view(-1, self.group_size), batch, local_rows)

    def _forget_passes(self) -> None:
        self._scored, self._sampled, self._shown_ref_logps = [], None, None

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
    ):
        score = partial(super()._get_per_token_logps_and_entropies, model, input_ids)
        if self.read_hidden is None or model is self.ref_model:
            result, readout = score(attention_mask, logits_to_keep, *args, **kwargs), None
        else:
            with hidden_states_of(self.causal_lm) as passes:
                result = score(attention_mask, logits_to_keep, *args, **kwargs)
            readout = torch.cat([self.read_hidden(h[:, -logits_to_keep - 1 :]) for h in passes])
        self._scored.append((result[0], readout))
        return result

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As TRL, but nothing is done for a rollout that `end_rollout` has put aside."""
        if self._rollout_is_spent and self._step % self._generate_every:
            self._step += 1
            return torch.zeros((), device=self.args.device)
        return super().training_step(model, inputs, num_items_in_batch)

    def end_rollout(self) -> None:
        """Take no more steps on this rollout: parameters stay until the next one is generated."""
        self._rollout_is_spent = True

    def _compute_loss(self, model, inputs):
        self._scored = []
        is_trls = self.kl.is_trls and not self._replaces_loss
        with self.kl.watching() as passes:
            if self._replaces_loss:
                loss = self._own_loss(model, inputs)
            elif is_trls:
                loss = super()._compute_loss(model, inputs)
            else:
                with self._trl_beta(0.0):
                    loss = super()._compute_loss(model, inputs)
        [(logps, _)] = self._scored
        self._scored = []
        per_token = self.kl.per_token(logps, inputs, passes)
        if per_token is not None and self.kl.enters("loss") and not is_trls:
            loss = loss + self.kl.beta * self._added_up(per_token, inputs)
        return loss

    def _own_loss(self, model, inputs):
        # Without credit and KL, TRL's loss is what it adds to the policy term: entropy bonus,
        # router loss. Without the old log-probabilities, no ratio can overflow.
        rows = {name: value for name, value in inputs.items() if name != "old_per_token_logps"}
        with self._trl_beta(0.0):
            rest = super()._compute_loss(
                model, rows | {"advantages": torch.zeros_like(inputs["advantages"])}
            )
        [(logps, readout)] = self._scored
        loss = self.policy_loss(
            MicroBatch(logps, generated(inputs), inputs["advantages"], inputs, readout)
        )
        self._drop_surrogate_metrics()
        return rest + (
            self._added_up(loss, inputs) if loss.dim() == 2 else loss / self._accumulated
        )

    def _added_up(self, per_token: Tensor, inputs) -> Tensor:
        """A loss (B, T) summed up over tokens as TRL does for its loss type."""
        mask = generated(inputs)
        if self.loss_type in _OVER_THE_BATCH:
            # The count spans the generation batch, of which an accumulation window is a part.
            count = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
            if self.model.training:
                count = count * self._accumulated / self.args.steps_per_generation
            return aggregate_tokens(per_token, mask, "tokens", count=count)
        how = _AGGREGATION[self.loss_type]
        length = self.max_completion_length if how == "fixed length" else None
        return aggregate_tokens(per_token, mask, how, count=length) / self._accumulated

    def _save_rng_state(self, output_dir):
        # A checkpoint may fall between two uses of one rollout; TRL would generate anew on resume.
        super()._save_rng_state(output_dir)
        rollout = {
            "step": self._step,
            "num_processes": self.accelerator.num_processes,
            "buffered_inputs": self._unused_rollout(),
            "kl": self.kl.state(),
            "is_spent": self._rollout_is_spent,
            "extra": self.extra_state(),
            "callbacks": {type(each).__name__: each.extra_state() for each in self._keeping()},
            "process_reward": self.process_reward and self.process_reward.state(),
        }
        torch.save(rollout, self._rollout_file(output_dir))
        # The first process now writes the file that marks a checkpoint as complete.
        self.accelerator.wait_for_everyone()

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            if not os.path.isfile(self._rollout_file(checkpoint)):
                raise RunError(
                    f"{checkpoint} has no {os.path.basename(self._rollout_file(checkpoint))}, "
                    "which says how far a rollout has been used and where beta is: it was not "
                    "written by this trainer on as many processes, or a file is lost."
                )
            rollout = self._read_rollout(checkpoint)
            if rollout["num_processes"] != self.accelerator.num_processes:
                raise RunError(
                    f"{checkpoint} was written by {rollout['num_processes']} processes and cannot "
                    f"be resumed by {self.accelerator.num_processes}: each holds its share of a "
                    f"rollout. Set num_processes={rollout['num_processes']}."
                )
            self._step, self._buffered_inputs = rollout["step"], rollout["buffered_inputs"]
            self.kl.load_state(rollout["kl"])
            self._rollout_is_spent = rollout["is_spent"]
            self.load_extra_state(rollout["extra"])
            if not self._replaces_loss:
                self.beta = self.kl.beta
            self.restore_all(Path(checkpoint))
            if self.process_reward is not None:
                self.process_reward.load_state(rollout["process_reward"])

    def _read_rollout(self, checkpoint: str) -> dict[str, Any]:
        # The second CPU process has the device "cpu:1", which torch.load does not know.
        device = self.args.device if self.args.device.type != "cpu" else "cpu"
        return torch.load(self._rollout_file(checkpoint), map_location=device, weights_only=True)

    def _keeping(self) -> list[Any]:
        """The callbacks of which a checkpoint keeps something."""
        return [each for each in self.callback_handler.callbacks if hasattr(each, "extra_state")]

    def restore_callbacks(self, checkpoint: Path) -> None:
        """Load what a checkpoint keeps of the callbacks that have an `extra_state`."""
        # A checkpoint without its file is refused once its rollout is read.
        if os.path.isfile(self._rollout_file(str(checkpoint))):
            kept = self._read_rollout(str(checkpoint)).get("callbacks", {})
            for callback in self._keeping():
                if type(callback).__name__ in kept:
                    callback.load_extra_state(kept[type(callback).__name__])

    def restore_all(self, checkpoint: Path) -> None:
        """Load what `save_model` added to a checkpoint: a trainer's own, and a process reward."""
        self.restore(checkpoint)
        if self.process_reward is not None:
            self.process_reward.restore(checkpoint / "process_reward")

    def _load_best_model(self):
        super()._load_best_model()
        if self.state.best_model_checkpoint is not None:
            self.restore_all(Path(self.state.best_model_checkpoint))

    def _get_train_sampler(self, dataset=None):
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        # TRL's sampler draws the order of each epoch from one generator: on resume, draw those of
        # the epochs that are over.
        epochs_trained, steps_trained = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is not None:
            self.restore_callbacks(Path(resume_from_checkpoint))
        if self._train_sampler is not None:
            for _ in range(epochs_trained):
                next(iter(self._train_sampler), None)
        return epochs_trained, steps_trained

    @property
    def _accumulated(self) -> int:
        """Micro-batches of an optimizer step, over which the trainer itself takes the mean."""
        return self.current_gradient_accumulation_steps if self.model.training else 1

    @property
    def _replaces_loss(self) -> bool:
        return type(self).policy_loss is not PolicyTrainer.policy_loss

    def _check_reference(self, before: Any) -> None:
        """TRL re-reads the reference of full fine-tuning from disk, whatever became of the model.

        Raises:
            ConfigError: if that is another model than the policy, given as an object.
        """
        if isinstance(before, str) or self.ref_model is None:
            return
        reference = dict(self.accelerator.unwrap_model(self.ref_model).named_parameters())
        for name, weight in self.accelerator.unwrap_model(self.model).named_parameters():
            theirs = reference.get(name)
            # What is spread over processes is not compared.
            if theirs is None or theirs.shape != weight.shape or isinstance(weight, DTensor):
                continue
            if not torch.equal(theirs.to(weight), weight):
                raise ConfigError(
                    "A reference model is asked for, and the policy was given as an object: TRL "
                    f"read the reference from {before.config._name_or_path!r}, and its weights "
                    f"differ ({name} is the first). Save the policy and give its path, or train an "
                    "adapter (peft_config), whose reference is the model without it."
                )

    def _own_config(self, model: Any, args: PolicyConfig | None) -> PolicyConfig:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            return self.config_class(
                f"{os.path.basename(name)}-{type(self).__name__.removesuffix('Trainer')}"
            )
        if not isinstance(args, self.config_class):
            config, package = self.config_class.__name__, type(args).__module__.partition(".")[0]
            raise ConfigError(
                f"{type(self).__name__} takes args of type {config}, got {type(args).__name__} of "
                f"{package}. Build it as trl_ext.{config}(...): it has the same fields and adds "
                "its own."
            )
        return args

    @contextmanager
    def _reference_only_if_used(self, args: PolicyConfig):
        """TRL loads a reference and scores with it if β is not 0: it sees that, and no other β."""
        beta, asked = args.beta, "ref_per_token_logps" in self._asked_for
        if self._replaces_loss:
            args.beta = float(self.uses_reference(args) or asked)
        elif asked:
            args.beta = args.beta or 1.0
        try:
            yield
        finally:
            args.beta = beta

    @contextmanager
    def _trl_beta(self, value: float):
        """What TRL takes for β meanwhile: 0 for no KL in its loss, and no pass of the reference."""
        beta, self.beta = self.beta, value
        try:
            yield
        finally:
            self.beta = beta

    def _summed_rewards(self) -> Tensor:
        assert self._rewards_per_func is not None
        rewards = (
            self._rewards_per_func * self.reward_weights.to(self._rewards_per_func.device)
        ).nansum(dim=1)
        return rewards.masked_fill(self._rewards_per_func.isnan().all(dim=1), torch.nan)

    def _show_credit(self, credit: Tensor) -> None:
        """Put the credit where TRL's table of completions has group-normalised advantages.

        That of tokens by its sum.
        """
        credit = credit.sum(dim=1) if credit.dim() > 1 else credit
        shown, column = self.accelerator.gather(credit).tolist(), self._logs["advantages"]
        for _ in range(min(len(shown), len(column))):
            column.pop()
        column.extend(shown)

    def _drop_surrogate_metrics(self) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        surrogate = [n for n in metrics if n.startswith("clip_ratio/") or n == "policy_loss"]
        for name in surrogate:
            del metrics[name]

    def _stop_at(self, strings: list[str]) -> None:
        if not strings:
            return
        if self.use_vllm:
            raise ConfigError(
                "stop_strings does not reach vLLM. Use generation_kwargs={'stop': [...]} there."
            )
        vocabulary = self._tokenizer.batch_decode(
            [[token] for token in range(len(self._tokenizer))]
        )
        stops = [
            token
            for token, text in enumerate(vocabulary)
            if any(string in text for string in strings)
        ]
        if not stops:
            raise ConfigError(
                f"stop_strings={strings!r}: no token of {self._tokenizer.name_or_path!r} "
                "contains any of them, so no completion could end there. Give strings of one "
                "token, such as a newline or a full stop."
            )
        self.eos_token_ids = [
            *self.eos_token_ids,
            *(t for t in stops if t not in self.eos_token_ids),
        ]
        self.generation_kwargs["eos_token_id"] = self.eos_token_ids
        self.generation_config.eos_token_id = self.eos_token_ids

    def _unused_rollout(self) -> list[dict[str, Any]] | None:
        """The buffered micro-batches if a later step still trains on them."""
        return self._buffered_inputs if self._step % self._generate_every else None

    @property
    def _generate_every(self) -> int:
        """Micro-batches between two rollouts."""
        assert self.args.steps_per_generation is not None
        return self.args.steps_per_generation * self.num_iterations

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model, adapters inside it included."""
        return self.model.get_base_model() if is_peft_model(self.model) else self.model

    def _rollout_file(self, checkpoint: str) -> str:
        return os.path.join(checkpoint, f"rollout_{self.accelerator.process_index}.pt")


def _process_reward(args: PolicyConfig, scorer: Any, model: Any) -> Any:
    """What adds the credit of a process reward; None without one.

    Raises:
        ConfigError: if the trainer has no use for one, or its options do not go together.
    """
    refused = args.all_refused().get("process_reward")
    if scorer is not None and refused:
        raise ConfigError(f"process_reward={scorer!r} does nothing here: {refused}. Remove it.")
    if scorer is not None or args.has_process_reward:
        return load_process_reward()(args, scorer, model)
    if unused := args.unused_process_options():
        raise ConfigError(
            f"{', '.join(unused)} do nothing without a process reward. Set process_reward, or "
            "remove them."
        )
    return None


def _with_none(rewards: Tensor) -> list[float | None]:
    """Each number as the shortest text of its float32 reads; None for NaN."""
    return [None if reward.isnan() else float(str(reward.numpy())) for reward in rewards.cpu()]


def _sums(per_token: Tensor, mask: Tensor) -> list[float]:
    return (per_token.double() * mask).sum(dim=1).tolist()


def load_weights(trainer: Trainer, folder: Path) -> None:
    """Put the weights that a run saved in `folder` in the place of the trainer's own.

    Raises:
        RunError: if there are none, or they do not fit.
    """
    try:
        trainer._load_from_checkpoint(str(folder))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise RunError(
            f"The weights in {folder} cannot be loaded: {str(error).strip().splitlines()[0]}"
        ) from error


def end_training(trainer: Trainer) -> None:
    """End a run of one process or several, after the last use of the trainer.

    The data-parallel wrapper must go before its process group: as its last owner it would wait,
    with Python's lock in hand, for a gloo thread that waits for that lock.
    """
    trainer.accelerator.wait_for_everyone()
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    trainer.end()


def load_checkpoint(trainer: Trainer, checkpoint: Path) -> None:
    """The weights and the state of a checkpoint, for a run that has nothing left to train."""
    trainer._load_from_checkpoint(str(checkpoint))
    if isinstance(trainer, PolicyTrainer):
        trainer.restore_all(checkpoint)
        trainer.restore_callbacks(checkpoint)
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
