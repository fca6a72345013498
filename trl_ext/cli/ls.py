"""List the shipped recipes, with the purpose and hardware that their headers name."""

import argparse
import json
import re
import shutil
import textwrap
from pathlib import Path

from trl_ext.recipe.shipped import recipe_names, shipped_folder

_HEADER_LINE = re.compile(r"# ([A-Z][a-z]+): (.*)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("--json", action="store_true", help="every header in full, as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the recipes."""
    folder = shipped_folder("recipes")
    headers = {name: read_header(folder / f"{name}.yaml") for name in recipe_names()}
    if args.json:
        print(json.dumps(headers, indent=2, ensure_ascii=False))
    elif headers:
        print("\n".join(_entry(name, header) for name, header in headers.items()))
        print("\nRun one with `trl_ext train NAME`, copy one with `trl_ext cp NAME`.")
    else:
        print(f"There are no recipes in {folder}.")
    return 0


def read_header(path: Path) -> dict[str, str]:
    """The comments `# Purpose: ...` at the top of a recipe; `#   ` continues the one above."""
    header: dict[str, str] = {}
    key = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        start = _HEADER_LINE.fullmatch(line)
        if start:
            key = start[1].lower()
            header[key] = start[2].strip()
        elif key and line.startswith("#   "):
            header[key] += f" {line[1:].strip()}"
    return header


def _entry(name: str, header: dict[str, str]) -> str:
    width = min(shutil.get_terminal_size((100, 24)).columns, 100)
    texts = [header.get("purpose", "(no purpose given)")]
    texts += [f"Hardware: {header['hardware']}"] if "hardware" in header else []
    wrapped = [
        textwrap.fill(text, width, initial_indent="    ", subsequent_indent="    ")
        for text in texts
    ]
    return "\n".join([name, *wrapped])
