"""A recipe, the files it extends and the command line, merged; the later layer wins."""

import copy
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_ext.recipe.findings import COMMAND_LINE, Finding, did_you_mean, show_value
from trl_ext.recipe.shipped import extended_path, find_extended
from trl_ext.recipe.yaml_reader import Entries, Entry, read_scalar, read_yaml

_ASSIGNMENT = re.compile(r"(?:--)?([A-Za-z_][\w.-]*)=(.*)", re.DOTALL)


def read_layers(path: Path, overrides: Sequence[str], findings: list[Finding]) -> Entries:
    """Every key with the value that wins, what is wrong appended to `findings`."""
    entries = _read_file(path, [], findings)
    for key, text in parse_overrides(overrides, findings):
        _override(entries, key, read_scalar(text, COMMAND_LINE), findings)
    return entries


def display_name(path: Path) -> str:
    """A file as a message shows it: relative to the current folder if it lies below it."""
    absolute, here = os.path.abspath(path), os.getcwd()
    below = os.path.commonpath([absolute, here]) == here
    return os.path.relpath(absolute, here) if below else absolute


def _read_file(path: Path, chain: list[Path], findings: list[Finding]) -> Entries:
    entries = read_yaml(path, display_name(path), findings)
    extends = entries.pop("extends", None)
    merged: Entries = {}
    if extends is not None:
        for file in _extended_files(extends, [*chain, path], findings):
            merged |= _read_file(file, [*chain, path], findings)
    return merged | entries


def _extended_files(entry: Entry, chain: list[Path], findings: list[Finding]) -> list[Path]:
    names = entry.value if isinstance(entry.value, list) else [entry.value]
    files = []
    for name in names:
        file = find_extended(name, chain[-1]) if isinstance(name, str) else None
        if file is None:
            findings.append(Finding(entry.origin, "extends", _no_such_file(name, chain[-1])))
        elif any(file.samefile(earlier) for earlier in chain):
            circle = " -> ".join(display_name(step) for step in [*chain, file])
            findings.append(Finding(entry.origin, "extends", f"the files form a circle: {circle}"))
        else:
            files.append(file)
    return files


def _no_such_file(name: Any, written_in: Path) -> str:
    if not isinstance(name, str):
        return f"got {show_value(name)}; allowed: a path, or a list of paths"
    path = extended_path(name, written_in)
    if os.path.isdir(path):
        return f"{name} is a folder; name a file in it"
    folder = path.parent
    siblings = [file.name for file in sorted(folder.glob("*.yaml"))]
    hint = did_you_mean(Path(name).name, siblings)
    return f"there is no file {name} beside {display_name(written_in)}.{hint}"


def parse_overrides(tokens: Sequence[str], findings: list[Finding]) -> list[tuple[str, str]]:
    """`key=value`, `--key=value`, `--key value` and the switch `--key` to keys and texts."""
    pairs, rest = [], list(tokens)
    while rest:
        token = rest.pop(0)
        assignment = _ASSIGNMENT.fullmatch(token)
        if assignment:
            pairs.append((assignment[1], assignment[2]))
        elif token.startswith("--") and len(token) > 2:
            is_switch = not rest or rest[0].startswith("--") or _ASSIGNMENT.fullmatch(rest[0])
            pairs.append((token[2:], "true" if is_switch else rest.pop(0)))
        else:
            message = "expected key=value or --key value; write a list as key=[a,b]"
            findings.append(Finding(COMMAND_LINE, token, message))
    return pairs


def _override(entries: Entries, key: str, entry: Entry, findings: list[Finding]) -> None:
    """Set a key; `key.inner=value` sets one entry of a mapping, and `env.NAME=value` a variable."""
    top, *inner = key.split(".")
    if top in ("extends", "env") and not (top == "env" and len(inner) == 1):
        advice = {"extends": "write it in the recipe", "env": "write env.NAME=value"}[top]
        findings.append(Finding(COMMAND_LINE, key, f"cannot be set here; {advice}"))
    elif top == "env":
        entries[key] = Entry(str(entry.value) if entry.text is None else entry.text, COMMAND_LINE)
    elif not inner:
        entries[key] = entry
    else:
        old = entries[top].value if top in entries else None
        entries[top] = Entry(_with_inner(old, inner, entry.value), COMMAND_LINE)


def _with_inner(old: Any, path: list[str], value: Any) -> dict[str, Any]:
    new = copy.copy(old) if isinstance(old, dict) else {}
    new[path[0]] = _with_inner(new.get(path[0]), path[1:], value) if path[1:] else value
    return new
