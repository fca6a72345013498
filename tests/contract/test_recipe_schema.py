"""What recipe/ reads from source text is what Python finds in the imported classes."""

import dataclasses
import importlib
import inspect

import pytest
from trl.scripts.grpo import GRPOScriptArguments

from trl_ext.recipe.arguments import ScriptArguments
from trl_ext.recipe.findings import DEFAULT
from trl_ext.recipe.schema import (
    COMMON_GROUPS,
    COMPUTED,
    LAUNCH_GROUP,
    REQUIRED,
    Fields,
    class_fields,
    config_fields,
    refused_options,
)
from trl_ext.recipe.values import convert
from trl_ext.recipe.yaml_reader import Entry
from trl_ext.registry import TRAINERS

# Defaults that only running the class gives: transformers looks at the torch version.
COMPUTED_DEFAULTS = {"optim"}
# Choices that are not written as a literal list.
COMPUTED_CHOICES = {"log_level", "log_level_replica"}


def real_config(trainer: str) -> type:
    """A trainer's config by running the code."""
    cls = TRAINERS.load(trainer)
    module = importlib.import_module(cls.__module__)
    return getattr(module, cls.__name__.removesuffix("Trainer") + "Config")


def real_class(name: str) -> type:
    """The dataclass that a trainer's name or "module:Class" stands for, imported."""
    if name in TRAINERS.names():
        return real_config(name)
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def read_class(name: str) -> Fields:
    """The same, read from source."""
    in_registry = name in TRAINERS.names()
    return config_fields(TRAINERS.resolve(name)) if in_registry else class_fields(name)


CLASSES = [*TRAINERS.names(), *COMMON_GROUPS.values(), LAUNCH_GROUP]


def default_of(field: dataclasses.Field):
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return REQUIRED


@pytest.mark.parametrize("name", CLASSES)
def test_names_and_defaults(name):
    real = {field.name: field for field in dataclasses.fields(real_class(name)) if field.init}
    read = read_class(name)
    assert list(read) == list(real)
    computed = {key for key, field in read.items() if field.default is COMPUTED}
    assert computed <= COMPUTED_DEFAULTS
    differing = {
        key: (field.default, default_of(real[key]))
        for key, field in read.items()
        if field.default is not COMPUTED and field.default != default_of(real[key])
    }
    assert differing == {}


@pytest.mark.parametrize("name", CLASSES)
def test_choices_and_help(name):
    for field in dataclasses.fields(real_class(name)):
        if not field.init or field.name in COMPUTED_CHOICES:
            continue
        read = read_class(name)[field.name]
        choices = field.metadata.get("choices")
        assert read.choices == (None if choices is None else tuple(choices)), field.name
        assert read.help == field.metadata.get("help", ""), field.name


@pytest.mark.parametrize("name", CLASSES)
def test_each_default_is_a_value_that_the_field_takes(name):
    """So `show --defaults` prints a recipe; and a wrong reading of an annotation shows here."""
    for field in read_class(name).values():
        if field.default not in (COMPUTED, REQUIRED):
            assert convert(field, Entry(field.default, DEFAULT)) == field.default, field.name


@pytest.mark.parametrize("name", TRAINERS.names())
def test_refused_options(name):
    config = real_config(name)
    refused = config.all_refused() if hasattr(config, "all_refused") else {}
    assert refused_options(TRAINERS.resolve(name)) == refused


def test_script_arguments_are_a_superset_of_trls():
    ours = {field.name: field.default for field in dataclasses.fields(ScriptArguments)}
    theirs = {field.name: field.default for field in dataclasses.fields(GRPOScriptArguments)}
    assert {key: ours.get(key, "missing") for key in theirs} == theirs
    assert set(ours) - set(theirs) == {"dataset_kwargs"}


@pytest.mark.parametrize("name", ["GRPO", "SFT", "RLOO", "DPO", "Reward", "KTO"])
def test_trls_lazy_names_are_followed(name):
    trl = importlib.import_module("trl")
    real = inspect.signature(getattr(trl, f"{name}Config")).parameters
    assert list(config_fields(f"trl:{name}Trainer")) == list(real)
