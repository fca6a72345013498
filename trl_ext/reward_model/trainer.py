"""Reward models from pairs and from rankings, on top of TRL's RewardTrainer."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer.reward_trainer import DataCollatorForPreference

from trl_ext.bundled import resolve_model
from trl_ext.errors import ConfigError, DataError, RunError
from trl_ext.functional import centering_loss, pairwise_loss, plackett_luce_loss
from trl_ext.models.adapter import keep_nf4_gradients_on_cpu
from trl_ext.options import own_config
from trl_ext.reward_model.collator import ComparisonCollator
from trl_ext.reward_model.config import RewardConfig
from trl_ext.reward_model.head import keep_head, with_head
from trl_ext.reward_model.judging import Judge, comparison_metrics
from trl_ext.reward_model.rankings import comparisons
from trl_ext.trl_reward_adapter import ComparisonTrainer, note_form

__all__ = ["RewardConfig", "RewardTrainer"]

logger = logging.getLogger(__name__)

ORDER_EFFECT = "order_effect"
ORDER_EFFECT_FILE = "order_effect.json"


class RewardTrainer(ComparisonTrainer):
    """A reward model r(x, y) from comparisons: the one that makes them likely.

    Equations E49-E51; source: Bradley and Terry (1952), and for K completions of a prompt Ouyang et
    al. (2022), "Training language models to follow instructions with human feedback", Equation 1.
    The loss is the mean over the prompts of

        −(1/pairs) Σ_{w beats l} log σ(r(x, y_w) − r(x, y_l) − margin + α·s_wl),

    or of −log of the probability of the ranking (Plackett-Luce). The K completions of a prompt go
    through the model once, in one forward pass with those of the other prompts; a padded place
    costs nothing. Differs from `trl.RewardTrainer`: K may be over 2 and differ between rows, there
    may be ties, an order effect α can be learned, and an adapter always has its head trained and
    saved. With K = 2 losses, gradients and parameters are TRL's (`tests/parity`). The loss is
    computed in float32 whatever the model's dtype.

    Metrics, as TRL's over all pairs since the last log line: `accuracy`, `margin`, `min_reward`,
    `mean_reward`, `max_reward`; and `ece`, the calibration error of σ(r_w − r_l), `log_loss`,
    `accuracy_margin_LOW_to_HIGH`, for pairs whose rewards are that far apart, and `order_effect`.

    Args:
        model: path, hub id or `bundled:` name of a model, or a sequence-classification model with
            one label, or a PEFT model of one. A causal language model gets a new head.
        args: a `RewardConfig`.
        train_dataset, eval_dataset: rows `prompt`, `completions` and `ranks` (1 is the best) or
            `scores` (higher is better); or TRL's `chosen` and `rejected`. Either with `margin`. An
            evaluation set may be several by name.
        peft_config: of a LoRA adapter; its task is set to sequence classification.
        trl_arguments: further arguments of `trl.RewardTrainer`, such as `quantization_config`.

    Raises:
        ConfigError: if the parts do not fit together.
        DataError: if a dataset is not of comparisons.
    """

    args: RewardConfig

    _tag_names: ClassVar[list[str]] = ["trl_ext", "reward-trainer"]

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: RewardConfig | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        peft_config: PeftConfig | None = None,
        **trl_arguments: Any,
    ):
        model = resolve_model(model) if isinstance(model, str) else model
        args = own_config(RewardConfig, "RewardTrainer", model, args)
        if train_dataset is None:
            raise DataError(
                "RewardTrainer needs a train_dataset, got None. Give a datasets.Dataset of "
                "comparisons."
            )
        if args.order_effect:
            _check_order_effect(args, trl_arguments)
        self._checks = {"loss_type": args.loss_type, "order_effect": args.order_effect}
        # (B, K) rewards and ranks of each batch since the last log line, of all processes.
        self._judged: dict[bool, list[tuple[Tensor, Tensor]]] = {True: [], False: []}
        super().__init__(
            model,  # pyright: ignore[reportArgumentType]
            args,
            train_dataset=comparisons(train_dataset, "train_dataset", **self._checks),
            eval_dataset=self._checked(eval_dataset),
            peft_config=with_head(peft_config),
            **trl_arguments,
        )
        if isinstance(self.model, PeftModel):
            keep_head(self.model)
        keep_nf4_gradients_on_cpu(self.model)
        self.data_collator = _own_collator(self.data_collator)
        note_form(self.processing_class, train_dataset)
        self.order_effect: nn.Parameter | None = None
        if args.order_effect:
            if self.is_fsdp_enabled:
                raise ConfigError(_ONE_NUMBER.format(what="FSDP"))
            self.order_effect = nn.Parameter(torch.zeros((), device=args.device))
            self.leave_out_of_weights(ORDER_EFFECT, self.order_effect)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As TRL; `outputs.logits` are those of the best and of the worst of each prompt."""
        ranks, margin = inputs.pop("ranks"), inputs.pop("margin", None)
        judge = Judge(model, ranks)
        # TRL's own loss is that of best and worst alone; what it adds up beside it is kept.
        _, outputs = super().compute_loss(cast(Any, judge), inputs, True, num_items_in_batch)
        assert judge.rewards is not None
        loss = self._loss(judge.rewards, ranks, margin)
        self._remember(judge.rewards.detach(), ranks)
        return (loss, outputs) if return_outputs else loss

    def _loss(self, rewards: Tensor, ranks: Tensor, margin: Tensor | None) -> Tensor:
        """The mean over the prompts of a batch."""
        mask = ranks > 0
        if self.args.loss_type == "plackett_luce":
            loss = plackett_luce_loss(rewards, ranks, mask=mask).mean()
        else:
            loss = pairwise_loss(
                rewards, ranks, mask=mask, margin=margin, order_effect=self.order_effect
            ).mean()
        if self.args.center_rewards_coefficient is not None:
            centering = centering_loss(rewards, ranks, mask=mask).mean()
            loss = loss + self.args.center_rewards_coefficient * centering
        return loss

    def _remember(self, rewards: Tensor, ranks: Tensor) -> None:
        # The last batch of an evaluation is filled up with rows that have been there. In training
        # its end may be announced some batches early.
        training = self.model.training
        gather = self.accelerator.gather if training else self.accelerator.gather_for_metrics
        both = [self.accelerator.pad_across_processes(x, dim=1) for x in (rewards.float(), ranks)]
        rewards, ranks = (cast(Tensor, gather(x)).cpu() for x in both)
        self._judged[training].append((rewards, ranks))

    def own_metrics(self) -> dict[str, float]:
        """Accuracy, calibration and size of the rewards since the last call."""
        batches = self._judged[self.model.training]
        if not batches:
            return {}
        metrics = comparison_metrics(batches)
        batches.clear()
        if self.order_effect is not None:
            metrics[ORDER_EFFECT] = self.order_effect.item()
        return metrics

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As TRL; a dataset that is given is checked as those of the trainer are."""
        if not isinstance(eval_dataset, str):
            eval_dataset = self._checked(eval_dataset)
        return super().evaluate(cast(Any, eval_dataset), *args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As transformers, with the order effect in a group of its own."""
        if self.order_effect is None or self.optimizer is not None:
            return super().create_optimizer(*args, **kwargs)
        self.order_effect.requires_grad_(False)
        optimizer = super().create_optimizer(*args, **kwargs)
        self.order_effect.requires_grad_(True)
        rate = self.args.order_effect_learning_rate
        group = {"params": [self.order_effect], "lr": rate, "weight_decay": 0.0}
        optimizer.add_param_group(group)
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers; the order effect to `order_effect.json`."""
        super().save_model(output_dir, _internal_call)
        if self.order_effect is not None and self.args.should_save:
            file = Path(output_dir or self.args.output_dir or ".") / ORDER_EFFECT_FILE
            file.write_text(json.dumps({ORDER_EFFECT: self.order_effect.item()}) + "\n")

    def restore(self, checkpoint: Path) -> None:
        """Take over the order effect of a checkpoint.

        Raises:
            RunError: if it has none.
        """
        if self.order_effect is None:
            return
        file = checkpoint / ORDER_EFFECT_FILE
        if not file.is_file():
            raise RunError(
                f"{checkpoint} has no {ORDER_EFFECT_FILE}: it was written without order_effect, or "
                "the file is lost. Begin again, or set order_effect to false."
            )
        with torch.no_grad():
            self.order_effect.fill_(json.loads(file.read_text())[ORDER_EFFECT])

    def report_left_out(self, name: str, before: Any, after: Any) -> None:
        """Log how many rows are over `max_length`.

        Raises:
            DataError: if all are.
        """
        if not isinstance(before, Dataset) or len(after) == len(before):
            return
        longer = (
            f"The {name} dataset: {len(before) - len(after)} of {len(before)} rows have a sequence "
            "of more than max_length tokens"
        )
        if not len(after):
            raise DataError(f"{longer}, and no row is left. Set a larger max_length, or null.")
        logger.warning("%s. They are left out.", longer)

    def _checked(self, eval_dataset: Any) -> Any:
        if eval_dataset is None:
            return None
        if isinstance(eval_dataset, Mapping):
            return {
                name: comparisons(each, f"eval_dataset {name}", **self._checks)
                for name, each in eval_dataset.items()
            }
        return comparisons(eval_dataset, "eval_dataset", **self._checks)


_ONE_NUMBER = (
    "order_effect is one number, and {what} shards what is trained. Use one process a device "
    "(DDP), or set order_effect to false."
)


def _check_order_effect(args: RewardConfig, trl_arguments: Mapping[str, Any]) -> None:
    if args.deepspeed_plugin is not None:
        raise ConfigError(_ONE_NUMBER.format(what="DeepSpeed"))
    given = trl_arguments.get("optimizers") or (None, None)
    if given[0] is not None or trl_arguments.get("optimizer_cls_and_kwargs") is not None:
        raise ConfigError(
            "order_effect is trained by an optimizer group that the trainer adds, and an optimizer "
            "of your own is given. Remove it and use optim, or set order_effect to false."
        )
    # It is no part of the forward pass, where DDP looks for what is unused.
    args.ddp_find_unused_parameters = False


def _own_collator(collator: Any) -> ComparisonCollator:
    if not isinstance(collator, DataCollatorForPreference):
        raise ConfigError(
            f"RewardTrainer takes no data_collator of its own kind, got {type(collator).__name__}. "
            "Leave it out: pad_to_multiple_of is an option of the config."
        )
    return ComparisonCollator(collator.pad_token_id, collator.pad_to_multiple_of)
