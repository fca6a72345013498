"""What `trl_ext/trl_sft_adapter/` and `trl_ext/rwr/offline*.py` rely on in TRL's SFTTrainer."""

import inspect
from dataclasses import fields
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from tests.tiny import QUIET, save_tiny_llama
from trl_ext.rwr import OfflineRWRConfig, OfflineRWRTrainer
from trl_ext.trl_sft_adapter import WeightedCollator, WeightedSFTTrainer

# Options of SFTConfig that keep their meaning here, within what `findings` allows.
KEPT = """
    model_init_kwargs trust_remote_code router_aux_loss_coef chat_template_path dataset_kwargs
    dataset_num_proc eos_token max_length truncation_mode shuffle_dataset packing packing_strategy
    padding_free pad_to_multiple_of eval_packing completion_only_loss activation_offloading
    pad_token
"""


def test_each_option_is_kept_or_refused():
    """A new TRL brings new options: decide about each, and write it down here or there."""
    common = {option.name for option in fields(TrainingArguments)}
    of_trl = {option.name for option in fields(SFTConfig)}
    refused = OfflineRWRConfig.all_refused().keys()
    assert of_trl - common == set(KEPT.split()) | (refused - common)
    assert refused <= of_trl and not set(KEPT.split()) & refused


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_signatures_that_are_overridden():
    prepare = ["self", "dataset", "processing_class", "args", "packing", "formatting_func"]
    assert parameters(SFTTrainer._prepare_dataset) == [*prepare, "dataset_name"]
    loss = ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]
    assert parameters(SFTTrainer.compute_loss) == loss
    assert parameters(SFTTrainer._set_signature_columns_if_needed) == ["self"]
    count = ["self", "batch_samples", "device"]
    assert parameters(Trainer._get_num_items_in_batch) == count
    assert parameters(DataCollatorForLanguageModeling.torch_call) == ["self", "examples"]
    assert parameters(SFTTrainer)[:3] == ["model", "args", "data_collator"]
    assert "metric_key_prefix" in parameters(Trainer.evaluation_loop)


def test_what_is_overridden():
    """Further private members would be new debts to TRL."""
    own = {n for n in vars(WeightedSFTTrainer) if n.startswith("_") and not n.startswith("__")}
    known = {"_get_num_items_in_batch", "_prepare_dataset", "_set_signature_columns_if_needed"}
    assert own == known | {"_packed", "_second_of_two"}
    assert not {"_packed", "_second_of_two"} & set(dir(SFTTrainer))


def test_how_trl_makes_its_loss():
    """Of the model's `log_probs` and `label_mask`; divided by tokens, or by what is counted."""
    source = inspect.getsource(SFTTrainer.compute_loss)
    assert "per_token_loss = -outputs.log_probs" in source
    assert (
        "outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch" in source
    )
    assert "outputs = model(**inputs, fused_lm_head=True)" in source


def test_how_items_are_counted():
    """`shift_labels` as they are, where `labels` are there too."""
    source = inspect.getsource(Trainer._get_num_items_in_batch)
    assert '"labels" in batch_samples[0]' in source
    assert 'batch["shift_labels"]' in source
    assert "self.accelerator.gather(num_items_in_batch.to(device)).sum()" in source


def test_rows_that_have_tokens_are_not_tokenised_again(tmp_path):
    """And keep their columns, `weight` among them."""
    path = save_tiny_llama(tmp_path / "tiny")
    options: dict[str, Any] = {k: v for k, v in QUIET.items() if k != "max_completion_length"}
    rows = [{"prompt": "a", "completion": "b", "weight": 2.0, "input_ids": [3], "labels": [3]}]
    args = SFTConfig(str(tmp_path / "out"), **options)
    trainer = SFTTrainer(path, args, train_dataset=Dataset.from_list(rows))
    assert trainer.train_dataset[0] == rows[0]  # pyright: ignore


def test_packing_takes_any_list_along():
    rows = Dataset.from_dict({"input_ids": [[1, 2], [3]], "token_weights": [[0.5, 2.0], [7.0]]})
    packed = pack_dataset(rows, 4, "bfd")
    assert packed[0] == {
        "input_ids": [1, 2, 3],
        "token_weights": [0.5, 2.0, 7.0],
        "seq_lengths": [2, 1],
    }


def test_the_collator_adds_weights_and_changes_nothing_else():
    rows = [
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "weight": 2.0},
        {"input_ids": [4, 5], "labels": [-100, 5], "weight": 4.0},
    ]
    options: dict[str, Any] = {"pad_token_id": 0, "pad_to_multiple_of": 4}
    for flat, expected in (
        (False, [[0, 1, 1, 0], [0, 4, 0, 0]]),
        (True, [[0, 1, 1, 0, 4, 0, 0, 0]]),
    ):
        theirs = DataCollatorForLanguageModeling(**options, padding_free=flat)(rows)
        ours = WeightedCollator(**options, padding_free=flat, token_reduction="mean")(rows)
        assert ours.pop("token_weights").tolist() == expected
        assert ours.pop("num_rows").item() == 2
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(value))


def test_trainers_names():
    assert {"_tag_names", "_name"} <= set(vars(SFTTrainer)) & set(vars(OfflineRWRTrainer))
