"""The seam to TRL's SFTTrainer: a weight for each row, carried through to the loss.

Nothing of TRL is copied: its preparation, collator and loss run as they are, on rows that bring
weights along and on a model whose log-probabilities are multiplied by them.
"""

import logging
from dataclasses import dataclass, replace
from typing import Any, Literal

import pyarrow.compute
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import SFTTrainer as TRLSFTTrainer
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from trl_ext.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

TokenReduction = Literal["sum", "mean", "batch"]

IGNORED = -100
# What the collator adds to a batch: (B, S) weight of each token, and how many rows it holds.
TOKEN_WEIGHTS, ROWS = "token_weights", "num_rows"
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
        if self.args.device.type == "cpu" and _attention_of(self.model) == "flex_attention":
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
        weighted: Any = _WeightedModel(
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
            dataset = dataset.map(_as_tokens)
        # TRL's packing keeps tokens and labels only.
        prepared = super()._prepare_dataset(
            dataset, processing_class, args, False, formatting_func, dataset_name
        )
        if rows is not None and isinstance(prepared, Dataset):
            _check_cut(rows, len(prepared), args.max_length, dataset_name)
            _check_predicted(prepared, dataset_name)
        return self._packed(prepared, args) if packing and dataset_name == "train" else prepared

    def _packed(self, dataset: Dataset | IterableDataset, args: Any) -> Dataset | IterableDataset:
        expanded: Any = dataset.map(
            _with_token_weights, fn_kwargs={"token_reduction": args.token_reduction}
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


@dataclass
class WeightedCollator(DataCollatorForLanguageModeling):
    """TRL's collator, and beside its tensors `token_weights` (B, S) and `num_rows`."""

    token_reduction: TokenReduction = "sum"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Examples with `input_ids`, `labels` and `weight`, or packed ones, as tensors."""
        batch = super().torch_call(examples)
        packed = TOKEN_WEIGHTS in examples[0]
        rows = [
            torch.tensor(
                example[TOKEN_WEIGHTS]
                if packed
                else token_weights(example["weight"], example["labels"], self.token_reduction)
            )
            for example in examples
        ]
        rows = [torch.cat(rows)] if self.padding_free else rows
        batch[TOKEN_WEIGHTS] = torch.zeros(batch["labels"].shape)
        for filled, row in zip(batch[TOKEN_WEIGHTS], rows, strict=True):
            filled[: len(row)] = row
        held = sum(len(e["seq_lengths"]) for e in examples) if packed else len(examples)
        batch[ROWS] = torch.tensor(held)
        return batch


class _WeightedModel:
    """The model as TRL's loss calls it, with weighted log-probabilities.

    Attributes:
        of_rows: (B, 3) of the last call: of each row the weighted sum of −log π over tokens, the
            plain sum, and the number of tokens.
    """

    def __init__(self, model: Any, weights: Tensor, rows: Tensor | None):
        self.model, self.weights, self.rows = model, weights, rows
        self.of_rows = torch.zeros(0, 3)

    def __call__(self, **inputs: Any) -> Any:
        outputs = self.model(**inputs)
        log_probs = getattr(outputs, "log_probs", None)
        if log_probs is None:
            return outputs
        tokens = outputs.label_mask.sum(1)
        # Prompt learning puts virtual tokens in front; the first token of all is predicted by none.
        virtual = log_probs.size(1) + 1 - self.weights.size(1)
        weights = torch.nn.functional.pad(self.weights.to(log_probs), (virtual, 0))[:, 1:]
        nll = -log_probs.detach()
        self.of_rows = torch.stack([(nll * weights).sum(1), nll.sum(1), tokens.to(nll)], dim=1)
        if self.rows is not None:
            # TRL divides by the number of tokens where nobody has counted a step's items.
            weights = weights * tokens.sum().clamp(min=1) / self.rows
        outputs.log_probs = log_probs * weights
        return outputs


def token_weights(weight: float, labels: list[int], token_reduction: TokenReduction) -> list[float]:
    """The weight of each token of a row: 0 where nothing is predicted.

    Args:
        weight: of the row.
        labels: token ids, -100 where nothing is predicted; nothing predicts the first.
        token_reduction: "mean" spreads the weight evenly over the row's tokens.
    """
    predicted = [position > 0 and label != IGNORED for position, label in enumerate(labels)]
    each = weight / max(sum(predicted), 1) if token_reduction == "mean" else weight
    return [each if counts else 0.0 for counts in predicted]


def _with_token_weights(row: dict[str, Any], token_reduction: TokenReduction) -> dict[str, Any]:
    return {TOKEN_WEIGHTS: token_weights(row["weight"], row["labels"], token_reduction)}


def _as_tokens(row: dict[str, Any]) -> dict[str, Any]:
    prompt, completion = list(row["prompt_ids"]), list(row["completion_ids"])
    return {"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion}


def check_rows_stay_whole(plan: Any) -> None:
    """Whether all tokens of a row are on one process, given Accelerate's `ParallelismConfig`.

    Raises:
        ConfigError: if not.
    """
    if plan is not None and (plan.cp_enabled or plan.sp_enabled):
        raise ConfigError(
            "Context and sequence parallelism cut rows, and tokens lose their weights. Use "
            "cp_size=1 and sp_size=1."
        )


def check_same_tokenizer(dataset: Any, tokenizer: Any, rows: int = 8) -> None:
    """Whether the ids of the first rows read, with this tokenizer, as their completions.

    Raises:
        DataError: if not: they are of another tokenizer.
    """
    for number, row in enumerate(dataset.take(rows)):
        text = row["completion"]
        if isinstance(text, list):
            text = text[-1].get("content")
        if not isinstance(text, str):  # a turn that only calls tools
            continue
        ids = row["completion_ids"]
        read = []
        if max([*ids, *row["prompt_ids"]]) < len(tokenizer):
            read = [tokenizer.decode(ids, skip_special_tokens=skip) for skip in (False, True)]
        if not any(text.strip() in one for one in read):
            shown = f"they read {read[0][:80]!r}" if read else "some are out of its vocabulary"
            raise DataError(
                f"Row {number}: its completion_ids are of another tokenizer: with that of the "
                f"model, {tokenizer.name_or_path!r}, {shown}, and the completion is "
                f"{text[:80]!r}. Remove the columns prompt_ids and completion_ids, so that the "
                "texts are tokenised anew."
            )


def _attention_of(model: Any) -> str | None:
    return model.config._attn_implementation


def _check_predicted(prepared: Dataset, name: str) -> None:
    """Whether the first token of every completion is predicted from something."""
    compute: Any = pyarrow.compute  # its functions are made at import, unseen by type checkers
    first = compute.list_element(prepared.data.column("labels"), 0)
    unpredicted = compute.sum(compute.not_equal(first, IGNORED)).as_py()
    if unpredicted:
        raise DataError(
            f"The {name} dataset: {unpredicted} of {len(prepared)} completions have no token in "
            "front of them, so that nothing predicts their first one. Begin their prompts with "
            "one, such as the tokenizer's end token."
        )


def _check_cut(before: int, after: int, max_length: int | None, name: str) -> None:
    """TRL drops rows of which max_length leaves no token of the completion."""
    if not after:
        raise DataError(
            f"The {name} dataset: max_length={max_length} leaves no token of any completion. Raise "
            "max_length."
        )
    if after < before:
        logger.warning(
            "The %s dataset: max_length=%s leaves no token of %d of %d completions. They are "
            "dropped, and the others of their group carry the weight that they have.",
            name,
            max_length,
            before - after,
            before,
        )
