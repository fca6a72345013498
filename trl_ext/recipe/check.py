"""The merged entries of a recipe against the fields they fill. Everything wrong is collected."""

import os
from typing import Any

from trl_ext.errors import PluginError, UnknownNameError
from trl_ext.kl_rules import (
    OVER_THE_VOCABULARY,
    alpha_findings,
    beta_of_alpha,
    kl_findings,
)
from trl_ext.recipe.findings import COMMAND_LINE, Finding, Origin, did_you_mean, show_value
from trl_ext.recipe.ranges import allowed_instead
from trl_ext.recipe.schema import (
    COMMON_GROUPS,
    LAUNCH_GROUP,
    Field,
    Fields,
    class_fields,
    config_fields,
)
from trl_ext.recipe.values import WrongValue, convert, takes_null
from trl_ext.recipe.yaml_reader import Entries, Entry
from trl_ext.registry import KL_ESTIMATORS, REWARDS, TRAINERS

_OWN_KEYS = ("trainer", "extends", "env", *class_fields(LAUNCH_GROUP))


def resolve_trainer(entries: Entries, recipe: Origin, findings: list[Finding]) -> str | None:
    """The "module:Class" of the recipe's trainer."""
    entry = entries.get("trainer")
    if entry is None:
        if _is_found("trainer", findings):
            return None
        message = f"missing; say which trainer, one of: {', '.join(TRAINERS.names())}"
        findings.append(Finding(recipe, "trainer", message))
    elif not isinstance(entry.value, str):
        message = f"got {show_value(entry.value)}; allowed: {', '.join(TRAINERS.names())}"
        findings.append(Finding(entry.origin, "trainer", message))
    else:
        try:
            return TRAINERS.resolve(entry.value)
        except UnknownNameError as error:
            findings.append(Finding(entry.origin, "trainer", str(error)))
    return None


def recipe_fields(
    trainer_target: str | None, entries: Entries, findings: list[Finding]
) -> dict[str, Fields]:
    """Group -> its fields; without "config" where the trainer's own cannot be read."""
    groups = {group: class_fields(target) for group, target in COMMON_GROUPS.items()}
    if trainer_target is not None:
        try:
            groups["config"] = config_fields(trainer_target)
        except PluginError as error:
            findings.append(Finding(entries["trainer"].origin, "trainer", str(error)))
    return groups


def check_values(
    entries: Entries, groups: dict[str, Fields], findings: list[Finding]
) -> dict[str, Any]:
    """Key -> converted value, for the keys that some group has."""
    fields = {name: field for group in groups.values() for name, field in group.items()}
    values = {}
    for key, entry in entries.items():
        if key in fields:
            try:
                values[key] = convert(fields[key], entry)
            except WrongValue as error:
                findings.append(Finding(entry.origin, key, str(error)))
            else:
                _check_range(fields[key], values[key], entry, findings)
        elif "config" in groups or not _trainers_with(key):
            findings.append(Finding(entry.origin, key, _unknown_key(key, entry, list(fields))))
    return values


def _check_range(field: Field, value: Any, entry: Entry, findings: list[Finding]) -> None:
    words = allowed_instead(field.name, value, field.least)
    if words is not None:
        null = ", or null" if takes_null(field) else ""
        message = f"got {show_value(value)}; allowed: {words}{null}."
        findings.append(Finding(entry.origin, field.name, message))


def _unknown_key(key: str, entry: Entry, known: list[str]) -> str:
    message = f"unknown key, with the value {show_value(entry.value)}."
    dashed = key.replace("-", "_")
    if dashed in known:
        return f"{message} Did you mean {dashed}?"
    hint = did_you_mean(key, [*known, *_OWN_KEYS])
    trainers = _trainers_with(key)
    if trainers:
        return f"{message} It belongs to the trainer {' and '.join(trainers)}.{hint}"
    if hint:
        return message + hint
    return f"{message} No valid key is near; `trl_ext show --defaults` on a recipe lists all keys."


