"""One YAML file to entries that remember their lines; and the writer that reads back the same."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trl_ext.recipe.findings import Finding, Origin
from trl_ext.recipe.yaml_loader import FIRST, RESOLVERS, Loader, Unfit


class _Dumper(yaml.SafeDumper):
    """Quotes whatever text either our reader or PyYAML would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML writes Unicode's line breaks as they are, and reads them back as spaces.
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _represent_text)

for _tag, _pattern in RESOLVERS:
    _Dumper.add_implicit_resolver(_tag, _pattern, list(FIRST))


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
        loader = Loader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
    except UNREADABLE as error:
        findings.append(unreadable(error, name))
        return {}
    if root is None:
        findings.append(Finding(origin, "", "the file is empty; a recipe is lines 'key: value'"))
        return {}
    if not isinstance(root, yaml.MappingNode):
        kind = "list" if isinstance(root, yaml.SequenceNode) else "single value"
        message = f"the top level is a {kind}; a recipe is lines 'key: value'"
        findings.append(Finding(_at(name, root), "", message))
        return {}
    _find_duplicates(root, name, "", findings, set())
    try:
        return _entries(loader, root, name, findings)
    except yaml.YAMLError as error:
        findings.append(unreadable(error, name))
        return {}


def compose(text: str) -> yaml.Node | None:
    """The nodes of a file with their places in it.

    Raises:
        yaml.YAMLError: if it is not YAML that a recipe can hold.
    """
    return Loader(text).get_single_node()


def _entries(loader: Loader, root: yaml.MappingNode, name: str, findings: list[Finding]) -> Entries:
    loader.flatten_mapping(root)
    entries = {}
    for key_node, node in root.value:
        key, origin = str(key_node.value), _at(name, key_node)
        if key == "env":
            entries |= _env_entries(node, name, findings)
        else:
            try:
                entries[key] = Entry(loader.construct_object(node, deep=True), origin, _text(node))
            except yaml.MarkedYAMLError as error:
                findings.append(unreadable(error, name, key))
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
        loader = Loader(text)
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


UNREADABLE = (OSError, yaml.YAMLError, UnicodeDecodeError)


def unreadable(error: Exception, name: str, key: str = "") -> Finding:
    """What an `UNREADABLE` error says of a file, or of one key in it."""
    if isinstance(error, OSError):
        return Finding(Origin(name), key, f"cannot be read: {error.strerror}")
    if isinstance(error, UnicodeDecodeError | yaml.reader.ReaderError):
        return Finding(Origin(name), key, f"this is not a text file in UTF-8: {error.reason}")
    mark = getattr(error, "problem_mark", None)
    reason = getattr(error, "problem", None) or str(error)
    origin = Origin(name, None if mark is None else mark.line + 1)
    known = isinstance(error, Unfit) or key
    return Finding(origin, key, reason if known else f"this is not valid YAML: {reason}")


def _find_duplicates(
    node: yaml.Node, name: str, prefix: str, findings: list[Finding], seen: set[int]
) -> None:
    if id(node) in seen:  # an alias: many of them, nested, would take for ever
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _find_duplicates(item, name, f"{prefix}[{index}]", findings, seen)
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
        _find_duplicates(value_node, name, dotted, findings, seen)
