"""Checks of the options of the reward-hacking watch."""

from typing import Any

from trl_ext.recipe.check import first_origin
from trl_ext.recipe.findings import Finding, Origin
from trl_ext.recipe.schema import Fields
from trl_ext.recipe.yaml_reader import Entries
from trl_ext.watch_options import PREFIX, config_findings

_OTHERS = ("gold_reward_funcs", "eval_strategy", "eval_on_start")


def check_watch(
    fields: Fields,
    values: dict[str, Any],
    entries: Entries,
    recipe: Origin,
    findings: list[Finding],
) -> None:
    """What `PolicyConfig` would say of the watch when the run begins."""
    names = [*(name for name in fields if name.startswith(PREFIX)), *_OTHERS]
    if "gold_reward_funcs" not in fields or any(finding.key in names for finding in findings):
        return
    defaults = {name: fields[name].default for name in names}
    for name, problem in config_findings(defaults | _of(values, names), defaults):
        origin = first_origin(entries, (name, *_OTHERS), recipe)
        findings.append(Finding(origin, name, problem))


def _of(values: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}
