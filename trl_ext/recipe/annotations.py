"""Annotation text to a type that pydantic checks, without importing what the text names.

An enum becomes the literal values it lists, a dataclass a mapping with its fields, and a name that
cannot be resolved from source is left to the class itself, which judges it when it is built.
"""

import ast
import types
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import or_
from typing import Any, Literal, NotRequired, Union, get_args, get_origin

from typing_extensions import TypedDict, is_typeddict

from trl_ext.recipe.source import Source, find_expression, statements

_NAMES: dict[str, Any] = {
    "Any": Any, "object": Any, "None": None, "str": str, "int": int, "float": float, "bool": bool,
    "list": list, "List": list, "dict": dict, "Dict": dict, "Mapping": Mapping,
    "Sequence": Sequence, "tuple": list, "set": list, "Path": str, "PathLike": str,
}  # fmt: skip  # YAML has no tuples, sets or paths

# Turns a dataclass found in source into {field name: (type, required)}; schema.py gives it, since
# the fields of a class have types and the types may name classes.
FieldsOf = Callable[[Source, ast.ClassDef], dict[str, tuple[Any, bool]]]


def build_type(source: Source, node: ast.expr, fields_of: FieldsOf) -> Any:
    """The type that an annotation in `source` stands for."""

    def build(part: ast.expr) -> Any:
        return build_type(source, part, fields_of)

    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            return build(ast.parse(node.value, mode="eval").body)
        return node.value
    if isinstance(node, ast.BinOp):
        return _union([build(node.left), build(node.right)])
    if isinstance(node, ast.Subscript):
        return _subscript(node, build)
    name = node.attr if isinstance(node, ast.Attribute) else ast.unparse(node)
    return _NAMES[name] if name in _NAMES else _named(source, node, fields_of)


def _subscript(node: ast.Subscript, build: Callable[[ast.expr], Any]) -> Any:
    outer = ast.unparse(node.value).rpartition(".")[2]
    inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if outer == "Literal":
        return Literal[tuple(ast.literal_eval(part) for part in inner)]
    if outer == "Optional":
        return _union([build(inner[0]), None])
    if outer == "Union":
        return _union([build(part) for part in inner])
    if outer in ("Annotated", "Final"):
        return build(inner[0])
    generic = _NAMES.get(outer, Any)
    if generic is dict or generic is Mapping:
        return dict[finish(build(inner[0])), finish(build(inner[1]))]
    return list[finish(build(inner[0]))] if generic in (list, Sequence) else Any


def _union(members: list[Any]) -> Any:
    """`Enum | str` means the enum's values: transformers writes it so and converts the text."""
    flat = [part for member in members for part in alternatives(member)]
    has_enum = any(isinstance(part, _EnumValues) for part in flat)
    kept = [part for part in flat if not (has_enum and part is str)]
    return reduce(or_, [finish(part) for part in kept])


class _EnumValues:
    """The values of an enum, until it is known whether `str` stands beside it."""

    def __init__(self, values: list[Any]):
        self.literal = Literal[tuple(values)]


def _named(source: Source, node: ast.expr, fields_of: FieldsOf) -> Any:
    found = find_expression(source, node)
    if found is None:
        value = _assigned(source, ast.unparse(node))
        return Any if value is None else build_type(source, value, fields_of)
    home, cls = found
    if any(ast.unparse(base).endswith("Enum") for base in cls.bases):
        return _EnumValues(_enum_values(cls))
    if is_dataclass(cls):
        return _mapping_type(cls.name, fields_of(home, cls))
    return Any


def _assigned(source: Source, name: str) -> ast.expr | None:
    """The right-hand side of `Name = Literal[...]` at the top of a module."""
    for node in statements(source.tree.body):
        if isinstance(node, ast.Assign) and any(ast.unparse(x) == name for x in node.targets):
            return node.value if isinstance(node.value, ast.Subscript | ast.BinOp) else None
    return None


def _enum_values(cls: ast.ClassDef) -> list[Any]:
    values = [node.value for node in cls.body if isinstance(node, ast.Assign)]
    return [value.value for value in values if isinstance(value, ast.Constant)]


def is_dataclass(cls: ast.ClassDef) -> bool:
    """Whether a class is decorated with `dataclass`, with or without arguments."""
    return any("dataclass" in ast.unparse(decorator) for decorator in cls.decorator_list)


def _mapping_type(name: str, fields: dict[str, tuple[Any, bool]]) -> Any:
    entries = {
        key: kind if required else NotRequired[kind] for key, (kind, required) in fields.items()
    }
    mapping = TypedDict(name, entries)  # type: ignore[misc]
    mapping.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]
    return mapping


def finish(kind: Any) -> Any:
    """A type that stood alone as an enum becomes its literal values."""
    return kind.literal if isinstance(kind, _EnumValues) else kind


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    is_union = get_origin(kind) in (Union, types.UnionType)
    return get_args(kind) if is_union else (type(None) if kind is None else kind,)


def with_choices(kind: Any, choices: Sequence[Any]) -> Any:
    """The type narrowed to `choices`, in a list too; null stays allowed where it was."""
    allowed: Any = Literal[tuple(choices)]
    if any(get_origin(part) is list for part in alternatives(kind)):
        allowed = list[allowed]
    return allowed | None if type(None) in alternatives(kind) else allowed


def literals(kind: Any) -> list[Any]:
    """Every literal value that a type lists."""
    parts = [part for part in alternatives(kind) if get_origin(part) in (Literal, list)]
    nested = [literals(x) for part in parts for x in get_args(part) if get_origin(part) is list]
    own = [value for part in parts if get_origin(part) is Literal for value in get_args(part)]
    return own + [value for group in nested for value in group]


def describe(kind: Any) -> str:
    """A type in words for someone who writes YAML."""
    return " or ".join(_describe_one(part) for part in alternatives(kind))


_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
    type(None): "null",
    Any: "anything",
}


def _describe_one(kind: Any) -> str:
    origin = get_origin(kind)
    if origin is Literal:
        values = get_args(kind)
        listed = ", ".join(
            str(value).lower() if value in (True, False) else str(value) for value in values
        )
        return listed if len(values) == 1 else f"one of {listed}"
    if origin is list:
        return f"a list of {{{describe(get_args(kind)[0])}}}"
    if is_typeddict(kind):
        return f"a mapping with the keys {', '.join(kind.__annotations__)}"
    return _WORDS.get(origin or kind, "a mapping" if origin is dict else str(kind))
