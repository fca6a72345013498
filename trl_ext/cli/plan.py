"""Say whether a recipe fits a card, and what makes it fit.

The memory of a run, phase by phase, read from the model's config alone: no weights are loaded or
downloaded. The exit code is 1 where the run does not fit.

examples:
  trl_ext plan ppo/qwen_24gb --gpu rtx-3060
  trl_ext plan my.yaml --vram 24 --prompt-length 1024 load_in_4bit=true
  trl_ext plan my.yaml --gpu a100-80 --num-gpus 8 accelerate_config=zero3
"""

from __future__ import annotations

import argparse
import json
import logging
import textwrap
from typing import TYPE_CHECKING, Any

from trl_ext.cli.numbers import count, positive
from trl_ext.errors import ConfigError
from trl_ext.recipe import read_recipe

if TYPE_CHECKING:
    from trl_ext.plan import Card, Plan

_GIB = 2**30
_WIDTH = 80


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments; everything else is an override."""
    parser.usage = (
        "%(prog)s RECIPE [--gpu NAME | --vram GIB] [--num-gpus N] [--prompt-length TOKENS] "
        "[--json] [key=value ...]"
    )
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    card = parser.add_mutually_exclusive_group()
    card.add_argument("--gpu", metavar="NAME", help="a card, such as rtx-3060, t4 or a100-80")
    card.add_argument("--vram", type=positive, metavar="GIB", help="memory of any other card")
    parser.add_argument(
        "--num-gpus", type=count, metavar="N", help="cards; default: as the recipe says"
    )
    parser.add_argument(
        "--prompt-length",
        type=count,
        metavar="TOKENS",
        help="of the longest prompt (default: 256); rows of logged data are max_length long",
    )
    parser.add_argument("--json", action="store_true", help="bytes of every item as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the table and the verdict."""
    recipe = read_recipe(args.recipe, args.overrides)
    # Said at import of a kernel that nothing here uses; it reads as if the installation had failed.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from trl_ext.plan import (
        card_of_size,
        find_card,
        generates,
        may_shard,
        plan_recipe,
        settings_of,
        suggest,
    )

    card = find_card(args.gpu) if args.gpu else None
    card = card_of_size(args.vram) if args.vram is not None else card
    if args.prompt_length is not None and not generates(settings_of(recipe)):
        raise ConfigError(
            f"--prompt-length {args.prompt_length} does nothing for trainer: {recipe.trainer}: its "
            "rows are counted as max_length tokens. Give max_length=..."
        )
    options: dict[str, Any] = {
        "prompt_length": args.prompt_length or 256,
        "processes": args.num_gpus,
    }
    plan = plan_recipe(recipe, card, **options)
    fits = card is None or plan.fits(card)
    changes = None if fits or card is None else suggest(recipe, args.overrides, card, **options)
    if args.json:
        print(json.dumps(_as_json(plan, card, changes), indent=2))
    else:
        _print_table(plan, args.recipe)
        print(_wrapped(_verdict(plan, card)))
        if not fits:
            print(_advice(changes, may_shard(recipe)))
    return 0 if fits else 1


def _as_json(plan: Plan, card: Card | None, changes: list[str] | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "unit": "bytes on each card",
        "phases": plan.phases,
        "peaks": {name: plan.peak(name) for name in plan.phases},
        "worst": plan.worst,
        "notes": list(plan.notes),
    }
    if card is not None:
        found |= {"card": card.name, "total": card.total, "usable": card.usable}
        found |= {"fits": plan.fits(card), "changes": changes}
    return found


def _print_table(plan: Plan, name: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from trl_ext.plan import ITEMS

    items = [item for item in ITEMS if any(item in phase for phase in plan.phases.values())]
    table = Table(box=None, padding=(0, 1))
    table.add_column("")
    for phase in plan.phases:
        table.add_column(phase, justify="right")
    for item in items:
        table.add_row(item, *(_cell(of_phase.get(item, 0)) for of_phase in plan.phases.values()))
    table.add_row("peak", *(_cell(plan.peak(phase)) for phase in plan.phases), style="bold")
    print(f"{name}: GiB on each card")
    Console(highlight=False).print(table)
    print(_wrapped(_assumed(plan), *plan.notes))


def _wrapped(*texts: str) -> str:
    return "\n".join(textwrap.fill(text, _WIDTH, break_on_hyphens=False) for text in texts)


def _cell(count: int) -> str:
    if not count:
        return ""
    return f"{count / _GIB:.2f}" if count >= 0.005 * _GIB else "<0.01"


def _assumed(plan: Plan) -> str:
    run = plan.run
    rows = f"{run.rows} rows"
    length = f"{run.completion} tokens"
    if run.rollout_rows:
        length = f"({run.prompt} prompt + {run.completion} completion) tokens"
        rows += f" of {run.rollout_rows} generated at once"
    division = run.division
    kind = division.kind
    if kind == "zero3" and not division.is_deepspeed:
        kind = "fsdp"
    cards = "" if division.cards == 1 else f", {division.cards} cards ({kind})"
    return f"Micro-batches of {rows}, each {length}{cards}."


def _verdict(plan: Plan, card: Card | None) -> str:
    from trl_ext.plan import CARDS, find_card

    need = f"{plan.peak(plan.worst) / _GIB:.1f} GiB at worst ({plan.worst})"
    if card is None:
        fitting = [name for name in CARDS if plan.fits(find_card(name))]
        return f"{need}. Fits: {', '.join(fitting) or 'none of the cards known here'}."
    has = (
        f"{card.name} leaves {card.usable / _GIB:.1f} of {card.total / _GIB:.1f} GiB beside CUDA's "
        "context and fragments"
    )
    return f"{'Fits' if plan.fits(card) else 'Does not fit'}: {need}; {has}."


def _advice(changes: list[str] | None, shards: bool) -> str:
    if changes is None:
        more = ", or more of them (accelerate_config=zero3 --num-gpus 2)" if shards else ""
        return f"No change known here is enough: a smaller model or a larger card{more}."
    return f"With these it does:\n  {' '.join(changes)}"
