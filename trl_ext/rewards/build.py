"""The `reward_funcs` of a recipe as callables."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args, get_origin

from trl_ext.errors import ConfigError, RewardError, TrlExtError
from trl_ext.registry import REWARDS
from trl_ext.rewards.guard import FAILURES, raised
from trl_ext.rewards.isolated import OPTIONS, IsolatedReward, check_options

Entry = str | Mapping[str, Any]

# Modules of rewards that are made in an instant, and open nothing.
_LIGHT = tuple(
    f"trl_ext.rewards.{name}:" for name in ("exact_match", "reasoning_gym", "vader", "verifiable")
)
_BESIDES = f"Any reward also takes isolated, and with isolated: true {' and '.join(OPTIONS)}."


def build_rewards(entries: Sequence[Entry]) -> list[Callable[..., Any]]:
    """One callable an entry, in order.

    An entry is a name that the registry knows, `evaluate:NAME`, `package.module:object`, or a
    mapping with `name` and arguments. What the name stands for is a reward function if it takes
    `completions`, and gets the arguments with each call; otherwise it is a factory, and is called
    with them here.

    `isolated: true` among the arguments runs either in a process of its own, with `timeout` seconds
    a completion and `failure_reward` for one that breaks it (`IsolatedReward`). A reward with an
    attribute `isolated` that is true runs so unless the entry says `isolated: false`.

    Raises:
        ConfigError: if an option of isolation is wrong.
        RewardError: if an entry is neither, the arguments do not fit, or a factory raises; with
            the signature. A factory's own `TrlExtError` is raised as it is.
        UnknownNameError: if nothing has that name.
        PluginError: if it cannot be imported.
    """
    return [_build(entry) for entry in entries]


def unfit_arguments(entries: Sequence[Entry]) -> list[str]:
    """What `build_rewards` would say of the verifiable rewards among `entries`; members too.

    A user's own module is not imported, no model opened and no process started.
    """
    found = []
    for entry in entries:
        name, arguments = _read(entry)
        found += unfit_arguments(arguments.get("members") or [])
        if REWARDS.resolve(name).startswith(_LIGHT):
            try:
                if _is_isolated(name, arguments):
                    options = {key: arguments.pop(key) for key in OPTIONS if key in arguments}
                    check_options(name, **options)
                _build({"name": name, **arguments, "isolated": False})
            except TrlExtError as error:
                found.append(str(error))
    return found


def _build(entry: Entry) -> Callable[..., Any]:
    name, arguments = _read(entry)
    if _is_isolated(name, arguments):
        options = {key: arguments.pop(key) for key in OPTIONS if key in arguments}
        return IsolatedReward({"name": name, **arguments}, **options)
    loaded = REWARDS.load(name)
    arguments = _with_metric(name, arguments)
    if not callable(loaded):
        raise RewardError(
            f"The reward {name!r} is a {type(loaded).__name__}, not a function; {_must_be()}."
        )
    if _takes_completions(loaded, name):
        return _with_arguments(loaded, name, arguments)
    _check_arguments(loaded, name, arguments)
    _check_choices(loaded, name, arguments)
    made = _made(loaded, name, arguments)
    if not callable(made):
        raise RewardError(
            f"The reward {name!r} takes no argument called completions, so it was called as a "
            f"factory, {_signature(loaded)}, and gave {made!r}; {_must_be()}."
        )
    return made


def _read(entry: Entry) -> tuple[str, dict[str, Any]]:
    if isinstance(entry, str):
        return entry, {}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        raise RewardError(
            f"The reward entry {entry!r} is neither a name nor a mapping with the key 'name'. "
            "Write `- exact_match` or `- {name: reasoning_gym, reader: lenient}`."
        )
    return entry["name"], {key: value for key, value in entry.items() if key != "name"}


def _with_metric(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `evaluate:NAME`, which says the metric itself."""
    if not name.startswith("evaluate:"):
        return arguments
    if "metric" in arguments:
        raise RewardError(f"The reward {name!r} has a metric already. Remove the argument metric.")
    return {"metric": name.removeprefix("evaluate:"), **arguments}


def _is_isolated(name: str, arguments: dict[str, Any]) -> bool:
    """Whether it runs in a process of its own. What says so itself is not imported here."""
    if "isolated" not in arguments:
        return getattr(REWARDS.load(name), "isolated", False) is True
    isolated = arguments.pop("isolated")
    if not isinstance(isolated, bool):
        raise ConfigError(
            f"The reward {name!r}: isolated is {isolated!r}; it must be true or false."
        )
    return isolated


def _with_arguments(
    function: Callable[..., Any], name: str, arguments: dict[str, Any]
) -> Callable[..., Any]:
    if not arguments:
        return function
    _check_names(function, name, arguments)
    _check_choices(function, name, arguments)
    # TRL and `guarded` look through a partial for the name and for async functions.
    bound = partial(function, **arguments)
    bound.__name__ = getattr(function, "__name__", name)  # type: ignore[attr-defined]
    return bound


def _takes_completions(function: Callable[..., Any], name: str) -> bool:
    """Whether this is a reward function; a class is a factory whatever its __init__ takes."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError as error:  # some built-in functions
        raise RewardError(
            f"The reward {name!r} does not say which arguments it takes; {_must_be()}."
        ) from error
    if inspect.isclass(function):
        return False
    return any(p.name == "completions" or p.kind is p.VAR_KEYWORD for p in parameters)


def _check_names(function: Callable[..., Any], name: str, arguments: dict[str, Any]) -> None:
    """Refuse misspelt arguments: `**kwargs`, which TRL's columns need, would swallow them."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    known = {parameter.name for parameter in parameters if parameter.kind in named}
    unknown = [key for key in arguments if key not in known]
    if unknown:
        raise RewardError(
            f"The reward {name!r} has no argument {', '.join(map(repr, unknown))}. "
            f"Its signature: {_signature(function)}. {_BESIDES}"
        )


def _check_choices(function: Callable[..., Any], name: str, arguments: dict[str, Any]) -> None:
    """Refuse a value that the signature's `Literal` excludes: a call would come after the model."""
    parameters = inspect.signature(function).parameters
    for key, value in arguments.items():
        annotation = parameters[key].annotation if key in parameters else None
        if get_origin(annotation) is Literal and value not in get_args(annotation):
            allowed = " or ".join(map(str, get_args(annotation)))
            raise RewardError(f"The reward {name!r}: {key} is {value!r}; it must be {allowed}.")


def _check_arguments(factory: Callable[..., Any], name: str, arguments: dict[str, Any]) -> None:
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        raise RewardError(
            f"The reward {name!r} cannot be made with the arguments given ({_given(arguments)}): "
            f"{error}. Its signature: {_signature(factory)}. Write "
            f"`- {{name: {name}, argument: value}}`. {_BESIDES}"
        ) from error


def _made(factory: Callable[..., Any], name: str, arguments: dict[str, Any]) -> Any:
    try:
        return factory(**arguments)
    except TrlExtError:
        raise
    except FAILURES as error:  # a user's factory may fail in any way
        raise RewardError(
            f"The reward {name!r} was called as a factory, {_signature(factory)}, with the "
            f"arguments given ({_given(arguments)}), and raised {raised(error)}. Correct the "
            "arguments or the factory. On the command line, --debug shows the traceback."
        ) from error


def _given(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{key}: {value!r}" for key, value in arguments.items()) or "none"


def _signature(function: Callable[..., Any]) -> str:
    return f"{getattr(function, '__name__', type(function).__name__)}{inspect.signature(function)}"


def _must_be() -> str:
    return f"a reward must be {REWARDS.must_be}"
