"""One value against the type of its field: the converted value, or what is wrong with it."""

from collections.abc import Iterator
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import is_typeddict

from trl_ext.recipe.annotations import alternatives, describe, literals
from trl_ext.recipe.findings import COMMAND_LINE, did_you_mean, show_value
from trl_ext.recipe.ranges import allowed_instead
from trl_ext.recipe.schema import Field
from trl_ext.recipe.yaml_reader import Entry, read_scalar

_WORDS_FOR_BOOLEANS = ("yes", "no", "on", "off", "y", "n")


class WrongValue(ValueError):
    """The value does not fit; the message says what does. Never leaves this package."""


def convert(field: Field, entry: Entry) -> Any:
    """The entry's value as the field takes it.

    Raises:
        WrongValue: if no reading of the entry fits.
    """
    adapter = _adapter(field.type)
    problems = []
    for value in _readings(field, entry):
        try:
            return adapter.validate_python(value, strict=True)
        except ValidationError as error:
            problems.append(error)
    raise WrongValue(_message(field, entry.value, problems[0]))


def takes_null(field: Field) -> bool:
    """Whether the field may be left empty."""
    return type(None) in alternatives(field.type)


def _fits(field: Field, value: Any) -> bool:
    try:
        _adapter(field.type).validate_python(value, strict=True)
    except ValidationError:
        return False
    return allowed_instead(field.name, value) is None


def _adapter(kind: Any) -> TypeAdapter:
    # A mapping type brings its own configuration, and pydantic wants only one.
    config = None if is_typeddict(kind) else ConfigDict(arbitrary_types_allowed=True)
    return TypeAdapter(kind, config=config)


def _readings(field: Field, entry: Entry) -> Iterator[Any]:
    """What an entry may mean, the likeliest first.

    - `save_strategy: no`: YAML reads a boolean where the field lists the word.
    - On a command line everything is text, and quoting is awkward.
    - A single word for a list, as TRL's own command line takes it.
    """
    yield entry.value
    if entry.text is not None:
        is_word = entry.text.lower() in _WORDS_FOR_BOOLEANS and entry.text in literals(field.type)
        if is_word or entry.origin == COMMAND_LINE:
            yield entry.text
    if not isinstance(entry.value, list | dict | None):
        yield [entry.value]


def _message(field: Field, value: Any, error: ValidationError) -> str:
    text = f"got {show_value(value)}; allowed: {describe(field.type)}."
    if isinstance(value, list | dict):
        # The deepest problem, and an unknown key before the one that is missing in its stead.
        inner = max(error.errors(), key=lambda x: (len(x["loc"]), x["type"] == "extra_forbidden"))
        place = _place(value, inner["loc"])
        reason = {"extra_forbidden": "unknown key"}.get(inner["type"], inner["msg"].lower())
        text += f" Wrong at {place}: {reason}." if place else ""
    return text + _hint(field, value)


def _place(value: Any, location: tuple[int | str, ...]) -> str:
    """Pydantic's location without the names of union members that it puts in between."""
    place = ""
    for part in location:
        if isinstance(value, dict) and part in value:
            value, place = value[part], f"{place}.{part}"
        elif isinstance(value, list) and isinstance(part, int):
            value, place = value[part], f"{place}[{part}]"
    return place.removeprefix(".")


def _hint(field: Field, value: Any) -> str:
    allowed = set(alternatives(field.type))
    if isinstance(value, str):
        word = value.strip("+-").lower()
        if word in ("inf", "nan") and _fits(field, float(value)):
            return f" Write {value[: -len(word)]}.{word}."
        if _is_number(value) and _fits(field, read_scalar(value, COMMAND_LINE).value):
            return " Write it without quotes."
        return did_you_mean(value, [word for word in literals(field.type) if isinstance(word, str)])
    if isinstance(value, bool) and str in allowed:
        return f' If the word is meant, write it in quotes: "{show_value(value)}".'
    if isinstance(value, int | float) and str in allowed:
        return f' If text is meant, write it in quotes: "{value}".'
    if isinstance(value, float) and value.is_integer() and _fits(field, int(value)):
        return f" Write {int(value)}."
    if isinstance(value, list) and len(value) == 1 and _fits(field, value[0]):
        return f" Write {show_value(value[0])}, without brackets."
    return ""


def _is_number(text: str) -> bool:
    value = read_scalar(text, COMMAND_LINE).value
    return isinstance(value, int | float) and not isinstance(value, bool)
