"""The estimators exact and topk in training: values against full logits, for each kind of model."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from transformers import BitsAndBytesConfig
from trl.trainer.utils import use_adapter

from tests.tiny import QUIET, count_a, prompts, save_tiny_llama
from trl_ext.errors import ConfigError
from trl_ext.functional import exact_kl, masked_sum, topk_kl
from trl_ext.grpo import GRPOConfig, GRPOTrainer
from trl_ext.rollout import whole

TEMPERATURE = 0.7
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


class Spy(GRPOTrainer):
    def assign_credit(self, rollout):
        self.rollout = rollout
        return super().assign_credit(rollout)


@pytest.fixture
def make(model_path, tmp_path):
    def build(lora=None, quantization=None, **options) -> Spy:
        settings: dict[str, Any] = QUIET | {
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "gradient_accumulation_steps": 2,
            "max_steps": 1,
            "learning_rate": 0.0,
            "beta": 0.1,
            "temperature": TEMPERATURE,
            "kl_is_correction": False,
        }
        trainer = Spy(
            model_path,
            count_a,
            GRPOConfig(str(tmp_path / "out"), **(settings | options)),
            prompts(),
            peft_config=lora,
            quantization_config=quantization,
        )
        if lora is None:
            torch.manual_seed(1)
            with torch.no_grad():
                for parameter in trainer.model.parameters():
                    parameter += 0.05 * torch.randn_like(parameter)
        return trainer

    return build


@pytest.mark.parametrize(
    ("lora", "quantization"), [(None, None), (LORA, None), (LORA, NF4)], ids=["full", "LoRA", "NF4"]
)
@pytest.mark.parametrize(
    "options",
    [
        {"kl_estimator": "exact"},
        {"kl_estimator": "exact", "kl_placement": "both"},
        {"kl_estimator": "exact", "kl_placement": "none"},
        {"kl_estimator": "topk", "kl_topk": 2, "allow_biased_kl": True},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_the_kl_logged_is_that_of_the_full_logits(make, lora, quantization, options):
    trainer = make(lora, quantization, **options)
    trainer.train()
    [logged] = [log["kl/sequence"] for log in trainer.state.log_history if "kl/sequence" in log]
    ids, attended = whole(trainer.rollout.batch)
    mask = trainer.rollout.mask
    with torch.no_grad():
        logits = trainer.model(ids, attention_mask=attended).logits
        if lora is None:
            ref_logits = trainer.ref_model(ids, attention_mask=attended).logits
        else:
            with use_adapter(trainer.model, adapter_name=None):
                ref_logits = trainer.model(ids, attention_mask=attended).logits
    logits, ref_logits = (each[:, -mask.size(1) - 1 : -1] for each in (logits, ref_logits))
    if options["kl_estimator"] == "exact":
        per_token = exact_kl(logits, ref_logits, temperature=TEMPERATURE)
    else:
        per_token = topk_kl(logits, ref_logits, 2, temperature=TEMPERATURE)
    expected = masked_sum(per_token, mask).mean().item()
    assert expected > 1e-3
    assert logged == pytest.approx(expected, rel=2e-3)


def test_accumulation_and_clamp(make):
    """What the penalty adds to the loss is β times its mean over the window's tokens."""
    losses = {}
    for placement in ("loss", "none"):
        trainer = make(kl_estimator="exact", kl_placement=placement, loss_type="luspo")
        trainer.train()
        [log] = [log for log in trainer.state.log_history if "grad_norm" in log]
        losses[placement] = log["loss"]
        kl = log["kl/sequence"]
    assert losses["loss"] - losses["none"] == pytest.approx(0.1 * kl, rel=1e-2)
    clamped = make(kl_estimator="exact", kl_clamp=1e-4)
    clamped.train()
    [kl] = [log["kl/sequence"] for log in clamped.state.log_history if "kl/sequence" in log]
    assert 0 < kl <= 4e-4 + 1e-6, "four tokens at most"


def test_the_reference_is_not_run_twice(make):
    """TRL's own pass over the rollout by the reference is left out: nothing reads it."""
    trainer = make(kl_estimator="exact")
    trainer.train()
    assert "ref_per_token_logps" not in trainer.rollout.batch


@pytest.mark.parametrize("placement", ["loss", "both", "none"])
def test_virtual_tokens_and_images_are_refused(make, placement):
    """The reference would be run without them: a KL of something else."""
    virtual = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match="does not know the virtual tokens of prompt tuning"):
        make(virtual, kl_estimator="exact", kl_placement=placement).train()
    trainer = make(LORA, kl_estimator="exact", kl_placement=placement)
    with pytest.raises(ConfigError, match="run the reference on text alone"):
        trainer.kl.per_token(torch.zeros(1, 1), {"pixel_values": None}, [torch.zeros(1, 2, 3)])
