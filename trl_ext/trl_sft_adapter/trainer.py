"""`WeightedSFTTrainer`: TRL's SFTTrainer on rows with weights."""

from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import SFTTrainer as TRLSFTTrainer
from trl import pack_dataset

from trl_ext.errors import ConfigError
from trl_ext.trl_sft_adapter.checks import (
    attention_of,
    check_cut,
    check_predicted,
    check_rows_stay_whole,
    check_same_tokenizer,
)
from trl_ext.trl_sft_adapter.weights import (
    ROWS,
    TOKEN_WEIGHTS,
    TokenReduction,
    WeightedCollator,
    WeightedModel,
    as_tokens,
    with_token_weights,
)

_OWN = (TOKEN_WEIGHTS, ROWS)


class WeightedSFTTrainer(TRLSFTTrainer):
    """`trl.SFTTrainer` on rows with a column `weight`: the mean over rows of weight·(−log π(y|x)).

    The gradient of an optimizer step is that of this mean over its global batch, however it is cut
    into micro-batches and processes, packed or not. With `args.token_reduction` "mean" a row counts
    by its mean per token; with "batch" the sum is divided by the tokens of the batch, which with
    all weights 1 is `trl.SFTTrainer`, number for number.

    Rows with `prompt_ids` and `completion_ids` are taken as they are; others TRL tokenises.
    """

    accelerator: Any
    model: Any

    def __init__(self, model: Any, args: Any, **trl_arguments: Any):
        self.token_reduction: TokenReduction = args.token_reduction
        self._evaluated: list[Tensor] = []
        if args.accelerator_config.dispatch_batches:
            raise ConfigError(
                "accelerator_config: dispatch_batches=True cuts up the batches of one process for "
                "all, and weights would not stay with their rows. Remove it."
            )
        # Otherwise it is True for streams; TRL turns it off for those that are trained on.
        args.accelerator_config.dispatch_batches = False
        super().__init__(model, args, **trl_arguments)
        check_rows_stay_whole(self.accelerator.parallelism_config)
        if self.args.device.type == "cpu" and attention_of(self.model) == "flex_attention":
            raise ConfigError(
                "attn_implementation='flex_attention' has no gradients on a CPU. Use sdpa or eager."
            )
        self.data_collator = WeightedCollator(
            **vars(self.data_collator), token_reduction=self.token_reduction
        )
        if self.token_reduction != "batch":
            # Whatever the model's forward takes: the loss is divided here, by the rows of a step.
            self.model_accepts_loss_kwargs = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As TRL, with the log-probabilities multiplied by the weights of their tokens."""
        rows = None if self.token_reduction == "batch" else inputs[ROWS]
        weighted: Any = WeightedModel(
            model, inputs[TOKEN_WEIGHTS], rows if num_items_in_batch is None else None
        )
        kept = {name: value for name, value in inputs.items() if name not in _OWN}
        loss = super().compute_loss(weighted, kept, return_outputs, num_items_in_batch)
        if not self.model.training:
            self._evaluated.append(self.accelerator.gather_for_metrics(weighted.of_rows))
        return loss

    def get_eval_dataloader(self, eval_dataset=None):
        """As TRL, never flattened or packed: evaluation counts rows one by one."""
        training: Any = self.data_collator
        self.data_collator = replace(training, padding_free=False)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training

    def evaluation_loop(self, *args: Any, **kwargs: Any):
        """As transformers; the loss is the mean over rows, `unweighted_loss` without weights."""
        self._evaluated = []
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        if self._evaluated and output.metrics is not None:
            weighted, nll, tokens = torch.cat(self._evaluated).double().unbind(1)
            loss = {
                "sum": lambda: nll.mean(),
                "mean": lambda: (nll / tokens.clamp(min=1)).mean(),
                "batch": lambda: nll.sum() / tokens.sum().clamp(min=1),
            }[self.token_reduction]()
            output.metrics[f"{prefix}_unweighted_loss"] = loss.item()
            if self.token_reduction != "batch":
                # transformers counts the last batch of a stream as a full one.
                output.metrics[f"{prefix}_loss"] = weighted.mean().item()
        return output

    def _get_num_items_in_batch(self, batch_samples, device):
        # What a sum over a step is divided by: transformers counts labels, over processes too.
        if self.token_reduction != "batch":
            batch_samples = [
                {"labels": (), "shift_labels": torch.zeros(int(batch[ROWS]))}
                for batch in batch_samples
            ]
        return super()._get_num_items_in_batch(batch_samples, device)

    def _prepare_dataset(
        self, dataset, processing_class, args, packing, formatting_func, dataset_name
    ):
        rows = len(dataset) if isinstance(dataset, Dataset) else None
        if "completion_ids" in (dataset.column_names or next(iter(dataset))):
            check_same_tokenizer(dataset, getattr(processing_class, "tokenizer", processing_class))
            dataset = dataset.map(as_tokens)
        # TRL's packing keeps tokens and labels only.
        prepared = super()._prepare_dataset(
            dataset, processing_class, args, False, formatting_func, dataset_name
        )
        if rows is not None and isinstance(prepared, Dataset):
            check_cut(rows, len(prepared), args.max_length, dataset_name)
            check_predicted(prepared, dataset_name)
        return self._packed(prepared, args) if packing and dataset_name == "train" else prepared

    def _packed(self, dataset: Dataset | IterableDataset, args: Any) -> Dataset | IterableDataset:
        expanded: Any = dataset.map(
            with_token_weights, fn_kwargs={"token_reduction": args.token_reduction}
        )
        expanded = expanded.select_columns(["input_ids", "labels", TOKEN_WEIGHTS])
        packed = pack_dataset(expanded, args.max_length, args.packing_strategy)
        return packed.shuffle(seed=args.seed) if args.shuffle_dataset else packed

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        columns = self._signature_columns or []
        self._signature_columns = [
            *columns,
            *(c for c in ("weight", TOKEN_WEIGHTS) if c not in columns),
        ]

    def check_rows_are_apart(self) -> None:
        """Whether rows that share a sequence, packed or padding-free, do not see each other.

        A forward pass of two rows, the first of them changed: the second must not notice.

        Raises:
            ConfigError: if it does, or if it cannot be found out.
        """
        if not self.padding_free:
            return
        advice = "Use packing=False and padding_free=False, or attn_implementation='sdpa'."
        if is_deepspeed_zero3_enabled():
            raise ConfigError(
                "With DeepSpeed ZeRO-3 it cannot be checked that packed rows do not see each "
                "other. Use packing=False and padding_free=False, or ZeRO-2 or FSDP."
            )
        first, second = (self._second_of_two(token) for token in (1, 2))
        if not torch.allclose(first, second, rtol=0, atol=1e-4 * first.abs().max().item()):
            raise ConfigError(
                "In one sequence, rows of this model see each other: packing and padding_free "
                f"would train on the wrong prompts. {advice}"
            )

    @torch.no_grad()
    def _second_of_two(self, token: int) -> Tensor:
        """Logits of a row behind a row that consists of one token."""
        rows = [[token] * 4, [1, 2, 2, 1]]
        batch = self.data_collator([{"input_ids": r, "labels": r, "weight": 1.0} for r in rows])
        inputs = {n: v for n, v in batch.items() if n not in (*_OWN, "labels")}
        was_training = self.model.training
        self.model.eval()
        logits = self.model(**self._prepare_inputs(inputs), use_cache=False).logits
        self.model.train(was_training)
        return logits[0, 4:8].float()
