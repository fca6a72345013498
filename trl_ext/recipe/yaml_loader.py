"""PyYAML's safe loader with the scalars of YAML 1.2, and an error for every value it cannot make.

Scalars follow YAML 1.2 where PyYAML's 1.1 is a trap: `1e-5` is a number, `010` is ten, and neither
`1:30` nor `2024-01-01` turns into something else than its text. `yes`, `no`, `on` and `off` stay
booleans, as TRL reads them; values.py takes them as words where a field wants the word.
"""

import re
from typing import Any

import yaml

from trl_ext.recipe.findings import show_value

_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_TRAPS = {_INT, _FLOAT, "tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:value"}
RESOLVERS = [
    (_INT, re.compile(r"[-+]?([0-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+)$")),
    (
        _FLOAT,
        re.compile(
            r"([-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?"
            r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
        ),
    ),
]
FIRST = "-+.0123456789"  # characters that a number may start with
_DEEPEST = 50  # levels: far more than a recipe has, far fewer than Python's stack
_LONGEST_NUMBER = 200  # characters: what fits into a float; Python refuses to print far longer ones


class Unfit(yaml.MarkedYAMLError):
    """Valid YAML that no recipe can hold."""


class Loader(yaml.SafeLoader):
    """Reads what a recipe can hold.

    PyYAML itself recurses until Python stops it, and lets the errors of `int` and `float` escape.
    """

    def __init__(self, text: str):
        super().__init__(text)
        self._above: list[yaml.Node | None] = []  # what holds the node that is read

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Read one node, and refuse one that is too deep or that holds itself."""
        event = self.peek_event()
        self._above.append(parent)
        if len(self._above) > _DEEPEST:
            raise _refused(f"nested more than {_DEEPEST} deep", event)
        node = super().compose_node(parent, index)
        if any(node is holder for holder in self._above):
            raise _refused(f"*{event.anchor} stands for what it is itself a part of", event)
        self._above.pop()
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node, or ConstructorError."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, IndexError) as error:
            kind = node.tag.rpartition(":")[2]
            problem = f"{show_value(node.value)} cannot be read as !!{kind}"
            raise yaml.constructor.ConstructorError(
                problem=problem, problem_mark=node.start_mark
            ) from error


def _refused(problem: str, event: Any) -> Unfit:
    return Unfit(problem=problem, problem_mark=event.start_mark)


# Without dates, sets and bytes: no field takes them, and JSON has no way to write them.
Loader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in ("null", "bool", "float", "str", "seq", "map")
}
Loader.yaml_implicit_resolvers = {
    first: [rule for rule in rules if rule[0] not in _TRAPS]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}

for _tag, _pattern in RESOLVERS:
    Loader.add_implicit_resolver(_tag, _pattern, list(FIRST))


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    if len(text) > _LONGEST_NUMBER:
        raise ValueError(f"an integer of {len(text)} characters")
    return int(text, 0 if re.match(r"[-+]?0[xob]", text) else 10)


Loader.add_constructor(_INT, _construct_int)
