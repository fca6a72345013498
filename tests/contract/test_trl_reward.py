"""What `trl_ext/reward_model` and its adapter rely on in TRL's reward trainer."""

import inspect
from dataclasses import fields

import torch
from transformers import Trainer, TrainingArguments
from trl import RewardConfig, RewardTrainer
from trl.data_utils import _tokenize
from trl.trainer.reward_trainer import DataCollatorForPreference

import trl_ext
from trl_ext.reward_model.collator import ComparisonCollator
from trl_ext.trl_reward_adapter import ComparisonTrainer

# Options of RewardConfig, all of which keep their meaning here.
KEPT = """
    model_init_kwargs trust_remote_code chat_template_path disable_dropout dataset_num_proc
    eos_token max_length pad_to_multiple_of center_rewards_coefficient activation_offloading
    pad_token
"""


def test_each_option_is_kept():
    """A new TRL brings new options: decide about each, and write it down here."""
    common = {option.name for option in fields(TrainingArguments)}
    assert {option.name for option in fields(RewardConfig)} - common == set(KEPT.split())
    own = {option.name for option in fields(trl_ext.RewardConfig)}
    added = own - {option.name for option in fields(RewardConfig)}
    assert added == {"loss_type", "order_effect", "order_effect_learning_rate"}


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_signatures():
    assert parameters(RewardTrainer._prepare_dataset) == [
        *("self", "dataset", "processing_class", "args", "dataset_name")
    ]
    assert parameters(RewardTrainer._set_signature_columns_if_needed) == ["self"]
    assert parameters(RewardTrainer.compute_loss) == [
        *("self", "model", "inputs", "return_outputs", "num_items_in_batch")
    ]
    assert parameters(RewardTrainer.log) == ["self", "logs", "start_time"]
    assert parameters(Trainer._load_from_checkpoint) == ["self", "resume_from_checkpoint", "model"]
    assert parameters(Trainer._load_best_model) == ["self"]
    assert parameters(_tokenize)[:2] == ["processing_class", "input"]
    names = parameters(RewardTrainer.__init__)
    assert {"train_dataset", "eval_dataset", "peft_config", "quantization_config"} <= {*names}


def test_what_the_adapter_overrides_is_trls():
    own = {n for n in vars(ComparisonTrainer) if n.startswith("_") and not n.startswith("__")}
    assert own == {
        "_prepare_dataset",
        "_set_signature_columns_if_needed",
        "_load_from_checkpoint",
        "_load_best_model",
    }
    assert all(hasattr(RewardTrainer, name) for name in own)


def test_the_loss_reads_only_logits_of_what_the_model_gives():
    """TRL calls the model once, by name, and halves its logits."""
    source = inspect.getsource(RewardTrainer.compute_loss)
    assert source.count("model(**inputs)") == 1
    assert "torch.chunk(outputs.logits.squeeze(-1), chunks=2)" in source
    assert not RewardTrainer.loss_is_scaled_for_ga


def test_a_batch_of_pairs_is_trls():
    rows = [
        {"chosen_ids": [1, 2, 3], "rejected_ids": [4, 5], "margin": 0.5},
        {"chosen_ids": [6], "rejected_ids": [7], "margin": 0},
    ]
    theirs, ours = DataCollatorForPreference(9, 4)(rows), ComparisonCollator(9, 4)(rows)
    assert ours.keys() == {*theirs, "ranks"}
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert ours["ranks"].tolist() == [[1, 2], [1, 2]]
