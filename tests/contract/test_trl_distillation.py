"""What `trl_ext/poe/{teacher,distillation}.py` rely on in TRL's distillation trainer."""

import inspect
from dataclasses import fields
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, TrainingArguments
from trl import DistillationConfig, DistillationTrainer
from trl.trainer.utils import RepeatSampler

from tests.tiny import QUIET, prompts, save_tiny_llama
from trl_ext.poe.distillation import PoEDistillationConfig, PoEDistillationTrainer
from trl_ext.poe.product import ProductOfExperts

# Options of DistillationConfig that keep their meaning here.
KEPT = """
    model_init_kwargs trust_remote_code disable_dropout max_completion_length
    ds3_gather_for_generation shuffle_dataset pad_to_multiple_of
    temperature top_p top_k min_p repetition_penalty generation_kwargs chat_template_kwargs
    cache_implementation
    use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex
    vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port
    vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size
    max_tool_calling_iterations log_completions num_completions_to_print log_unique_prompts
"""


def test_each_option_is_kept_or_refused():
    """A new TRL brings new options: decide about each, and write it down here or there."""
    common = {option.name for option in fields(TrainingArguments)}
    of_trl = {option.name for option in fields(DistillationConfig)} - common
    refused = PoEDistillationConfig.all_refused().keys()
    assert of_trl == set(KEPT.split()) | refused
    assert not set(KEPT.split()) & refused


def test_arguments_of_the_trainer():
    names = list(inspect.signature(DistillationTrainer).parameters)
    assert names[:5] == ["model", "teacher_model", "args", "train_dataset", "eval_dataset"]
    assert {"processing_class", "quantization_config", "peft_config"} <= set(names)


def test_it_overrides_nothing_private_of_trls():
    own = {n for n in vars(PoEDistillationTrainer) if n.startswith("_") and not n.startswith("__")}
    assert own == {"_tag_names", "_name"}
    assert own <= set(vars(DistillationTrainer))


@pytest.mark.parametrize("rows", [2, 3])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_what_is_asked_of_the_teacher(tmp_path, monkeypatch, rows, checkpointing):
    """Per micro-batch: states of the prompts and completions, then the head; under no_grad."""
    asked = []
    student = save_tiny_llama(tmp_path / "model")
    product = ProductOfExperts([LlamaForCausalLM.from_pretrained(student)], [1.0])
    args = PoEDistillationConfig(
        str(tmp_path / "out"),
        **QUIET,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=2,
        max_steps=1,
        gradient_checkpointing=checkpointing,
    )
    trainer = PoEDistillationTrainer(student, product, args, prompts(12), prompts(4))
    teacher: Any = trainer.teacher_model
    base_model, head = teacher.base_model, teacher.get_output_embeddings

    def states_of(**given):
        assert not torch.is_grad_enabled() and not teacher.training
        asked.append(("states", given))
        return base_model(**given)

    def head_of():
        asked.append(("head", {}))
        return head()

    monkeypatch.setattr(teacher, "base_model", states_of)
    monkeypatch.setattr(teacher, "get_output_embeddings", head_of)
    trainer.train()
    assert [what for what, _ in asked] == ["states", "head"] * 2
    for _, given in asked[::2]:
        assert list(given) == ["input_ids", "attention_mask", "logits_to_keep", "use_cache"]
        ids, mask = given["input_ids"], given["attention_mask"]
        prompt_width = ids.size(1) - given["logits_to_keep"] + 1
        # A prompt ends, and a completion begins, in the same column of all rows.
        assert mask.shape == ids.shape and len(ids) == rows
        assert mask[:, prompt_width - 1].all() and mask[:, prompt_width].all()
    asked.clear()
    trainer.evaluate()
    assert [what for what, _ in asked] == ["states", "head"]


def test_whose_vocabulary_is_compared(tmp_path):
    """By `config.get_text_config().vocab_size` of both, before the first step."""
    source = inspect.getsource(DistillationTrainer.__init__)
    assert "teacher_model.config.get_text_config().vocab_size" in source
    assert "self.accelerator.prepare_model(teacher_model, evaluation_mode=True)" in source
    assert "self.model_kwarg_keys = (" in source


def test_one_generator_draws_the_orders_of_all_epochs():
    """What `_OrderOfPrompts` counts on to restore them."""
    sampler = RepeatSampler(list(range(6)), mini_repeat_count=1, batch_size=2, seed=1)
    epochs = [list(sampler) for _ in range(3)]
    again = RepeatSampler(list(range(6)), mini_repeat_count=1, batch_size=2, seed=1)
    for _ in range(2):
        next(iter(again))
    assert list(again) == epochs[2] != epochs[0]
