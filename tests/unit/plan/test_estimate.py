"""Whole plans: the phases of a run against a real step, and what each option changes."""

import pytest
import torch
from trl.trainer.utils import add_fused_lm_head

from tests.unit.plan.allocations import Peak, config_of, lora, rows, small_model
from tests.unit.plan.recipes import LORA, OFFLINE, recipe, small
from trl_ext.errors import ConfigError
from trl_ext.plan import ITEMS, find_card, plan_recipe
from trl_ext.plan.shapes import numel

QWEN = 1_543_714_304  # parameters, as published


@pytest.mark.parametrize("adapted", [False, True])
def test_the_training_phase_against_a_real_step(tmp_path, adapted):
    """Two micro-batches and a step of AdamW, TRL's fused head on a CPU, all that lives counted."""
    changed = LORA | {"lora_r": 8} if adapted else {}
    given = recipe(
        tmp_path,
        trainer="sft",
        **OFFLINE | changed,
        model_name_or_path=small(tmp_path),
        dtype="float32",
        max_length=64,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    plan = plan_recipe(given)
    model = small_model(config_of(), torch.float32, lora() if adapted else None)
    inner = model.get_base_model() if adapted else model
    add_fused_lm_head(inner)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=False)
    with Peak([*model.parameters(), *model.buffers()]) as peak:
        for _ in range(2):  # the second step has the optimizer's states from the start
            for _ in range(2):
                ids = rows(4, 64)
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(**ids, labels=ids["input_ids"], fused_lm_head=True).loss
                loss.backward()
                del loss
            optimizer.step()
            optimizer.zero_grad()
    # Without Triton the head turns a tile into its gradient by way of up to six float32 copies of
    # the 256 by 300 logits in it, which are no part of the plan.
    assert 0 <= peak.highest - plan.peak("train") <= 6 * 4 * 256 * 300


def test_items_by_hand(tmp_path):
    phases = plan_recipe(recipe(tmp_path, dtype="float32")).phases
    assert phases["load"] == {"weights": 4 * QWEN}
    assert phases["save"] == {"weights": 4 * QWEN, "optimizer states": 8 * QWEN}
    assert phases["train"]["gradients"] == 4 * QWEN
    # 32 rows of 256 + 200 tokens, 28 layers, keys and values of 2·128 float32; or, while prompts
    # are read, of 256 tokens.
    assert phases["generate"]["KV cache"] in [32 * n * 28 * 2 * 256 * 4 for n in (256, 456)]


def test_an_adapter_on_quantised_weights(tmp_path):
    four_bit = LORA | {"load_in_4bit": True, "use_bnb_nested_quant": True, "lora_r": 16}
    plan = plan_recipe(recipe(tmp_path, **four_bit))
    # Linear maps of Qwen2.5-1.5B: 28 · (1536·1536·2 + 1536·256·2 + 3·1536·8960), at 4.127 bits,
    # and a few bytes for codes.
    linear = 28 * (2 * 1536 * 1536 + 2 * 1536 * 256 + 3 * 1536 * 8960)
    expected = linear * 4.127 / 8 + 2 * (QWEN - linear) + 28 * 7 * (16 * 4 + 256 * 4 + 4)
    assert plan.phases["load"]["weights"] == pytest.approx(expected, rel=1e-4)
    # r (in + out), in bfloat16 as TRL casts it.
    adapter = 28 * 16 * (2 * 3072 + 2 * 1792 + 3 * (1536 + 8960))
    assert numel(plan.shapes.adapter) == adapter
    assert plan.phases["save"]["adapters"] == 2 * adapter
    assert plan.phases["save"]["optimizer states"] == 4 * adapter
    assert plan.phases["load"]["layer at work"] == 2 * 1536 * 8960  # one map before it is quantised


def test_an_adapter_on_other_weights_is_float32(tmp_path):
    plan = plan_recipe(recipe(tmp_path, **LORA))
    assert plan.phases["save"]["adapters"] == 4 * numel(plan.shapes.adapter)


def test_every_table_adds_up(tmp_path):
    plan = plan_recipe(recipe(tmp_path, **LORA))
    assert all(list(items) == [i for i in ITEMS if i in items] for items in plan.phases.values())
    assert plan.peak("train") == sum(plan.phases["train"].values())
    assert plan.peak(plan.worst) == max(map(plan.peak, plan.phases))


