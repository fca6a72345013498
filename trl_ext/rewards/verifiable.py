"""Rewards that a program can verify: 1 or 0, the same each time."""

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from trl_ext.errors import ConfigError, MissingDependencyError, RewardError
from trl_ext.rewards.reading import completion_text

DELIMITED = re.compile(r"\$|\\\(|\\\[|\\boxed|\\begin")


class MathVerify:
    """1 where the last answer in a completion is mathematically the one in a column, else 0.

    Source: Kydlíček, Math-Verify. It reads numbers, LaTeX and plain expressions, and compares with
    sympy: 1/2, 0.5 and \\frac{1}{2} are one answer. An answer of the dataset that cannot be read
    gives None, "does not apply". What a policy writes may keep sympy busy for hours, so that this
    reward is `isolated` unless its entry says otherwise.

    Args:
        reference: the dataset's column with the answer alone; LaTeX may stand without $.

    Raises:
        MissingDependencyError: without the package math-verify.
    """

    isolated: ClassVar[bool] = True  # what build_rewards looks at

    def __init__(self, reference: str = "answer"):
        try:
            import math_verify
        except ImportError as error:
            raise MissingDependencyError(
                "The reward 'math_verify' needs the package math-verify: pip install "
                "'trl-ext[verify]'."
            ) from error
        for module in ("parser", "grader"):  # they warn of the time limits switched off below
            logging.getLogger(f"math_verify.{module}").setLevel(logging.ERROR)
        self.__name__ = "math_verify"
        self.reference = reference
        self._parse, self._verify = math_verify.parse, math_verify.verify
        self._score(r"\frac{1}{2}", "1/2")  # builds the grammar, which is no sample's time to spend

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """As TRL calls a reward function.

        Raises:
            RewardError: if the column is not there.
        """
        rights = _column(columns, self.reference, self.__name__)
        return [
            self._score(completion_text(completion), str(right))
            for completion, right in zip(completions, rights, strict=True)
        ]

    def _score(self, said: str, right: str) -> float | None:
        # Without a delimiter only the first number of "2\\sqrt{3}" would be read.
        gold = self._read(right if DELIMITED.search(right) else f"${right}$") or self._read(right)
        if not gold:
            return None
        return float(self._verify(gold, self._read(said), timeout_seconds=None))

    def _read(self, text: str) -> list:
        # Its own time limit takes SIGALRM, which is that of `reward_timeout`.
        return self._parse(text, parsing_timeout=None)  # type: ignore[arg-type]


def regex_match(
    pattern: str,
    how: Literal["search", "full"] = "search",
    group: int | str | None = None,
    reference: str | None = None,
) -> Callable[..., list[float]]:
    """A reward function: 1 where a regular expression matches a completion, else 0.

    Some patterns take exponential time on some texts; `isolated: true` and `timeout` bound it.

    Args:
        pattern: of Python's `re`; flags go inside, such as (?is).
        how: "search" for the first match anywhere, "full" for one of the whole text.
        group: number or name of a group that must also equal the column `reference`, white space
            around both ignored.
        reference: the dataset's column for `group`.

    Raises:
        ConfigError: if the pattern is none, has no such group, or only one of group and reference
            is given.
    """
    compiled = _compiled(pattern)
    if (group is None) != (reference is None):
        raise ConfigError(
            f"regex_match: group is {group!r} and reference {reference!r}; give both, to compare "
            "a group with a column, or neither."
        )
    if group is not None and not _has_group(compiled, group):
        raise ConfigError(
            f"regex_match: the pattern {pattern!r} has no group {group!r}. It has "
            f"{compiled.groups} groups, with the names {sorted(compiled.groupindex) or 'none'}."
        )

    def reward(completions: Sequence[Any], **columns: Any) -> list[float]:
        find = compiled.search if how == "search" else compiled.fullmatch
        matches = [find(completion_text(completion)) for completion in completions]
        if group is None or reference is None:
            return [float(match is not None) for match in matches]
        rights = _column(columns, reference, "regex_match")
        return [
            float(match is not None and (match[group] or "").strip() == str(right).strip())
            for match, right in zip(matches, rights, strict=True)
        ]

    reward.__name__ = "regex_match"
    return reward


