"""Which keys a recipe may have: the fields of the dataclasses it fills, read from their source."""

import ast
import builtins
import sys
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from trl_ext.errors import PluginError
from trl_ext.recipe.annotations import build_type, finish, is_dataclass, with_choices
from trl_ext.recipe.source import Found, Source, find_class, find_expression

# A recipe's groups besides the trainer's own config, by the name launch.py finds them under.
COMMON_GROUPS = {
    "script": "trl_ext.recipe.arguments:ScriptArguments",
    "model": "trl.trainer.model_config:ModelConfig",
    "mixture": "trl.scripts.utils:DatasetMixtureConfig",
}
LAUNCH_GROUP = "trl_ext.recipe.arguments:LaunchArguments"

REQUIRED = object()  # the class has no default
COMPUTED = object()  # the default is not a literal; only running the class gives it


@dataclass(frozen=True, eq=False)
class Field:
    """One field of a dataclass, as its source says."""

    name: str
    source: Source
    annotation: ast.expr
    default: Any
    help: str = ""
    choices: tuple[Any, ...] | None = None
    least: float | None = None

    @cached_property
    def type(self) -> Any:
        """What values it takes; built when asked, since most fields of a config stay unset."""
        kind = finish(build_type(self.source, self.annotation, _types_of))
        return kind if self.choices is None else with_choices(kind, self.choices)


Fields = dict[str, Field]


@cache
def class_fields(target: str) -> Fields:
    """The fields of the dataclass `package.module:Name`, those of its bases included.

    Raises:
        PluginError: if the source of the class or of one of its bases cannot be found.
    """
    module, _, name = target.partition(":")
    found = find_class(module, name)
    if found is None:
        raise PluginError(f"The source of {target!r} cannot be found. Is its package installed?")
    return _fields(*found)


@cache
def config_fields(trainer_target: str) -> Fields:
    """The fields of the config that belongs to a trainer: `<Name>Config` beside `<Name>Trainer`.

    Raises:
        PluginError: if there is no such pair, or its source cannot be found.
    """
    return _fields(*_find_config(trainer_target))


@cache
def refused_options(trainer_target: str) -> dict[str, str]:
    """Inherited option -> why the trainer refuses it: the literals `refused` of its config.

    A class adds to those of the one that it builds on.
    """
    refused: dict[str, str] = {}
    found: Found | None = _find_config(trainer_target)
    while found is not None:
        source, cls = found
        for node in cls.body:
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "refused":
                value = _literal(node.value) if node.value else COMPUTED
                refused = (value if isinstance(value, dict) else {}) | refused
        found = find_expression(source, cls.bases[0]) if cls.bases else None
    return refused


@cache
def takes_argument(trainer_target: str, argument: str) -> bool:
    """Whether a trainer's `__init__`, or that which it inherits, names an argument.

    True where no source says so.
    """
    module, _, trainer = trainer_target.partition(":")
    found = find_class(module, trainer)
    init = _init_of(*found) if found else None
    if init is None:
        return True
    return any(each.arg == argument for each in (*init.posonlyargs, *init.args, *init.kwonlyargs))


def _init_of(source: Source, cls: ast.ClassDef) -> ast.arguments | None:
    for node in cls.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return node.args
    found = (find_expression(source, base) for base in cls.bases)
    return next((init for each in found if each and (init := _init_of(*each))), None)


def _find_config(trainer_target: str) -> Found:
    module, _, trainer = trainer_target.partition(":")
    found = find_class(module, trainer)
    if found is None:
        raise PluginError(
            f"The source of the trainer {trainer_target!r} cannot be found. It must be a class in "
            "a Python file of an installed package or of the current folder; is it spelt right?"
        )
    name = trainer.removesuffix("Trainer") + "Config"
    config = find_class(found[0].module, name) or find_class(module, name)
    if config is None or not trainer.endswith("Trainer"):
        raise PluginError(
            f"The trainer {trainer_target!r} has no config: a trainer is called <Name>Trainer, and "
            f"its module defines or imports <Name>Config (here {name})."
        )
    return config


def _fields(source: Source, cls: ast.ClassDef) -> Fields:
    fields: Fields = {}
    for base in reversed(cls.bases):
        found = find_expression(source, base)
        if found:
            fields |= _fields(*found)
        elif is_dataclass(cls) and not _is_standard(source, base):
            raise PluginError(
                f"{source.path}:{cls.lineno}: the fields of {cls.name} cannot be read, since the "
                f"source of its base {ast.unparse(base)} cannot be found. Is its package installed?"
            )
    if is_dataclass(cls):
        fields |= _own_fields(source, cls)
    return fields


def _is_standard(source: Source, base: ast.expr) -> bool:
    """Whether a base comes from Python itself (object, ABC, Generic[T]) and so has no fields."""
    name = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
    if hasattr(builtins, name):
        return True
    head = name.partition(".")[0]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound = {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
            module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            if head in bound and module:
                return module.partition(".")[0] in sys.stdlib_module_names
    return False


def _own_fields(source: Source, cls: ast.ClassDef) -> Fields:
    fields = {}
    for node in cls.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            field = _field(source, node.target.id, node.annotation, node.value)
            if field:
                fields[field.name] = field
    return fields


def _field(source: Source, name: str, annotation: ast.expr, value: ast.expr | None) -> Field | None:
    if any(word in ast.unparse(annotation) for word in ("ClassVar", "KW_ONLY")):
        return None
    if not (isinstance(value, ast.Call) and ast.unparse(value.func).endswith("field")):
        return Field(name, source, annotation, REQUIRED if value is None else _literal(value))
    options = {keyword.arg: keyword.value for keyword in value.keywords}
    if "init" in options and _literal(options["init"]) is False:
        return None
    metadata = _metadata(options.get("metadata"))
    choices, text = metadata.get("choices", COMPUTED), metadata.get("help", "")
    return Field(
        name=name,
        source=source,
        annotation=annotation,
        default=_default(options),
        help="" if text is COMPUTED else text,
        choices=None if choices is COMPUTED else tuple(choices),
        least=metadata.get("least"),
    )


def _default(options: dict[str | None, ast.expr]) -> Any:
    if "default" in options:
        return _literal(options["default"])
    factory = options.get("default_factory")
    if factory is None:
        return REQUIRED
    if isinstance(factory, ast.Lambda):
        return _literal(factory.body)
    empty = {"list": [], "dict": {}}
    return empty.get(ast.unparse(factory), COMPUTED)


def _metadata(node: ast.expr | None) -> dict[str, Any]:
    if not isinstance(node, ast.Dict):
        return {}
    pairs = zip(node.keys, node.values, strict=True)
    return {_literal(key): _literal(value) for key, value in pairs if key is not None}


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and ast.unparse(node) in ("float('inf')", "float('-inf')"):
        return float(ast.literal_eval(node.args[0]))
    try:
        return ast.literal_eval(node)
    except ValueError:
        return COMPUTED


def _types_of(source: Source, cls: ast.ClassDef) -> dict[str, tuple[Any, bool]]:
    fields = _fields(source, cls)
    return {name: (field.type, field.default is REQUIRED) for name, field in fields.items()}
