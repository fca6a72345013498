"""TabularLM under TRL as it is: the fused head, LoRA, and one short run of each kind of trainer."""

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.utils import add_fused_lm_head

from trl_ext.oracle import TabularLM, exact_gradient

# TRL's kernel works in float32: logits of size 4 have rounding errors of 2^-22.
FLOAT32 = {"atol": 2e-6, "rtol": 0}


def lora_config():
    return LoraConfig(target_modules=["table"], r=2)


def fused_logps(model, space, padding):
    """Token log-probabilities of all completions of prompt 2, left-padded, by the fused head."""
    n, length = space.tokens.shape
    prompt = torch.tensor([[0] * padding + [2]]).expand(n, -1)
    ids = torch.cat([prompt, space.tokens], dim=1)
    mask = torch.cat([(prompt > 0), space.mask], dim=1).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-length] = -100
    out = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    return out.log_probs[:, -length:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padding", [0, 2])
def test_fused_head_is_exact(space, model, rewards, dtype, padding):
    """Same log-probabilities, and the same gradient of Σ_y r(y) log π(y) through TRL's kernel."""
    model = model.to(dtype)
    gradient = exact_gradient(lambda logps: (logps[1] * rewards[1]).sum(), model, space)
    logps = space.token_logps(model)[1].float()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    fused = fused_logps(model, space, padding)
    torch.testing.assert_close(fused, logps, **FLOAT32)
    (fused.sum(-1) * rewards[1].float()).sum().backward()
    exact = gradient["model.table.weight"]
    torch.testing.assert_close(model.model.table.weight.grad, exact, atol=2e-5, rtol=0)


def test_temperature_in_the_fused_head(space, model):
    add_fused_lm_head(model, temperature=0.5)
    logps = space.token_logps(space.logits(model) / 0.5)[1].float()
    torch.testing.assert_close(fused_logps(model, space, 1), logps, **FLOAT32)


def test_lora_reaches_the_table(space, model, rewards):
    """The enumeration reads a LoRA model, base weights and update together."""
    table = model.model.table.weight.detach().clone()
    adapted = get_peft_model(model, lora_config())
    lora = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert {n.split(".")[-2] for n in lora} == {"lora_embedding_A", "lora_embedding_B"}
    for parameter in lora.values():
        torch.nn.init.normal_(parameter)
    a, b = lora.values()
    update = (b @ a).T * (8 / 2)  # lora_alpha is 8 by default
    torch.testing.assert_close(space.logits(adapted).flatten(0, 1), table + update)
    gradient = exact_gradient(lambda logps: (logps.exp() * rewards).sum(), adapted, space)
    assert gradient.keys() == lora.keys() and all(g.any() for g in gradient.values())


def reward(completions, **_):
    """Distinct within most groups, so that the first steps move something."""
    return [text.count("b") - 0.5 * len(text) for text in completions]


PROMPTS = Dataset.from_dict({"prompt": ["a", "b"] * 4})
PAIRS = Dataset.from_dict(
    {"prompt": ["a", "b"] * 4, "chosen": ["bb", "bc"] * 4, "rejected": ["c", "a"] * 4}
)
TEXTS = Dataset.from_dict({"prompt": ["a", "b"] * 4, "completion": ["bb", "cab"] * 4})
GROUPS = {"num_generations": 4, "max_completion_length": 3, "per_device_train_batch_size": 8}
TRAINERS = {
    "GRPO": (PROMPTS, {**GROUPS, "beta": 0.1}),
    "RLOO": (PROMPTS, {**GROUPS, "beta": 0.1}),
    "SFT": (TEXTS, {}),
    "DPO": (PAIRS, {}),
}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", TRAINERS)
def test_trl_trainers_train_it(folder, tmp_path, space, name, lora):
    """Two steps with TRL's defaults (gradient checkpointing on, the reference read from disk)."""
    dataset, options = TRAINERS[name]
    output = str(tmp_path / "out")
    arguments = getattr(trl, f"{name}Config")(
        output_dir=output, max_steps=2, learning_rate=0.1, bf16=False, use_cpu=True,
        report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, **options,
    )  # fmt: skip
    rewarded = {"reward_funcs": reward} if dataset is PROMPTS else {}
    trainer = getattr(trl, f"{name}Trainer")(
        model=folder,
        args=arguments,
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=lora_config() if lora else None,
        **rewarded,
    )
    before = space.logps(AutoModelForCausalLM.from_pretrained(folder))
    torch.testing.assert_close(space.logps(trainer.model), before)
    trainer.train()
    after = space.logps(trainer.model)
    assert after.isfinite().all() and (after - before).abs().max() > 0.01
    trainer.save_model(output)
    base = AutoModelForCausalLM.from_pretrained(folder if lora else output)
    assert isinstance(base, TabularLM)
    saved = PeftModel.from_pretrained(base, output) if lora else base
    assert torch.equal(space.logps(saved), after)