def json_schema(schema: Mapping[str, Any] | bool) -> Callable[..., list[float]]:
    """A reward function: 1 where a completion is JSON that satisfies a schema, else 0.

    The whole completion must be one JSON text (RFC 8259: no NaN, no code fence around it).

    Args:
        schema: JSON Schema, written out; `$schema` says of which draft, and the newest is meant
            without. Nothing is fetched: a `$ref` must point into the schema.

    Raises:
        ConfigError: if it is no schema, or refers to what is not in it.
        MissingDependencyError: without the package jsonschema.
    """
    validator = _validator(schema)

    def reward(completions: Sequence[Any], **columns: Any) -> list[float]:
        return [
            float(_satisfies(completion_text(completion), validator)) for completion in completions
        ]

    reward.__name__ = "json_schema"
    return reward


def _satisfies(text: str, validator: Any) -> bool:
    try:
        return validator.is_valid(json.loads(text, parse_constant=_no_constant))
    except (ValueError, RecursionError, OverflowError):
        # No JSON; nested deeper, or with larger numbers, than Python takes. All are the text's.
        return False


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _validator(schema: Any) -> Any:
    try:
        import jsonschema
        import referencing
        from jsonschema.validators import validator_for
    except ImportError as error:
        raise MissingDependencyError(
            "The reward 'json_schema' needs the package jsonschema: pip install 'trl-ext[verify]'."
        ) from error
    if not isinstance(schema, Mapping | bool):
        raise ConfigError(f"json_schema: schema is {schema!r}; it must be a mapping, or true.")
    kind: Any = validator_for(schema)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        place = "/".join(map(str, error.absolute_path)) or "the top"
        raise ConfigError(f"json_schema: no JSON Schema, at {place}: {error.message}.") from error
    if isinstance(schema, Mapping):
        _check_references(schema, kind)
    return kind(schema, registry=referencing.Registry())  # an empty registry fetches nothing


def _check_references(schema: Any, kind: Any) -> None:
    """Look each `$ref` up in the schema: at a completion it would be too late."""
    from referencing import Registry, Resource, exceptions
    from referencing.jsonschema import specification_with

    specification = specification_with(kind.META_SCHEMA["$schema"])
    resource = Resource.from_contents(schema, default_specification=specification)
    base = resource.id() or ""
    resolver = Registry().with_resource(base, resource).resolver(base)
    for target in _references(schema):
        try:
            resolver.lookup(target)
        except exceptions.Unresolvable as error:
            raise ConfigError(
                f"json_schema: the schema refers to {target!r}, which is not in it. Write it into "
                "the schema under $defs, and refer to '#/$defs/name'."
            ) from error


def _references(part: Any) -> Iterator[str]:
    if isinstance(part, Mapping):
        if isinstance(part.get("$ref"), str):
            yield part["$ref"]
        part = list(part.values())
    for inner in part if isinstance(part, list) else []:
        yield from _references(inner)


def _compiled(pattern: Any) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise ConfigError(f"regex_match: {pattern!r} is no regular expression: {error}.") from error


def _has_group(compiled: re.Pattern[str], group: Any) -> bool:
    if isinstance(group, int) and not isinstance(group, bool):
        return 0 <= group <= compiled.groups
    return isinstance(group, str) and group in compiled.groupindex


def _column(columns: Mapping[str, Any], name: str, reward: str) -> Sequence[Any]:
    if columns.get(name) is None:
        raise RewardError(
            f"The reward {reward!r} needs the dataset's column {name!r}, and there is none. Name "
            "another: reference."
        )
    return columns[name]
