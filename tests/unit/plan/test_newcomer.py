"""What a newcomer does: plan for a card, paste what it says, validate, and plan again."""

import pytest

from trl_ext.cli import main
from trl_ext.plan import find_card, plan_recipe
from trl_ext.recipe import read_recipe

MODELS = ("Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-7B-Instruct")
# All weights, with batches that are too large for the smaller cards.
WHOLE = ["use_peft=false", "dtype=float32", "per_device_train_batch_size=16", "eval_on_start=false"]
TRAINERS = {
    "rwr": ("rwr/quickstart", ["max_completion_length=512"]),
    "ppo": ("ppo/smollm2", ["max_completion_length=512"]),
    "dpo": ("dpo/smollm2", ["max_length=1024"]),
    "reward": ("reward_model/smollm2", ["max_length=1024"]),
}
CARDS = (("rtx-3060", 1), ("rtx-4090", 1), ("a100-80", 4))


@pytest.mark.parametrize(("card", "number"), CARDS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_what_is_pasted_fits_and_is_valid(trainer, model, card, number, capsys):
    name, changed = TRAINERS[trainer]
    given = [name, f"model_name_or_path={model}", *WHOLE, *changed]
    of_card = ["--gpu", card, "--num-gpus", str(number)]
    fits = main(["plan", *given, *of_card]) == 0
    said = capsys.readouterr().out.splitlines()
    assert ("With these it does:" in said) != fits
    if fits:
        return
    pasted = said[-1].split()
    # By the planner's own account, read back from the recipe as it is pasted.
    plan = plan_recipe(read_recipe(name, [*given[1:], *pasted]), processes=number)
    assert plan.fits(find_card(card))
    assert main(["validate", *given, *pasted]) == 0
    assert capsys.readouterr().out.startswith("ok: ")


def test_the_table_is_not_empty_for_the_smallest_card():
    """Otherwise nothing above was pasted."""
    for trainer, (name, changed) in TRAINERS.items():
        for model in MODELS:
            recipe = read_recipe(name, [f"model_name_or_path={model}", *WHOLE, *changed])
            assert not plan_recipe(recipe).fits(find_card("rtx-3060")), trainer
