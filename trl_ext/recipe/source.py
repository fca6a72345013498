"""Finding a class by reading Python source, so that checking a recipe imports nothing.

Only the top-level package is located by Python itself, which does not run it; everything below is
a path. Imports are followed by name, through re-exports and `if TYPE_CHECKING:` blocks.
"""

import ast
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from trl_ext.errors import PluginError


@dataclass(frozen=True, eq=False)
class Source:
    """The parsed text of one module."""

    module: str
    path: Path
    tree: ast.Module

    @property
    def package(self) -> str:
        """The package that relative imports in this module start from."""
        is_package = self.path.name == "__init__.py"
        return self.module if is_package else self.module.rpartition(".")[0]


Found = tuple[Source, ast.ClassDef]


@cache
def load_source(module: str) -> Source | None:
    """Parse a module, or return None where it has no Python source.

    Raises:
        PluginError: if its source is not Python.
    """
    path = _module_path(module)
    if path is None:
        return None
    try:
        return Source(module, path, ast.parse(path.read_bytes(), str(path)))
    except SyntaxError as error:
        raise PluginError(f"{path}:{error.lineno}: this is not Python: {error.msg}.") from error


def _module_path(module: str) -> Path | None:
    top, *below = module.split(".")
    if top in sys.stdlib_module_names:
        return None
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # a half-made module such as __main__ has no spec
        return None
    if spec is None:
        return None
    if spec.submodule_search_locations is None:
        bases = [] if below or spec.origin is None else [Path(spec.origin).with_suffix("")]
    else:
        bases = [Path(place, *below) for place in spec.submodule_search_locations]
    files = [file for base in bases for file in (base / "__init__.py", base.with_suffix(".py"))]
    return next((file for file in files if file.is_file()), None)


def find_class(module: str, name: str) -> Found | None:
    """The class that `name` means in `module`, with the source that defines it."""
    return _find(module, name, set())


def find_expression(source: Source, node: ast.expr) -> Found | None:
    """The class that a name or a dotted name means in a module."""
    if isinstance(node, ast.Name):
        return find_class(source.module, node.id)
    if isinstance(node, ast.Attribute):
        module = _module_meant(source, ast.unparse(node.value))
        return find_class(module, node.attr) if module else None
    return None


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module, including those under `if` and `try`."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from statements(node.body)
            yield from statements(node.orelse)
        if isinstance(node, ast.Try):
            for handler in node.handlers:
                yield from statements(handler.body)


def _find(module: str, name: str, seen: set[tuple[str, str]]) -> Found | None:
    source = load_source(module)
    if source is None or (module, name) in seen:
        return None
    seen.add((module, name))  # modules that re-export each other's names
    imports = []
    for node in statements(source.tree.body):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return source, node
        if isinstance(node, ast.ImportFrom):
            imports.append(node)
    # Star imports last: transformers has hundreds of them.
    for original_of in (_imported_as, _starred):
        for node in imports:
            original = original_of(node, name)
            found = original and _find(_absolute(source, node), original, seen)
            if found:
                return found
    return None


def _imported_as(node: ast.ImportFrom, name: str) -> str | None:
    names = (alias.name for alias in node.names if (alias.asname or alias.name) == name)
    return next(names, None)


def _starred(node: ast.ImportFrom, name: str) -> str | None:
    return name if node.names[0].name == "*" else None


def _absolute(source: Source, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = source.package.split(".")
    base = parts[: len(parts) - node.level + 1]
    return ".".join([*base, node.module] if node.module else base)


def _module_meant(source: Source, dotted: str) -> str | None:
    """The module that `dotted` means here, after `import a.b as c` or `from a import b`."""
    head, _, rest = dotted.partition(".")
    for node in statements(source.tree.body):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname == head:
                    return ".".join(filter(None, [alias.name, rest]))
                if alias.asname is None and alias.name.partition(".")[0] == head:
                    return dotted
        elif isinstance(node, ast.ImportFrom):
            original = _imported_as(node, head)
            if original:
                return ".".join(filter(None, [_absolute(source, node), original, rest]))
    return None