def _trainers_with(key: str) -> list[str]:
    return [name for name in TRAINERS.names() if key in _fields_or_none(name)]


def _fields_or_none(trainer: str) -> Fields:
    """A trainer's fields for a hint; one that is broken is reported where it is asked for."""
    try:
        return config_fields(TRAINERS.resolve(trainer))
    except PluginError:
        return {}


def check_required(entries: Entries, recipe: Origin, findings: list[Finding]) -> None:
    """The keys without which no run can start."""
    needed = {
        ("model_name_or_path",): "the model to train: a hub id or a local path",
        ("output_dir",): "the folder that the run writes to",
        ("dataset_name", "datasets"): "what to train on",
    }
    for keys, meaning in needed.items():
        if any(_is_found(key, findings) and key not in entries for key in keys):
            continue
        if not any(key in entries and entries[key].value for key in keys):
            given = next((entries[key].origin for key in keys if key in entries), recipe)
            findings.append(Finding(given, " or ".join(keys), f"missing; {meaning}"))
    if all(key in entries and entries[key].value for key in ("dataset_name", "datasets")):
        message = "given beside dataset_name, and only one can be trained on; remove one of them"
        findings.append(Finding(entries["datasets"].origin, "datasets", message))


def check_env(env: Entries, findings: list[Finding]) -> None:
    """Variables that the operating system would not take."""
    for key, entry in env.items():
        name = key.removeprefix("env.")
        if not name or "=" in name or "\0" in name:
            message = f"{show_value(name)} cannot name a variable: give a name without '=' and NUL"
        elif not _is_encodable(name + entry.value):
            message = f"got {show_value(entry.value)}; NUL and halves of a character do not fit"
        else:
            continue
        findings.append(Finding(entry.origin, "env", message))