@pytest.mark.parametrize(
    ("changed", "has"),
    [
        ({}, False),
        ({"log_kl": True}, True),
        ({"reference": "fixed"}, True),
        ({"trainer": "grpo", "beta": 0.1}, True),
        ({"trainer": "grpo", "beta": 0.0}, False),
        ({"trainer": "reinforce", "beta": 0.1}, True),
        ({"reference": "fixed"} | LORA, False),
    ],
)
def test_the_reference_is_a_second_model(tmp_path, changed, has):
    phases = plan_recipe(recipe(tmp_path, **changed)).phases
    assert phases["train"].get("reference", 0) == (2 * QWEN if has else 0)
    scores = has or changed.get("reference") == "fixed"
    assert ("score" in phases) == scores


def test_offline_trainers_generate_nothing(tmp_path):
    dpo = plan_recipe(recipe(tmp_path, trainer="dpo", **OFFLINE, max_length=128))
    assert list(dpo.phases) == ["load", "train", "save"]
    assert (dpo.run.rows, dpo.run.completion) == (16, 128)  # chosen and rejected
    assert dpo.phases["train"]["reference"] == 2 * QWEN


def test_offline_rwr_trains_on_rows(tmp_path):
    # What it says of sampling is for `trl_ext collect`.
    offline = {"reward_funcs": None, "trainer": "offline_rwr", "use_vllm": True, "max_length": 300}
    plan = plan_recipe(recipe(tmp_path, **offline), find_card("a100-40"))
    assert list(plan.phases) == ["load", "train", "save"]
    assert (plan.run.rows, plan.run.completion) == (8, 300)
    assert not plan.phases["train"].keys() & {"reference", "vLLM"}


@pytest.mark.parametrize("critic", ["head", "adapter", "model"])
def test_the_critic_of_ppo(tmp_path, critic):
    ppo = {"trainer": "ppo", "num_generations": 1, "critic": critic, **LORA}
    plan = plan_recipe(recipe(tmp_path, **ppo))
    # By hand: a float32 head of 1536 + 1; with an adapter or model, the adapter's float32 too; a
    # model has the weights once more, the head being tied to the embedding.
    head, adapter = 4 * 1537, 4 * numel(plan.shapes.adapter)
    loaded = {"head": head, "adapter": head + adapter, "model": head + adapter + 2 * QWEN}[critic]
    assert plan.phases["load"]["critic"] == loaded
    trained = head if critic == "head" else head + adapter
    assert plan.phases["save"]["critic"] == loaded + 2 * trained
    assert plan.phases["train"]["critic"] == loaded + 3 * trained


def test_a_critic_with_a_backbone_keeps_activations_of_its_own(tmp_path):
    ppo = {"trainer": "ppo", "num_generations": 1, **LORA}
    head, adapter = (plan_recipe(recipe(tmp_path, critic=c, **ppo)) for c in ("head", "adapter"))
    # 28 inputs of layers of 8 rows of 456 tokens, bfloat16; at the same moment of both.
    layers = 28 * 8 * 456 * 1536 * 2
    more = adapter.phases["train"]["activations"] - head.phases["train"]["activations"]
    assert more == pytest.approx(layers, rel=0.2)


def test_vllm_takes_its_share(tmp_path):
    with_vllm = {"use_vllm": True, "vllm_gpu_memory_utilization": 0.25} | LORA
    card = find_card("a100-40")
    plan = plan_recipe(recipe(tmp_path, **with_vllm), card)
    assert plan.phases["train"]["vLLM"] == plan.phases["generate"]["vLLM"] == 10 * 2**30
    assert "KV cache" not in plan.phases["generate"]
    asleep = plan_recipe(recipe(tmp_path, vllm_enable_sleep_mode=True, **with_vllm), card)
    assert "vLLM" not in asleep.phases["train"] and "vLLM" in asleep.phases["generate"]
    assert any("--gpu" in note for note in plan_recipe(recipe(tmp_path, **with_vllm)).notes)
    server = recipe(tmp_path, vllm_mode="server", **with_vllm)
    elsewhere = plan_recipe(server, card)
    assert "vLLM" not in elsewhere.phases["train"]
    assert elsewhere.phases["generate"] == elsewhere.phases["save"]


@pytest.mark.parametrize(
    ("config", "weights", "gradients", "states"),
    [
        (None, 4, 4, 8),  # DDP: everything everywhere
        ("zero1", 2, 2, 8 / 4),  # bfloat16, with float32 copies and states divided by 4
        ("zero2", 2, 2 / 4, 8 / 4),
        ("zero3", 2 / 4, 2 / 4, 8 / 4),
        ("fsdp2", 4 / 4, 4 / 4, 8 / 4),  # float32, all divided
    ],
)
def test_sharding(tmp_path, config, weights, gradients, states):
    given = recipe(tmp_path, dtype="float32", accelerate_config=config)
    train = plan_recipe(given, processes=4).phases["train"]
    found = [train[item] / QWEN for item in ("weights", "gradients", "optimizer states")]
    assert found == pytest.approx([weights, gradients, states])
    assert train.get("DDP buckets", 0) == (4 * QWEN if config is None else 0)
    assert train.get("master copies", 0) == (QWEN if config and "zero" in config else 0)


