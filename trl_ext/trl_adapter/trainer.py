"""`PolicyTrainer`: what is checked before TRL's trainer is built, and set up after."""

from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from trl_ext.bundled import resolve_model
from trl_ext.errors import ConfigError
from trl_ext.kl_term import KLTerm
from trl_ext.models.adapter import keep_nf4_gradients_on_cpu
from trl_ext.options import own_config
from trl_ext.policy_config import PolicyConfig
from trl_ext.registry import load_process_reward
from trl_ext.rewards.columns import asked_of_trainer, check_reference_can_be_had, show_policy
from trl_ext.rewards.guard import guarded_all
from trl_ext.tasks.columns import check_datasets, check_size
from trl_ext.trl_adapter.checkpoints import Checkpoints
from trl_ext.trl_adapter.redraw import check_can_redraw
from trl_ext.watch import RewardHackingWatch


class PolicyTrainer(Checkpoints):
    """`trl.GRPOTrainer` with hooks for score, credit and loss; base of the policy trainers here.

    Algorithms override what a completion is worth (`score_completions`), what credit it gets
    (`assign_credit`) and what the loss of a micro-batch is (`policy_loss`).

    Takes the arguments of `trl.GRPOTrainer`. With the hooks as they are here it gives the same
    losses, gradients and parameters (`tests/parity`). It also ends a completion at `stop_strings`,
    names the reward function and the sample when a reward fails, checks the dataset before it loads
    a model, restores a half-used rollout on resume, and keeps the gradients of NF4 models on CPUs.

    Takes also `process_reward`: an object whose `token_rewards(prompt_ids, completion_ids)` gives a
    list of one number a token for each completion, such as a `GibbsScorer`; their credit is added
    as the options `process_level` to `process_gamma` say. Or the option `process_reward` names one.
    """

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
        args = own_config(self.config_class, type(self).__name__, model, args)
        self.kl = KLTerm(args, self)
        self.process_reward = _process_reward(args, process_reward, model)
        if not trl_arguments.get("environment_factory"):
            check_datasets(train_dataset, eval_dataset)
        watch = None if args.gold_reward_funcs is None else RewardHackingWatch.from_config(args)
        has_reference = (
            isinstance(model, str)
            or trl_arguments.get("peft_config") is not None
            or is_peft_model(model)
            or bool(model.config._name_or_path)
        )
        reward_funcs = self._guarded(reward_funcs, args, has_reference)
        tools = [trl_arguments.get(name) for name in ("tools", "environment_factory")]
        check_can_redraw(args, train_dataset, reward_funcs, any(tools))
        data = train_dataset, eval_dataset
        with self._reference_only_if_used(args):
            super().__init__(model, reward_funcs, args, *data, *positional, **trl_arguments)
        self._check_reference(model)
        self._set_up_on_trls()
        self._is_built = True
        if watch is not None:
            self.callback_handler.add_callback(watch)
        self._begin_callbacks()
        self.set_up()
        if self.process_reward is not None:
            self.process_reward.set_up(self)

    def _guarded(self, reward_funcs: Any, args: PolicyConfig, has_reference: bool) -> Any:
        """The reward functions as TRL gets them; keeps them as given, and what they ask for."""
        self._given_rewards = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        reward_funcs = guarded_all(reward_funcs, args.reward_timeout)
        self._asked_for = asked_of_trainer(reward_funcs or [])
        check_reference_can_be_had(
            reward_funcs or [],
            masks_truncated=args.mask_truncated_completions,
            has_reference=has_reference,
        )
        return reward_funcs

    def _set_up_on_trls(self) -> None:
        """What is ours on the trainer that TRL has built."""
        args = self.args
        if not self._replaces_loss:
            self.beta = args.beta
        show_policy(self.reward_funcs, self.model, self._tokenizer)
        if isinstance(self.train_dataset, Dataset):
            assert args.generation_batch_size is not None and args.num_generations is not None
            check_size(len(self.train_dataset), args.generation_batch_size, args.num_generations)
        args.use_bias_correction_kl = args.kl_is_correction
        self._stop_at(args.stop_strings or [])
        keep_nf4_gradients_on_cpu(self.model)

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
            if theirs is None or theirs.shape != weight.shape or isinstance(theirs, DTensor):
                continue
            if not torch.equal(theirs.to(weight), weight):
                raise ConfigError(
                    "A reference model is asked for, and the policy was given as an object: TRL "
                    f"read the reference from {before.config._name_or_path!r}, and its weights "
                    f"differ ({name} is the first). Save the policy and give its path, or train an "
                    "adapter (peft_config), whose reference is the model without it."
                )


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
