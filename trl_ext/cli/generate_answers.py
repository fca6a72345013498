"""Answers of a product and of its experts on the terminal."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from unicodedata import category

if TYPE_CHECKING:
    from rich.console import Console

    from trl_ext.poe.corpora import Prompt
    from trl_ext.poe.side_by_side import Row, SideBySide

PRODUCT = "product"
_NARROWEST_COLUMN = 24  # with less, answers stand below each other


def print_rows(console: "Console", rows: "Sequence[Row]", names: Sequence[str]) -> None:
    """The answers to one prompt, beside each other where there is room."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console.print()
    console.print(Text(_shown(rows[0].prompt), style="bold"))
    answers = [{**row.experts, PRODUCT: row.product} for row in rows]
    if console.width // len(names) >= _NARROWEST_COLUMN:
        table = Table(box=box.ROUNDED, expand=True, show_lines=len(rows) > 1)
        for name in names:
            table.add_column(name, ratio=1, overflow="fold")
        for answer in answers:
            table.add_row(*(_text(answer[name]) for name in names))
    else:
        table = Table(box=box.ROUNDED, expand=True, show_lines=True, show_header=False)
        for answer in answers:
            for name in names:
                table.add_row(Text(f"{name}\n", style="bold") + _text(answer[name]))
    console.print(table)
    print_likelihoods(console, rows)


def _text(answer: str) -> Any:
    from rich.text import Text

    # A terminal would obey control characters.
    answer = "".join("\ufffd" if _is_control(c) else c for c in answer).strip()
    return Text(answer) if answer else Text("(no text)", style="dim")


def _is_control(character: str) -> bool:
    return category(character) == "Cc" and character not in "\n\t"


def print_likelihoods(console: "Console", rows: "Sequence[Row]") -> None:
    """What the experts and the product say of the product's answers."""
    from rich.text import Text

    for row in rows:
        which = f" {row.sample + 1}" if len(rows) > 1 else ""
        under = ", ".join(f"{name} {value:.2f}" for name, value in row.log_likelihood.items())
        line = f"product's answer{which}: {row.tokens} tokens; nats per token under {under}; "
        console.print(Text(f"{line}log Z {row.log_z:.2f}", style="dim"))


def _shown(prompt: "Prompt") -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def print_speeds(args: argparse.Namespace, side: "SideBySide", console: "Console") -> None:
    """Tokens per second of the product and of each expert alone."""
    speeds = side.speeds()
    if not speeds:
        return
    alone = ", ".join(f"{name} {speeds[name]:.1f}" for name in side.names if name != PRODUCT)
    where = f"{side.product.device}, {args.dtype}"
    console.print()
    console.print(
        f"tokens/s: {PRODUCT} {speeds[PRODUCT]:.1f}{f'; alone: {alone}' if alone else ''} "
        f"({where})",
        markup=False,
    )
