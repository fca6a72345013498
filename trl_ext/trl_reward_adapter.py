"""The seam to TRL's reward trainer: the private members of TRL and transformers that it needs."""

import json
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from trl import RewardTrainer as TRLRewardTrainer
from trl.data_utils import _tokenize, get_dataset_column_names, is_conversational
from trl.trainer.utils import global_then_local_main_first

from trl_ext.errors import DataError

# A key of tokenizer_config.json, which lies beside a whole model and beside an adapter.
APPENDS_EOS = "reward_append_eos"
TOKENISED = ("ranking_ids", "chosen_ids", "chosen_input_ids")


def note_form(tokenizer: Any, dataset: Any) -> None:
    """Write into a tokenizer whether its reward model learns texts with the end token behind them.

    A classifier reads its reward at the last token: used without the one that it has learned, it
    reads another. Messages end as the chat template writes them, and of tokens nothing is known.

    Args:
        tokenizer: that will be saved with the model.
        dataset: comparisons, before they are tokenised.
    """
    if any(column in get_dataset_column_names(dataset) for column in TOKENISED):
        return
    if is_conversational(next(iter(dataset))):
        tokenizer.init_kwargs.pop(APPENDS_EOS, None)
    else:
        tokenizer.init_kwargs[APPENDS_EOS] = True


def appends_eos(tokenizer: Any) -> bool:
    """Whether a tokenizer, or what its tokenizer_config.json holds, was noted to append it."""
    return getattr(tokenizer, "init_kwargs", tokenizer).get(APPENDS_EOS) is True


class ComparisonTrainer(TRLRewardTrainer):
    """`trl.RewardTrainer` that also tokenises rankings, with hooks for metrics and checkpoints."""

    # Their own annotations are wider than what a reward trainer holds.
    model: Any

    def own_metrics(self) -> dict[str, float]:
        """Numbers in place of TRL's of the same name since the last log line; called once each."""
        return {}

    def restore(self, checkpoint: Path) -> None:
        """Load what `save_model` added to a checkpoint. TRL: nothing."""

    def report_left_out(self, name: str, before: Any, after: Any) -> None:
        """Say how many rows were too long, by the dataset before and after. TRL: nothing."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As TRL, with `own_metrics`."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics.update({name: [value] for name, value in self.own_metrics().items()})
        super().log(logs, start_time)

    def leave_out_of_weights(self, name: str, parameter: nn.Parameter) -> None:
        """Add a parameter to the model that trains with it, and that is not saved with it."""
        self.model.register_parameter(name, parameter)
        if isinstance(self.model, PreTrainedModel):  # a PEFT model saves adapters only
            ignored = self.model._keys_to_ignore_on_save or ()
            self.model._keys_to_ignore_on_save = {*ignored, name}

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        columns = get_dataset_column_names(dataset)
        if "ranking_ids" in columns:
            return dataset
        _check_chat_template(dataset, processing_class, dataset_name)
        if "completions" in columns:
            prepared = _tokenised(dataset, processing_class, args)
        else:
            prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        self.report_left_out(dataset_name, dataset, prepared)
        return prepared

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        assert self._signature_columns is not None
        self._signature_columns += [
            name for name in ("ranking_ids", "ranks") if name not in self._signature_columns
        ]

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.restore(Path(resume_from_checkpoint))

    def _load_best_model(self):
        super()._load_best_model()
        if self.state.best_model_checkpoint is not None:
            self.restore(Path(self.state.best_model_checkpoint))


def _check_chat_template(dataset: Any, tokenizer: Any, name: str) -> None:
    if is_conversational(next(iter(dataset))) and tokenizer.chat_template is None:
        raise DataError(
            f"The {name} dataset holds messages, and the tokenizer has no chat template to write "
            "them with. Set chat_template_path, or write prompt and completions as texts."
        )


def _tokenised(dataset: Any, tokenizer: Any, args: Any) -> Any:
    """The column `ranking_ids`: the tokens of each prompt with each of its completions.

    What TRL makes of `prompt` + `chosen`; rows with a sequence over `max_length` are left out.
    """

    def ids_of(row: dict[str, Any]) -> dict[str, Any]:
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        template = {"tools": tools, **(row.get("chat_template_kwargs") or {})}
        completions = row["completions"]
        if isinstance(row["prompt"], str):
            end, template = tokenizer.eos_token or "", {}
            completions = [text if text.endswith(end) else text + end for text in completions]
        sequences = [row["prompt"] + completion for completion in completions]
        ids = [_tokenize(tokenizer, each, **template)["input_ids"] for each in sequences]
        return {"ranking_ids": ids}

    # A streamed dataset knows no processes.
    options = {"num_proc": args.dataset_num_proc} if hasattr(dataset, "__len__") else {}
    with global_then_local_main_first():
        dataset = dataset.map(ids_of, **options)
        if args.max_length is not None:
            dataset = dataset.filter(
                lambda row: max(map(len, row["ranking_ids"])) <= args.max_length, **options
            )
    return dataset
