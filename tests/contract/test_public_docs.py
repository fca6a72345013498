"""What users may call is documented; the mathematics also says its shapes and where it is from."""

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import trl_ext
import trl_ext.functional
import trl_ext.gibbs_prm
import trl_ext.poe

# "(B, T)", "(…, G)", "(K,)": a parenthesis that opens with an axis and a comma.
SHAPE = re.compile(r"\((?:[A-Z]\w*|…|\.\.\.)\s*,")
SOURCE = re.compile(r"\bEquations?\s+E\d+|\bSource\b")


def doc_problems(name: str, thing: Any, *, mathematical: bool = False) -> list[str]:
    """What the docstring of a function or class lacks; an inherited one does not count."""
    text = getattr(thing, "__doc__", None) or ""
    if not text.strip():
        return [f"{name} has no docstring"]
    found = []
    if mathematical and not (SHAPE.search(text) or "Args:" in text):
        found.append(f"{name} says no shapes: '(B, T)' or an 'Args:' section")
    if mathematical and not SOURCE.search(text):
        found.append(f"{name} names no source: 'Equation E3' or 'Source: …'")
    return found


def _functional_symbols() -> dict[str, Any]:
    """Every public function that a file of functional/ defines, in its `__all__` or not."""
    folder = Path(trl_ext.functional.__file__).parent
    symbols = {}
    for path in sorted(folder.glob("[!_]*.py")):
        module = importlib.import_module(f"trl_ext.functional.{path.stem}")
        for name, value in inspect.getmembers(module, inspect.isfunction):
            if value.__module__ == module.__name__ and not name.startswith("_"):
                symbols[f"functional.{path.stem}.{name}"] = value
    return symbols


def _exported(module_name: str) -> dict[str, Any]:
    module = importlib.import_module(module_name)
    values = {name: getattr(module, name) for name in module.__all__}
    return {
        f"{module_name}.{name}": value
        for name, value in values.items()
        if inspect.isclass(value) or inspect.isroutine(value)
    }


def _members(name: str, value: Any) -> dict[str, Any]:
    """The public methods and properties that a class of this project defines itself."""
    if not inspect.isclass(value):
        return {}
    return {
        f"{name}.{member}": thing
        for member, thing in vars(value).items()
        if not member.startswith("_")
        and (inspect.isfunction(thing) or isinstance(thing, property | classmethod | staticmethod))
    }


def test_functional_is_documented():
    """A helper that is public but not exported owes a docstring, not an equation."""
    symbols = _functional_symbols()
    assert symbols
    found = [
        line
        for name, value in symbols.items()
        for line in doc_problems(
            name, value, mathematical=value.__name__ in trl_ext.functional.__all__
        )
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "module_name",
    ["trl_ext", "trl_ext.functional", "trl_ext.oracle", "trl_ext.poe", "trl_ext.gibbs_prm"],
)
def test_exported_names_are_documented(module_name):
    exported = _exported(module_name)
    assert exported
    found = [line for name, value in exported.items() for line in doc_problems(name, value)]
    assert not found, "\n".join(found)


def test_oracle_methods_are_documented():
    """The oracle judges every algorithm, so each of its quantities says what it is."""
    found = [
        line
        for name, value in _exported("trl_ext.oracle").items()
        for member, thing in _members(name, value).items()
        if member.rpartition(".")[2] not in OVERRIDES
        for line in doc_problems(member, thing)
    ]
    assert not found, "\n".join(found)


# Methods of transformers that a model overrides; transformers documents them.
OVERRIDES = {"forward", "prepare_inputs_for_generation", "get_input_embeddings"}


@pytest.mark.parametrize("package", [trl_ext, trl_ext.poe, trl_ext.gibbs_prm])
def test_lazy_names_are_listed_and_resolve(package):
    for name in package.__all__:
        assert name in dir(package)
        getattr(package, name)
    # Once imported, a module hides a lazy name that it shares.
    assert not any(inspect.ismodule(getattr(package, name)) for name in package.__all__)


def test_a_name_that_is_none():
    with pytest.raises(AttributeError, match="no attribute 'RWRTrainor'"):
        trl_ext.RWRTrainor  # noqa: B018


@pytest.mark.parametrize(
    ("docstring", "lacks"),
    [
        (None, ["no docstring"]),
        ("One line.", ["no shapes", "no source"]),
        ("Equation E3. (B, T) -> (B,)", []),
        ("Source: Kish (1965). (…, G) -> (…)", []),
        ("Source: Kish (1965).", ["no shapes"]),
        ("Args:\n    x: (B, T)", ["no source"]),
    ],
)
def test_doc_problems(docstring, lacks):
    def thing(): ...

    thing.__doc__ = docstring
    found = doc_problems("thing", thing, mathematical=True)
    assert len(found) == len(lacks)
    assert all(part in line for part, line in zip(lacks, found, strict=True))
