"""The options of a process reward in a recipe, against each other."""

from typing import Any

from trl_ext.errors import ConfigError
from trl_ext.gibbs_prm.process_steps import check_training_steps
from trl_ext.models.paths import place_problem
from trl_ext.recipe.findings import Finding
from trl_ext.recipe.schema import Fields
from trl_ext.recipe.yaml_reader import Entries

_ASKS = ("process_reward", "process_learning_rate")
_MODELS = ("process_reward", "process_reference")


def check_process(
    fields: Fields, values: dict[str, Any], entries: Entries, findings: list[Finding]
) -> None:
    """Options that nothing asks for, models that are not there, and a way to cut that is none."""
    given = [key for key in values if key.startswith("process_") and key in fields]
    given = [key for key in given if not any(finding.key == key for finding in findings)]

    def found(key: str, problem: str) -> None:
        findings.append(Finding(entries[key].origin, key, problem))

    if not any(values.get(key) is not None for key in _ASKS):
        for key in given:
            if key not in _ASKS and values[key] != fields[key].default:
                found(key, f"does nothing without {' or '.join(_ASKS)}; set one, or remove it")
        return
    for key in _MODELS:
        if key in given and values[key] is not None:
            problem = place_problem(values[key])
            if problem:
                found(key, problem)
    if "process_steps" not in given:
        return
    try:
        check_training_steps(values["process_steps"])
    except ConfigError as error:
        found("process_steps", str(error).removeprefix("process_steps is "))
        return
    if values.get("process_level", fields["process_level"].default) == "token":
        found("process_steps", "does nothing with process_level: token; set process_level: step")
