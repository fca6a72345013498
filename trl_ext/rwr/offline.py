"""Reward-weighted regression on logged completions, on top of TRL's SFTTrainer."""

import logging
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import AutoConfig, PreTrainedModel

from trl_ext.bundled import resolve_model
from trl_ext.errors import ConfigError, DataError
from trl_ext.models.adapter import keep_nf4_gradients_on_cpu
from trl_ext.options import own_config
from trl_ext.rewards.guard import guarded_all
from trl_ext.rwr.offline_config import OfflineRWRConfig
from trl_ext.rwr.offline_data import WEIGHT, with_weights
from trl_ext.rwr.offline_weights import Weighed
from trl_ext.trl_sft_adapter import WeightedSFTTrainer

__all__ = ["OfflineRWRConfig", "OfflineRWRTrainer"]

logger = logging.getLogger(__name__)

# Arguments of trl.SFTTrainer that would take the weights away: name -> why.
_REFUSED = {
    "data_collator": "the trainer's own collator carries the weights",
    "compute_loss_func": "the loss is -sum w_n log pi(y_n|x)",
    "formatting_func": "rows have a prompt and a completion",
}


class OfflineRWRTrainer(WeightedSFTTrainer):
    """Project the policy onto π* ∝ π_ref·exp(r/β) by weighted regression on logged completions.

    Source: Peters and Schaal (2007), "Reinforcement learning by reward-weighted regression for
    operational space control"; Equations E7-E10, and E12 with `importance_weights`. For completions
    y_n of P prompts x, sampled beforehand,

        loss = (1/P) Σ_x Σ_n −w_n log π(y_n|x),        w = softmax(r(x, ·)/β) over a prompt's rows.

    It differs from its parent: each row has a weight, computed once, before anything is tokenised;
    the loss of a step is its mean over rows, whatever the batches. Rows with weight 0 are left out,
    and a prompt without rows is not counted.

    Rows are `prompt`, `completion` (texts or messages) and `reward`; optionally `group`, `value`,
    `logp` and `ref_logp`, `prompt_ids` and `completion_ids`. Or `prompt`, `completions` and
    `rewards`, lists, with `logps`, `ref_logps`, `completion_ids` beside. `trl_ext collect` writes
    them. `train_dataset["weight"]` are the weights, 1 on average.

    Args:
        model: path, hub id, `bundled:` name or object.
        args: an `OfflineRWRConfig`.
        train_dataset, eval_dataset: map-style, or streams, of which one pass is read beforehand.
        reward_funcs: score the rows of a dataset without rewards; one that has them keeps its own.
        trl_arguments: further arguments of `trl.SFTTrainer`, such as `peft_config`.

    Raises:
        ConfigError: if options and data do not fit together.
        DataError: if a dataset cannot be weighed; with the row.
        RewardError: if a reward function fails.
    """

    args: OfflineRWRConfig
    # Logged completions bring their rewards along.
    rewards_are_optional: ClassVar[bool] = True

    _tag_names: ClassVar[list[str]] = ["trl_ext", "offline_rwr"]
    _name = "Offline RWR"

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: OfflineRWRConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        reward_funcs: Any = None,
        **trl_arguments: Any,
    ):
        model = resolve_model(model) if isinstance(model, str) else model
        args = own_config(OfflineRWRConfig, "OfflineRWRTrainer", model, args)
        for name, reason in _REFUSED.items():
            if trl_arguments.get(name) is not None:
                raise ConfigError(f"{type(self).__name__} takes no {name}: {reason}. Remove it.")
        if train_dataset is None:
            raise DataError(
                f"{type(self).__name__} needs a train_dataset, got None. Give a datasets.Dataset "
                "with the columns prompt, completion and reward."
            )
        if not hasattr(train_dataset, "__len__") and args.max_steps < 1:
            raise ConfigError(
                f"max_steps={args.max_steps} with a stream as train_dataset, whose length is not "
                "known. Set max_steps."
            )
        self._reward_funcs = guarded_all(reward_funcs, args.reward_timeout)
        self._vocabulary = _vocabulary_of(model, args)
        train_dataset, weighed = with_weights(
            train_dataset, "train_dataset", args, self._reward_funcs, self._vocabulary
        )
        self.weight_metrics: dict[str, float] = weighed.metrics
        self._told = False
        if args.process_index == 0:
            logger.warning("%s", _said_of(weighed, args))
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=self._weighed(eval_dataset, args),
            **trl_arguments,
        )
        keep_nf4_gradients_on_cpu(self.model)
        self.check_rows_are_apart()

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As TRL; datasets given here are logged completions too. Weighted loss, and unweighted.

        `eval_loss` has the weights that the dataset has by its own rewards.
        """
        known: Any = eval_dataset
        if not isinstance(eval_dataset, str):
            known = self._weighed(eval_dataset, self.args)
        return super().evaluate(known, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As TRL; the first log of training also says what the weights are like."""
        if self.model.training and not self._told:
            self._told = True
            logs |= {
                f"offline_rwr/{name}": value
                for name, value in self.weight_metrics.items()
                if math.isfinite(value)
            }
        super().log(logs, start_time)

    def _weighed(self, dataset: Any, args: OfflineRWRConfig) -> Any:
        """An evaluation set, or several by name, with weights; as it is where it has them."""
        if dataset is None:
            return None
        if isinstance(dataset, Mapping):
            return {name: self._weighed(each, args) for name, each in dataset.items()}
        if _is_prepared(dataset):
            return dataset
        found, _ = with_weights(dataset, "eval_dataset", args, self._reward_funcs, self._vocabulary)
        return found


def _said_of(weighed: Weighed, args: OfflineRWRConfig) -> str:
    """What β makes of the rewards, in a line: the number to choose it by."""
    found = weighed.metrics
    beta = f"Weights with beta = {found['beta_used']:.4g}"
    if found["beta_used"] > args.beta:
        beta += f", raised from {args.beta:g} by min_effective_sample_size"
    samples = f"{found['effective_sample_size']:.3g}"
    if args.baseline != "group":  # one softmax over all rows
        return f"{beta}: {samples} effective samples of {len(weighed.weights)}."
    left_out = args.drop_uniform_groups and args.beta < math.inf
    return (
        f"{beta}: {samples} of {found['group_size']:.3g} effective samples a group; "
        f"{found['uniform_groups']:.1%} of groups are uniform{', left out' if left_out else ''}."
    )


def _vocabulary_of(model: Any, args: OfflineRWRConfig) -> int:
    """The number of tokens of a model that may not be loaded yet."""
    config = getattr(model, "config", None)
    if config is None:
        kwargs: Any = args.model_init_kwargs or {}
        config = AutoConfig.from_pretrained(
            model, revision=kwargs.get("revision"), trust_remote_code=args.trust_remote_code
        )
    return config.get_text_config().vocab_size


def _is_prepared(dataset: Any) -> bool:
    """Whether a dataset went through here: transformers hands several on one by one."""
    if not isinstance(dataset, Dataset | IterableDataset):
        return False
    columns = dataset.column_names or next(iter(dataset), {})
    return WEIGHT in columns and "input_ids" in columns
