"""What the reward-hacking watch may be told, and what of it makes no sense."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

ACTIONS = ("warn", "stop")
PREFIX = "watch_"


def watch_findings(options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is wrong with `every`, `rollouts`, `action`, `drift` and `kl_budget`.

    Returns:
        The name of an option, and what is wrong with its value; nothing where all is well.
    """
    found = []
    every = options["every"]
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        found.append(("every", "must be a whole number of steps from 1 on"))
    if not isinstance(options["rollouts"], bool):
        found.append(("rollouts", "must be True or False"))
    if options["action"] not in ACTIONS:
        found.append(("action", f"must be one of {', '.join(ACTIONS)}"))
    for name, least, words in (
        ("drift", 1, "a factor above 1, or None for no alarm"),
        ("kl_budget", 0, "nats per completion above 0, or None for no alarm"),
    ):
        if options[name] is not None and not _is_above(options[name], least):
            found.append((name, f"must be {words}"))
    return found


def config_findings(
    options: Mapping[str, Any], defaults: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """What is wrong with a config's options of the watch: name of the option, problem.

    Args:
        options: `gold_reward_funcs`, `eval_strategy`, `eval_on_start` and all `watch_*`.
        defaults: of the same.
    """
    watch = [name for name in options if name.startswith(PREFIX)]
    if options["gold_reward_funcs"] is None:
        return [
            (
                name,
                f"got {options[name]!r}, which does nothing without gold_reward_funcs. Set it, "
                "or remove this.",
            )
            for name in watch
            if options[name] != defaults[name]
        ]
    short = {name.removeprefix(PREFIX): options[name] for name in watch}
    found = [
        (PREFIX + name, f"got {short[name]!r}; it {problem}.")
        for name, problem in watch_findings(short)
    ]
    if not options["gold_reward_funcs"]:
        found.append(("gold_reward_funcs", "an empty list. Name a reward, or remove it."))
    strategy = getattr(options["eval_strategy"], "value", options["eval_strategy"])
    if strategy in ("no", False) or not options["eval_on_start"]:
        found.append(
            (
                "gold_reward_funcs",
                "is measured on held-out prompts, before training and on the way, and "
                f"eval_on_start is {options['eval_on_start']} and eval_strategy {strategy!r}. Set "
                "eval_on_start: true, eval_strategy: steps and eval_steps.",
            )
        )
    return found


def _is_above(value: Any, least: float) -> bool:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return is_number and least < float(value) < math.inf
