"""The recipes of each trainer at three sizes: what their headers say is what `plan` prints."""

import json
import re
import shlex
from itertools import takewhile
from pathlib import Path

import pytest

from trl_ext.cli import main
from trl_ext.plan import find_card, plan_recipe
from trl_ext.recipe import read_recipe
from trl_ext.recipe.shipped import find_recipe, recipe_names

FOLDERS = {
    "rwr": "rwr",
    "grpo": "grpo",
    "reinforce": "reinforce",
    "ppo": "ppo",
    "offline_rwr": "offline_rwr",
    "reward": "reward_model",
    "dpo": "dpo",
    "poe_distillation": "poe",
}
# Size -> the card that its header is about, and other cards of that size.
CARDS = {
    "12gb": ("rtx-3060",),
    "24gb": ("rtx-4090", "rtx-3090"),
    "8gpu": ("a100-80", "h100"),
}
SIZES = [
    (f"{folder}/qwen_{size}", trainer, size)
    for trainer, folder in FOLDERS.items()
    for size in CARDS
]
EVERY = [pytest.param(*each, id=each[0]) for each in SIZES]


def header(name: str) -> str:
    """The comment that a recipe begins with, on one line; a backslash ends no command."""
    lines = takewhile(lambda line: line.startswith("#"), find_recipe(name).read_text().splitlines())
    return " ".join(line.removeprefix("#").strip() for line in lines)


def commands(name: str) -> list[list[str]]:
    """The arguments of each `trl_ext …` that a header tells to run, the last of them first."""
    said = header(name).partition("Command: ")[2].replace("\\ ", "")
    parts = re.split(r"trl_ext (?=train |collect )", said)[1:]
    return [shlex.split(part.partition(", after its data:")[0]) for part in parts]


def test_no_size_is_missing():
    # sft is TRL's own, and gibbs_prm an option of the others.
    assert {name for name, *_ in SIZES} == {name for name in recipe_names() if "/qwen_" in name}


@pytest.mark.parametrize(("name", "trainer", "size"), EVERY)
def test_the_headers_figure_is_what_plan_prints(name, trainer, size, capsys):
    [figure, command] = re.search(
        r"Memory: (.* GiB at worst \(\w+\)), as `trl_ext (.*)` printed; not measured on a card",
        header(name),
    ).groups()  # pyright: ignore[reportOptionalMemberAccess]
    assert command == f"plan {name} --gpu {CARDS[size][0]}"
    assert main(command.split()) == 0
    assert f"Fits: {figure}; " in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(("name", "trainer", "size"), EVERY)
def test_it_needs_the_card_of_its_name(name, trainer, size):
    recipe = read_recipe(name)
    plan = plan_recipe(recipe)
    assert recipe.trainer == trainer
    assert all(plan.fits(find_card(card)) for card in CARDS[size])
    assert not [note for note in plan.notes if note.startswith("Not counted")]
    assert size == "12gb" or not plan.fits(find_card("rtx-3060"))


@pytest.mark.parametrize(("name", "trainer", "size"), EVERY)
def test_each_size_trains_as_it_says(name, trainer, size):
    run = plan_recipe(read_recipe(name)).run
    kind = {"12gb": "4bit nested", "24gb": "", "8gpu": ""}[size]
    assert run.quantisation == kind
    assert run.numbers.trains_base == (size == "8gpu")
    divided = ("zero3", 8) if size == "8gpu" else ("none", 1)  # FSDP2 divides as ZeRO 3 does
    assert (run.division.kind, run.division.cards) == divided
    assert run.checkpointing


@pytest.mark.parametrize(("name", "trainer", "size"), EVERY)
def test_the_command_of_its_header_is_right(name, trainer, size):
    train, *data = commands(name)
    assert train == ["train", name]
    recipe = read_recipe(name)
    takes_logged = trainer in ("offline_rwr", "reward", "dpo")
    assert len(data) == takes_logged
    for collect in data:
        options = {key: collect[collect.index(key) + 1] for key in collect if key.startswith("--")}
        assert options["--output"] == recipe.values["dataset_name"]
        assert options.get("--as") == (None if trainer == "offline_rwr" else "preferences")
        assert collect[:2] == ["collect", f"rwr/qwen_{size}"]
        overrides = [each for each in collect if "=" in each]
        sampling = read_recipe(collect[1], overrides)
        assert sampling.values["model_name_or_path"] == recipe.values["model_name_or_path"]
        # `collect` refuses a policy that is sharded.
        assert sampling.launcher.get("accelerate_config") in (None, "ddp")


def test_no_two_write_to_one_place():
    places = [read_recipe(name).values["output_dir"] for name, *_ in SIZES]
    assert len(set(places)) == len(places)


def test_pairs_are_what_a_reward_model_is_planned_for():
    # `collect --as preferences` writes prompt, chosen, rejected: two rows a pair, as plan counts.
    plan = plan_recipe(read_recipe("reward_model/qwen_24gb"))
    assert plan.run.rows == 2 * 4
    assert any("rankings of K" in note for note in plan.notes)


def test_json_has_what_stands_beside(capsys):
    assert main(["plan", "poe/qwen_12gb", "--json"]) == 0
    assert "experts" in json.loads(capsys.readouterr().out)["phases"]["load"]


def test_the_fragments_show_how_to_extend_them():
    for file in sorted(Path(find_recipe("configs/sizes/qwen_24gb")).parent.glob("*.yaml")):
        shown = re.findall(r"^#   extends: (.*)$", file.read_text(), re.M)
        assert shown and f"configs/sizes/{file.name}" in shown[0]
