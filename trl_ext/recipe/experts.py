"""Experts and their weights in a recipe, against each other."""

from collections.abc import Mapping
from typing import Any

from trl_ext.models.paths import MODEL_FILES, place_problem
from trl_ext.poe.distillation_rules import distillation_findings
from trl_ext.recipe.check import first_origin
from trl_ext.recipe.findings import Finding, Origin
from trl_ext.recipe.schema import Fields
from trl_ext.recipe.yaml_reader import Entries

_KEYS = (
    "experts",
    "expert_weights",
    "expert_dtype",
    "plausibility",
    "divergence",
    "jsd_weight",
    "temperature",
)
# The last one is of a counted expert; importing what writes it would take torch.
_FILES = (*MODEL_FILES, "counted_expert.json")


def check_experts(
    fields: Fields,
    values: dict[str, Any],
    entries: Entries,
    recipe: Origin,
    findings: list[Finding],
) -> None:
    """The experts of a trainer that distils their product, and the options that go with them."""
    if "expert_weights" not in fields or any(finding.key in _KEYS for finding in findings):
        return
    options = {key: values.get(key, fields[key].default) for key in _KEYS}
    if options["experts"] is None:
        message = "missing; name the experts of the product, each with its path or hub id"
        findings.append(Finding(first_origin(entries, ("experts",), recipe), "experts", message))
    for key, problem in distillation_findings(options) or _of_places(options["experts"]):
        origin = first_origin(entries, (key, "expert_weights", "experts"), recipe)
        findings.append(Finding(origin, key, problem))


def _of_places(experts: Mapping[str, str] | None) -> list[tuple[str, str]]:
    """Experts that are not where they are said to be; outputs of a run that is to come may be."""
    problems = {
        name: place_problem(path, files=_FILES, folders_first=False)
        for name, path in (experts or {}).items()
    }
    return [("experts", f"{name}: {problem}") for name, problem in problems.items() if problem]
