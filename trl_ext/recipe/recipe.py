"""Reading a recipe: files and command line in, checked values with their origins out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_ext.recipe.check import (
    check_alpha,
    check_env,
    check_kl,
    check_refused,
    check_required,
    check_reward_count,
    check_rewards,
    check_takes_rewards,
    check_values,
    recipe_fields,
    resolve_trainer,
)
from trl_ext.recipe.experts import check_experts
from trl_ext.recipe.findings import Finding, Origin, raise_if_any
from trl_ext.recipe.groups import check_eval_group_size, check_group_size, check_launcher
from trl_ext.recipe.layers import display_name, read_layers
from trl_ext.recipe.process import check_process
from trl_ext.recipe.schema import (
    COMMON_GROUPS,
    LAUNCH_GROUP,
    Fields,
    class_fields,
    config_fields,
    refused_options,
    takes_argument,
)
from trl_ext.recipe.secrets import is_secret
from trl_ext.recipe.shipped import find_recipe
from trl_ext.recipe.watch import check_watch
from trl_ext.recipe.yaml_reader import Entries, write_yaml

# SFTConfig has a `dataset_kwargs` too, of which it reads this one entry; the rest is the builder's.
_SFT_DATASET_KWARGS = {"skip_prepare_dataset"}


@dataclass(frozen=True)
class Recipe:
    """What to train, checked. Nothing in it needs torch, TRL or the network.

    Attributes:
        path: the file that was read.
        trainer: the trainer's name as the recipe gives it.
        trainer_target: what the name stands for, "package.module:Class".
        values: key -> checked and converted value, over all groups.
        origins: key -> where its value was written; also for `trainer` and the launcher's keys,
            and `env.NAME` for a variable.
        env: environment variables to set before anything heavy is imported.
        launcher: accelerate_config, num_processes and the like, where given.
        groups: `values` by the dataclass they fill: "script", "model", "mixture", "config".
    """

    path: Path
    trainer: str
    trainer_target: str
    values: dict[str, Any]
    origins: dict[str, Origin]
    env: dict[str, str]
    launcher: dict[str, Any]
    groups: dict[str, dict[str, Any]]

    def settings(self) -> dict[str, Any]:
        """The whole recipe as one mapping, ready to be written."""
        env = {"env": dict(self.env)} if self.env else {}
        return {"trainer": self.trainer, **self.launcher, **env, **self.values}

    def defaults(self) -> dict[str, Any]:
        """Key -> default of each field left alone; `COMPUTED` where it is not a literal."""
        targets = [class_fields(target) for target in COMMON_GROUPS.values()]
        fields = [*targets, config_fields(self.trainer_target)]
        every = {name: field.default for group in fields for name, field in group.items()}
        alpha = self.values.get("poe_alpha")
        if alpha is not None:
            every["beta"] = 1 / alpha  # as the config will have it
        return {name: value for name, value in every.items() if name not in self.values}

    def to_yaml(self) -> str:
        """The resolved recipe, itself a recipe that reads back to the same values.

        Secrets are left out, so that a record can be shared: `hub_token`, and variables of `env`
        whose names end as those of tokens and keys do.
        """
        public = {key: value for key, value in self.settings().items() if not is_secret(key)}
        env = {name: text for name, text in self.env.items() if not is_secret(f"env.{name}")}
        public.pop("env", None)
        return write_yaml(public | ({"env": env} if env else {}))


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, merge and check a recipe, without importing user code or opening a model.

    Args:
        path: a file, or the name of a shipped recipe such as "rwr/quickstart".
        overrides: command-line tokens, `key=value`, `--key=value` or `--key`, `value`.

    Raises:
        UnknownNameError: if there is no such recipe.
        ConfigError: if anything in it is wrong; the message lists every finding.
    """
    file = find_recipe(path)
    recipe, findings = Origin(display_name(file)), []
    entries = read_layers(file, overrides, findings)
    unreadable = findings and not entries
    result = None if unreadable else _check(file, entries, recipe, findings)
    raise_if_any(findings, recipe.source)
    assert result is not None
    return result


def _check(file: Path, entries: Entries, recipe: Origin, findings: list[Finding]) -> Recipe | None:
    """The recipe, or None after findings that leave none to build."""
    env = {key: entry for key, entry in entries.items() if key.startswith("env.")}
    launch_fields = class_fields(LAUNCH_GROUP)
    launch = {key: entry for key, entry in entries.items() if key in launch_fields}
    own = {*env, *launch, "trainer"}
    fillers = {key: entry for key, entry in entries.items() if key not in own}

    target = resolve_trainer(entries, recipe, findings)
    groups = recipe_fields(target, entries, findings)
    launcher = check_values(launch, {"config": launch_fields}, findings)
    values = check_values(fillers, groups, findings)
    values = check_rewards(values, entries, findings)
    check_required(entries, recipe, findings)
    check_env(env, findings)
    where = check_launcher(launcher, entries, findings)
    if "config" in groups:
        check_refused(refused_options(target), groups["config"], values, entries, findings)
        takes_rewards = takes_argument(target, "reward_funcs")
        check_takes_rewards(takes_rewards, values, entries, findings)
        check_reward_count(groups["config"], values, entries, findings)
        check_kl(groups["config"], values, entries, recipe, findings)
        check_alpha(refused_options(target), groups["config"], values, entries, findings)
        check_experts(groups["config"], values, entries, recipe, findings)
        check_process(groups["config"], values, entries, findings)
        check_watch(groups["config"], values, entries, recipe, findings)
        check_group_size(entries, groups["config"], values, where, recipe, findings)
        check_eval_group_size(entries, groups["config"], values, where, recipe, findings)
    if findings:
        return None
    assert target is not None
    return Recipe(
        path=file,
        trainer=entries["trainer"].value,
        trainer_target=target,
        values=values,
        origins={key: entry.origin for key, entry in entries.items()},
        env={key.removeprefix("env."): entry.value for key, entry in env.items()},
        launcher=launcher,
        groups=_split(values, groups),
    )


def _split(values: dict[str, Any], groups: dict[str, Fields]) -> dict[str, dict[str, Any]]:
    """The values by group; a key that two groups have goes to both."""
    split = {
        name: {key: value for key, value in values.items() if key in fields}
        for name, fields in groups.items()
    }
    shared = values.get("dataset_kwargs")
    if shared and "dataset_kwargs" in split["config"]:
        for group, wanted in (("config", True), ("script", False)):
            split[group]["dataset_kwargs"] = {
                key: value
                for key, value in shared.items()
                if (key in _SFT_DATASET_KWARGS) is wanted
            }
    return split
