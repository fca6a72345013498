"""Options of a config of ours: which inherited ones it refuses, and whether each has its type."""

import os
import types
from collections.abc import Mapping
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from trl_ext.errors import ConfigError

# What an annotation of an option stands for. True is no number here, though Python has it be 1.
_KINDS: Mapping[Any, tuple[type, str, str]] = {
    bool: (bool, "True or False", "True or False"),
    int: (Integral, "a whole number", "whole numbers"),
    float: (Real, "a number", "numbers"),
    str: (str, "a text", "texts"),
    type(None): (type(None), "None", "None"),
}


Config = TypeVar("Config", bound="OwnOptions")


class OwnOptions:
    """Before one of TRL's configs, in a dataclass that adds options to it and refuses some."""

    # Inherited options without a meaning: name -> reason. A literal, so that it can be read without
    # import.
    refused: ClassVar[dict[str, str]] = {}
    # Options of TRL's that must have these types; its others are TRL's to check.
    typed: ClassVar[dict[str, Any]] = {}

    @classmethod
    def all_refused(cls) -> dict[str, str]:
        """`refused` of this class and of those that it builds on: option -> reason."""
        merged: dict[str, str] = {}
        for base in reversed(cls.__mro__):
            merged |= vars(base).get("refused", {})
        return merged

    def findings(self) -> list[str]:
        """What is wrong with these options, a line each."""
        return self.refused_findings() + self.wrong_types()

    def check(self) -> None:
        """Raise what `findings` says, as a `ConfigError`."""
        if findings := self.findings():
            raise ConfigError("\n".join([f"{type(self).__name__}:", *findings]))

    def refused_findings(self, *allowed: Any) -> list[str]:
        """A line for each refused option that is neither its default nor one of `allowed`."""
        defaults = self._defaults()
        return [
            f"  {name}={getattr(self, name)!r} does nothing here: {reason}. Remove it."
            for name, reason in self.all_refused().items()
            if getattr(self, name) not in (defaults[name], *allowed)
        ]

    def wrong_types(self) -> list[str]:
        """A line for each option of ours, or in `typed`, of another type than its annotation."""
        theirs = [base for base in type(self).__mro__ if base.__module__.startswith("trl.")]
        trls = {option.name for option in fields(theirs[0])}
        hints = get_type_hints(type(self))
        expected = {name: hints[name] for name in self._defaults() if name not in trls} | self.typed
        return [
            f"  {name}={value!r} {_is_of(value, hint)} {_in_words(hint)}."
            f"{_advice(name, value, hint)}"
            for name, hint in expected.items()
            if not _fits(value := getattr(self, name), hint)
        ]

    def _defaults(self) -> dict[str, Any]:
        options: Any = self
        return {option.name: option.default for option in fields(options)}


def own_config(of: type[Config], trainer: str, model: Any, args: Any) -> Config:
    """The config that a trainer is given, or a default one whose folder is named after the model.

    Raises:
        ConfigError: if it is of another class, such as that of TRL.
    """
    if args is None:
        name = model if isinstance(model, str) else model.config._name_or_path
        make: Any = of
        return make(f"{os.path.basename(name.rstrip('/'))}-{trainer.removesuffix('Trainer')}")
    if not isinstance(args, of):
        package = type(args).__module__.partition(".")[0]
        raise ConfigError(
            f"{trainer} takes args of type {of.__name__}, got {type(args).__name__} of {package}. "
            f"Build it as trl_ext.{of.__name__}(...): it has the same fields and adds its own."
        )
    return args


def _is_of(value: Any, hint: Any) -> str:
    chosen = get_origin(hint) is Literal and isinstance(value, str)
    return "must be" if chosen else f"is a {type(value).__name__}; it must be"


def _advice(name: str, value: Any, hint: Any) -> str:
    return f" Write {name}=[{value!r}]." if _fits([value], hint) else ""


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has an option's type; one that is not listed above is not looked into."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(v, get_args(hint)[0]) for v in value)
    if isinstance(value, bool) and hint in (int, float):
        return False
    return hint not in _KINDS or isinstance(value, _KINDS[hint][0])


def _in_words(hint: Any) -> str:
    parts = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(_in_words, parts))
    if get_origin(hint) is Literal:
        return f"one of {', '.join(parts)}"
    if get_origin(hint) is list:
        return f"a list of {_KINDS[parts[0]][2] if parts[0] in _KINDS else 'entries'}"
    return _KINDS[hint][1] if hint in _KINDS else str(hint)
