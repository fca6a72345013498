"""Changes that make a recipe fit: they do by the plan's own account, and none of them is spare."""

import pytest

from tests.unit.plan.recipes import LORA, recipe
from trl_ext.plan import card_of_size, find_card, plan_recipe, suggest
from trl_ext.recipe import read_recipe

QUANTISED = LORA | {"load_in_4bit": True, "use_bnb_nested_quant": True}
MODELS = ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-7B", "meta-llama/Llama-3.1-8B")
CARDS = ("rtx-3060", "rtx-4090", "a100-40")


def planned(given, card, changes):
    return plan_recipe(read_recipe(given.path, changes), card)


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("model", MODELS)
def test_a_newcomers_cards_and_models(tmp_path, model, card):
    # Three models by three cards, trained whole with batches that are too large.
    given = recipe(
        tmp_path,
        model_name_or_path=model,
        per_device_train_batch_size=32,
        gradient_checkpointing=False,
        max_completion_length=512,
    )
    card = find_card(card)
    assert not plan_recipe(given, card).fits(card)
    changes = suggest(given, [], card)
    assert changes
    assert planned(given, card, changes).fits(card)


def test_one_change_if_one_will_do(tmp_path):
    given = recipe(tmp_path, **LORA, gradient_checkpointing=False)
    with_it = planned(given, None, ["gradient_checkpointing=true"])
    card = card_of_size(with_it.peak(with_it.worst) / 2**30 * 1.1 + 1)
    assert suggest(given, [], card) == ["gradient_checkpointing=true"]


def test_nothing_to_spare(tmp_path):
    given = recipe(tmp_path, gradient_checkpointing=False, per_device_train_batch_size=16)
    card = find_card("rtx-3060")
    changes = suggest(given, [], card)
    assert changes and len(changes) > 1
    for change in changes:
        if change.startswith(("gradient_checkpointing", "optim", "max_completion")):
            others = [each for each in changes if each != change]
            assert not planned(given, card, others).fits(card)


def test_harmless_changes_stay():
    # Micro-batches of one row would fit without them, and leave a card idle.
    given = ["model_name_or_path=Qwen/Qwen2.5-7B", "max_completion_length=512"]
    recipe = read_recipe("rwr/smollm2_full", given)
    changes = suggest(recipe, given, find_card("rtx-3060"))
    assert changes and {"attn_implementation=sdpa", "gradient_checkpointing=true"} <= {*changes}
    assert "per_device_train_batch_size=1" not in changes


def test_a_smaller_batch_keeps_steps_and_rollouts(tmp_path):
    # Generated elsewhere, so that only training is too large; half the rows are enough.
    server = {"use_vllm": True, "vllm_mode": "server", "steps_per_generation": 8}
    given = recipe(tmp_path, **QUANTISED, **server, per_device_train_batch_size=64)
    half = [
        "per_device_train_batch_size=32",
        "gradient_accumulation_steps=8",
        "steps_per_generation=16",
    ]
    needs = [plan.peak(plan.worst) for plan in (plan_recipe(given), planned(given, None, half))]
    card = card_of_size((sum(needs) / 2 / 2**30 + 0.5) / 0.97)
    assert suggest(given, [], card) == half


def test_overrides_stay(tmp_path):
    # Half the rows are enough for the recipe as it is written, and not as it is overridden.
    given = recipe(tmp_path, **QUANTISED)
    overrides = ["max_completion_length=2048"]
    first = planned(given, None, [*overrides, "per_device_train_batch_size=4"])
    card = card_of_size((first.peak(first.worst) * 0.97 / 2**30 + 0.5) / 0.97)
    changes = suggest(read_recipe(given.path, overrides), overrides, card)
    assert changes and planned(given, card, [*overrides, *changes]).fits(card)


def test_groups_still_fill_the_batch(tmp_path):
    # 8 rows by 1 step in groups of 8: no rollout can be smaller, so only rows of a step can.
    given = recipe(tmp_path, **QUANTISED, num_generations=8, gradient_accumulation_steps=1)
    changes = suggest(given, [], card_of_size(4))
    if changes is not None:
        assert not any("steps_per_generation" in each for each in changes)
        read_recipe(given.path, changes)


def test_nothing_is_enough(tmp_path):
    given = recipe(tmp_path, trainer="ppo", num_generations=1, **QUANTISED)
    assert suggest(given, [], card_of_size(1)) is None


def test_more_cards(tmp_path):
    whole = {"model_name_or_path": "Qwen/Qwen2.5-7B", "optim": "adamw_torch_fused"}
    given = recipe(tmp_path, **whole, use_vllm=True, vllm_mode="server")
    card = find_card("a100-80")
    changes = suggest(given, [], card, processes=8)
    assert changes
    assert plan_recipe(read_recipe(given.path, changes), card, processes=8).fits(card)
    assert not any("num_processes" in each for each in changes)


def test_vllm_may_sleep(tmp_path):
    one = {"per_device_train_batch_size": 1, "max_completion_length": 100}
    given = recipe(tmp_path, **LORA, **one, use_vllm=True, vllm_gpu_memory_utilization=0.5)
    card = card_of_size(8)
    assert suggest(given, [], card) == ["vllm_enable_sleep_mode=true"]