def test_deepspeed_casts_adapters_too(tmp_path):
    given = recipe(tmp_path, dtype="float32", accelerate_config="zero3", **LORA)
    plan = plan_recipe(given, processes=4)
    count = numel(plan.shapes.adapter)
    items = [
        plan.phases["save"][name] for name in ("adapters", "master copies", "optimizer states")
    ]
    assert items == [2 * count // 4, count, 2 * count]  # 2, 4 and 8 bytes, over 4 cards


def test_one_card_may_be_divided_too(tmp_path):
    # DeepSpeed on one card still has bfloat16 weights and float32 copies.
    given = recipe(tmp_path, dtype="float32", accelerate_config="zero2", num_processes=1)
    train = plan_recipe(given).phases["train"]
    assert (train["weights"], train["master copies"]) == (2 * QWEN, 4 * QWEN)


def test_zero3_gathers_to_generate(tmp_path):
    given = recipe(tmp_path, accelerate_config="zero3")
    assert plan_recipe(given, processes=4).phases["generate"]["gathered weights"] == 2 * QWEN
    kept = recipe(tmp_path, accelerate_config="zero3", ds3_gather_for_generation=False)
    gathered = plan_recipe(kept, processes=4).phases["generate"]["gathered weights"]
    # Two layers at a time: 2 bytes of (1536·1536·2 + 1536·256·2 + 3·1536·8960 + biases + norms).
    layer = 2 * 1536**2 + 2 * 1536 * 256 + 3 * 1536 * 8960 + 1536 + 512 + 2 * 1536
    assert gathered == 2 * 2 * layer


@pytest.mark.parametrize(
    ("changed", "item"),
    [
        ({"optim": "galore_adamw", "optim_target_modules": "all-linear"}, "optim=galore_adamw"),
        ({"trainer": "grpo", "process_reward": "some/model"}, "process_reward"),
        ({"reward_model_name_or_path": "some/model"}, "the reward model"),
    ],
)
def test_what_is_left_out_is_said(tmp_path, changed, item):
    notes = plan_recipe(recipe(tmp_path, **changed)).notes
    assert any(note.startswith("Not counted") and item in note for note in notes)


def test_other_notes(tmp_path):
    old = plan_recipe(recipe(tmp_path), find_card("t4"))
    assert any("bf16=false fp16=true" in note for note in old.notes)
    assert not plan_recipe(recipe(tmp_path), find_card("l4")).notes
    assert any("Paged" in n for n in plan_recipe(recipe(tmp_path, optim="paged_adamw_8bit")).notes)
    config_of("gemma3_text").save_pretrained(tmp_path / "gemma")
    gemma = recipe(tmp_path, model_name_or_path=str(tmp_path / "gemma"))
    assert any("gemma3_text" in note for note in plan_recipe(gemma).notes)


def test_quantised_weights_need_an_adapter(tmp_path):
    with pytest.raises(ConfigError, match="use_peft=true"):
        plan_recipe(recipe(tmp_path, load_in_4bit=True))


def test_a_length_that_is_not_known(tmp_path):
    given = recipe(tmp_path, trainer="sft", **OFFLINE, max_length=10)
    given.values["max_length"] = None
    with pytest.raises(ConfigError, match="max_length=1024"):
        plan_recipe(given)


def test_longer_prompts_need_more(tmp_path):
    given = recipe(tmp_path, **LORA)
    short, long = (plan_recipe(given, prompt_length=n) for n in (64, 1024))
    assert short.peak("train") < long.peak("train")
    assert short.peak("generate") < long.peak("generate")


def test_rows_generated_at_once(tmp_path):
    # 8 rows · 4 steps; · 6 steps where a rollout has its own number; 24 of a batch over 2 cards.
    for changed, processes, expected in (
        ({}, None, 32),
        ({"steps_per_generation": 6}, None, 48),
        ({"generation_batch_size": 48, "num_processes": 2}, None, 24),
    ):
        plan = plan_recipe(recipe(tmp_path, **changed), processes=processes)
        assert plan.run.rollout_rows == expected
