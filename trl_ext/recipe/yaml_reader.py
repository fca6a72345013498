"""One YAML file to entries that remember their lines; and the writer that reads back the same.

Scalars follow YAML 1.2 where PyYAML's 1.1 is a trap: `1e-5` is a number, `010` is ten, and neither
`1:30` nor `2024-01-01` turns into something else than its text. `yes`, `no`, `on` and `off` stay
booleans, as TRL reads them; check.py takes them as words where a field wants the word.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trl_ext.recipe.findings import Finding, Origin

_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_TRAPS = {_INT, _FLOAT, "tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:value"}
_RESOLVERS = [
    (_INT, re.compile(r"[-+]?([0-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+)$")),
    (
        _FLOAT,
        re.compile(
            r"([-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?"
            r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
        ),
    ),
]


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the resolvers above in place of its own."""


_Loader.yaml_implicit_resolvers = {
    first: [rule for rule in rules if rule[0] not in _TRAPS]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """Quotes whatever text either our reader or PyYAML would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML writes Unicode's line breaks as they are, and reads them back as spaces.
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _represent_text)

for _tag, _pattern in _RESOLVERS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, _pattern, list("-+.0123456789"))


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    return int(text, 0 if re.match(r"[-+]?0[xob]", text) else 10)


_Loader.add_constructor(_INT, _construct_int)


@dataclass(frozen=True)
class Entry:
    """A value, where it was written, and its text if it was written as one unquoted word."""

    value: Any
    origin: Origin
    text: str | None = None


Entries = dict[str, Entry]


def read_yaml(path: Path, name: str, findings: list[Finding]) -> Entries:
    """The top-level keys of a file; what is wrong with it is appended to `findings`.

    The keys under `env` become `env.NAME`, with their text as value.
    """
    origin = Origin(name)
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        findings.append(_unreadable(error, name))
        return {}
    if root is None:
        findings.append(Finding(origin, "", "the file is empty; a recipe is lines 'key: value'"))
        return {}
    if not isinstance(root, yaml.MappingNode):
        kind = "list" if isinstance(root, yaml.SequenceNode) else "single value"
        message = f"the top level is a {kind}; a recipe is lines 'key: value'"
        findings.append(Finding(_at(name, root), "", message))
        return {}
    _find_duplicates(root, name, "", findings)
    try:
        return _entries(loader, root, name, findings)
    except yaml.YAMLError as error:
        findings.append(_unreadable(error, name))
        return {}


def _entries(
    loader: _Loader, root: yaml.MappingNode, name: str, findings: list[Finding]
) -> Entries:
    loader.flatten_mapping(root)
    entries = {}
    for key_node, node in root.value:
        key, origin = str(key_node.value), _at(name, key_node)
        if key == "env":
            entries |= _env_entries(node, name, findings)
        else:
            entries[key] = Entry(loader.construct_object(node, deep=True), origin, _text(node))
    return entries


def _env_entries(node: yaml.Node, name: str, findings: list[Finding]) -> Entries:
    pairs = node.value if isinstance(node, yaml.MappingNode) else None
    if pairs is None or not all(isinstance(value, yaml.ScalarNode) for _, value in pairs):
        message = "env is a mapping of environment variables to single values"
        findings.append(Finding(_at(name, node), "env", message))
        return {}
    return {f"env.{key.value}": Entry(value.value, _at(name, key)) for key, value in pairs}


def read_scalar(text: str, origin: Origin) -> Entry:
    """A value from the command line, as YAML where it is YAML and as text otherwise."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        value = None if node is None else loader.construct_document(node)
    except yaml.YAMLError:
        return Entry(text, origin)
    quoted = isinstance(node, yaml.ScalarNode) and node.style is not None
    return Entry(value, origin, None if quoted else text)


def write_yaml(values: dict[str, Any]) -> str:
    """YAML that `read_yaml` (and PyYAML) reads back to the same values; a scalar is one line."""
    return yaml.dump(
        values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=float("inf")
    )


def _text(node: yaml.Node) -> str | None:
    return node.value if isinstance(node, yaml.ScalarNode) and node.style is None else None


def _at(name: str, node: yaml.Node) -> Origin:
    return Origin(name, node.start_mark.line + 1)


def _unreadable(error: Exception, name: str) -> Finding:
    if isinstance(error, OSError):
        return Finding(Origin(name), "", f"cannot be read: {error.strerror}")
    mark = getattr(error, "problem_mark", None)
    reason = getattr(error, "problem", None) or str(error)
    origin = Origin(name, None if mark is None else mark.line + 1)
    return Finding(origin, "", f"this is not valid YAML: {reason}")


def _find_duplicates(node: yaml.Node, name: str, prefix: str, findings: list[Finding]) -> None:
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _find_duplicates(item, name, f"{prefix}[{index}]", findings)
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[str, int] = {}
    for key_node, value_node in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        dotted = f"{prefix}.{key}" if prefix else key
        if key in first:
            message = f"duplicate key, on lines {first[key]} and {line}; keep one"
            findings.append(Finding(Origin(name, line), dotted, message))
        first.setdefault(key, line)
        _find_duplicates(value_node, name, dotted, findings)