def _is_encodable(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _is_found(key: str, findings: list[Finding]) -> bool:
    """Whether something is wrong with the key already, so that it is not missing."""
    return any(finding.key == key for finding in findings)


def check_refused(
    refused: dict[str, str],
    fields: Fields,
    values: dict[str, Any],
    entries: Entries,
    findings: list[Finding],
) -> None:
    """Inherited options that the trainer's config says it does not honour."""
    for key, reason in refused.items():
        if key in values and values[key] != fields[key].default:
            message = (
                f"got {show_value(values[key])}, which does nothing here: {reason}. Remove it."
            )
            findings.append(Finding(entries[key].origin, key, message))


def check_kl(
    fields: Fields,
    values: dict[str, Any],
    entries: Entries,
    recipe: Origin,
    findings: list[Finding],
) -> None:
    """KL options that do not go together, or whose penalty is not that of the KL."""
    names = [name for name in fields if name.startswith("kl_")]
    if "kl_estimator" not in names:
        return
    options = {
        name: values.get(name, fields[name].default) for name in (*names, "beta", "allow_biased_kl")
    }
    if "poe_alpha" in fields:
        options["beta"] = beta_of_alpha(
            values.get("poe_alpha"), options["beta"], fields["beta"].default
        )
    try:
        if options["kl_estimator"] not in OVER_THE_VOCABULARY:
            KL_ESTIMATORS.resolve(options["kl_estimator"])
        problems = kl_findings(options)
    except UnknownNameError as error:
        problems = [("kl_estimator", str(error))]
    for name, problem in problems:
        origin = first_origin(entries, (name, *names, "beta"), recipe)
        findings.append(Finding(origin, name, problem))


def check_alpha(
    refused: dict[str, str],
    fields: Fields,
    values: dict[str, Any],
    entries: Entries,
    findings: list[Finding],
) -> None:
    """`poe_alpha` beside a beta of its own, or beside what moves or rescales beta."""
    alpha = values.get("poe_alpha")
    # What is out of range is said already.
    if alpha is None or "poe_alpha" not in fields or any(f.key == "poe_alpha" for f in findings):
        return
    options = {name: values.get(name, field.default) for name, field in fields.items()}
    options["beta"] = beta_of_alpha(alpha, options["beta"], fields["beta"].default)
    for name, problem in alpha_findings(options, refused):
        findings.append(Finding(entries[name].origin, name, problem))


def check_rewards(
    values: dict[str, Any], entries: Entries, findings: list[Finding]
) -> dict[str, Any]:
    """The values, TRL's spelling `package.module.object` of a reward turned into ours."""
    for key in ("reward_funcs", "gold_reward_funcs"):
        if values.get(key):
            values = values | {key: [_named_reward(reward) for reward in values[key]]}
            problems = filter(None, map(_unknown_reward, _with_members(values[key])))
            findings += [Finding(entries[key].origin, key, problem) for problem in problems]
    return values


def _unknown_reward(reward: Any) -> str | None:
    name = reward.get("name") if isinstance(reward, dict) else reward
    if not isinstance(name, str):
        return f"The reward {show_value(reward)} has no name. Give `name`."
    try:
        REWARDS.resolve(name)
    except UnknownNameError as error:
        return str(error)


def check_takes_rewards(
    takes_rewards: bool, values: dict[str, Any], entries: Entries, findings: list[Finding]
) -> None:
    """Rewards for a trainer that has no use for them."""
    if takes_rewards:
        return
    for key in ("reward_funcs", "reward_model_name_or_path"):
        if values.get(key):
            message = (
                f"got {show_value(values[key])}, and trainer: {entries['trainer'].value} takes no "
                f"{key}. Remove it, or use another trainer."
            )
            findings.append(Finding(entries[key].origin, key, message))


def check_reward_count(
    fields: Fields, values: dict[str, Any], entries: Entries, findings: list[Finding]
) -> None:
    """A trainer with `reward_weights` takes rewards: at least one, and a weight for each."""
    keys = ("reward_funcs", "reward_model_name_or_path")
    if "reward_weights" not in fields or any(k in entries and k not in values for k in keys):
        return
    count = len(values.get("reward_funcs") or []) + bool(values.get("reward_model_name_or_path"))
    weights = values.get("reward_weights")
    if values.get("reward_funcs") == [] and not count:
        message = "an empty list; name a reward, or set reward_model_name_or_path"
        findings.append(Finding(entries["reward_funcs"].origin, "reward_funcs", message))
    if weights is not None and len(weights) != count:
        message = (
            f"the number of weights is {len(weights)}, and that of rewards {count} "
            "(reward_funcs, and reward_model_name_or_path where it is set). Give one for each."
        )
        findings.append(Finding(entries["reward_weights"].origin, "reward_weights", message))


def _with_members(rewards: list[Any]) -> list[Any]:
    """The rewards, and after each its own members, those of an ensemble."""
    found = []
    for reward in rewards:
        members = reward.get("members") if isinstance(reward, dict) else None
        found += [reward, *_with_members(members if isinstance(members, list) else [])]
    return found


def _named_reward(reward: Any) -> Any:
    if isinstance(reward, dict):
        name, members = reward.get("name"), reward.get("members")
        named = {"name": _named_reward(name)} if isinstance(name, str) else {}
        inner = {"members": [*map(_named_reward, members)]} if isinstance(members, list) else {}
        return {**reward, **named, **inner}
    if not isinstance(reward, str):
        return reward
    module, dot, attribute = reward.rpartition(".")
    is_dotted = dot and ":" not in reward and reward not in REWARDS.names() and "/" not in reward
    return f"{module}:{attribute}" if is_dotted else reward


def first_origin(entries: Entries, keys: tuple[str, ...], recipe: Origin) -> Origin:
    """Where the first of these keys was given, the command line before files."""
    given = [entries[key].origin for key in keys if key in entries]
    return COMMAND_LINE if COMMAND_LINE in given else (given or [recipe])[0]
