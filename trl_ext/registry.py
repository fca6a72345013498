"""Names to lazily loaded objects: built in, added by plugins through entry points, or spelt out.

A name is one of
- a built-in name, one line in a table below;
- a plugin's name: an entry point in the group `trl_ext.trainers`, `trl_ext.rewards` or
  `trl_ext.kl_estimators` of any installed distribution;
- `package.module:object`, for code that is not installed as a plugin.

Listing and resolving names imports nothing; only `load` does.
"""

import difflib
import importlib
from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import entry_points
from typing import Any

from trl_ext.errors import PluginError, UnknownNameError


class Registry:
    """What one kind of plugin is called and where it is found.

    Args:
        kind: what users call it ("trainer"), for error messages.
        group: entry-point group that adds names from outside.
        builtin: name -> "package.module:object".
        must_be: what a plugin must export, for error messages.
        families: prefix -> "package.module:object" of every name `prefix:…`.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        builtin: Mapping[str, str],
        must_be: str,
        families: Mapping[str, str] | None = None,
    ):
        self.kind = kind
        self.group = group
        self.must_be = must_be
        self._builtin = dict(builtin)
        self._families = dict(families or {})

    @cached_property
    def _targets(self) -> dict[str, str]:
        """Name -> target. No plugin can replace a built-in name or another plugin's."""
        targets = dict(self._builtin)
        for point in entry_points(group=self.group):
            if targets.get(point.name, point.value) != point.value:
                raise PluginError(
                    f"The {self.kind} name {point.name!r} stands for {targets[point.name]!r} "
                    f"already, and a plugin registers it for {point.value!r} in the entry-point "
                    f"group {self.group!r}. Rename the plugin's entry point."
                )
            targets[point.name] = point.value
        return targets

    def names(self) -> list[str]:
        """Every registered name, sorted."""
        return sorted(self._targets)

    def resolve(self, name: str) -> str:
        """The `package.module:object` that a name stands for.

        Raises:
            UnknownNameError: if it is neither registered nor `package.module:object`.
        """
        if name in self._targets:
            return self._targets[name]
        module, colon, attribute = name.partition(":")
        if attribute and module in self._families:
            return self._families[module]
        if colon and _is_dotted(module) and _is_dotted(attribute):
            return name
        close = difflib.get_close_matches(name, self.names(), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UnknownNameError(
            f"There is no {self.kind} called {name!r}.{hint} Known: {', '.join(self.names())}. "
            f"Your own is 'package.module:object', or an entry point in the group {self.group!r}."
        )

    def load(self, name: str) -> Any:
        """Import what a name stands for.

        Raises:
            UnknownNameError: as `resolve`.
            PluginError: if its module cannot be imported or has no such object.
        """
        target = self.resolve(name)
        try:
            return _imported(target)
        except Exception as error:  # a user's module may fail in any way when it is imported
            raise PluginError(
                f"The {self.kind} {name!r} stands for {target!r}, which cannot be loaded: "
                f"{type(error).__name__}: {error}. "
                f"A {self.kind} must be {self.must_be}. Is its package installed here, and is the "
                "name spelt right?"
            ) from error


def load_process_reward() -> Any:
    """The class behind the options `process_`, which is above the trainers that have them."""
    return _imported("trl_ext.gibbs_prm.process_reward:ProcessReward")


def _imported(target: str) -> Any:
    module_name, _, attribute = target.partition(":")
    value = importlib.import_module(module_name)
    for part in attribute.split("."):
        value = getattr(value, part)
    return value


def _is_dotted(text: str) -> bool:
    return all(part.isidentifier() for part in text.split("."))


TRAINERS = Registry(
    "trainer",
    "trl_ext.trainers",
    {
        "dpo": "trl.trainer.dpo_trainer:DPOTrainer",
        "grpo": "trl_ext.grpo.trainer:GRPOTrainer",
        "offline_rwr": "trl_ext.rwr.offline:OfflineRWRTrainer",
        "poe_distillation": "trl_ext.poe.distillation:PoEDistillationTrainer",
        "ppo": "trl_ext.ppo.trainer:PPOTrainer",
        "reinforce": "trl_ext.reinforce.trainer:ReinforceTrainer",
        "reward": "trl_ext.reward_model.trainer:RewardTrainer",
        "rwr": "trl_ext.rwr.trainer:RWRTrainer",
        "sft": "trl.trainer.sft_trainer:SFTTrainer",
    },
    "a transformers Trainer called <Name>Trainer, in a module that also names its <Name>Config",
)
REWARDS = Registry(
    "reward",
    "trl_ext.rewards",
    {
        "reasoning_gym": "trl_ext.rewards.reasoning_gym:reasoning_gym",
        "exact_match": "trl_ext.rewards.exact_match:exact_match",
        "json_schema": "trl_ext.rewards.verifiable:json_schema",
        "math_verify": "trl_ext.rewards.verifiable:MathVerify",
        "regex_match": "trl_ext.rewards.verifiable:regex_match",
        "reward_ensemble": "trl_ext.rewards.ensemble:RewardEnsemble",
        "vader": "trl_ext.rewards.vader:vader",
        "log_ratio": "trl_ext.poe.rewards:log_ratio",
        "minus_reference": "trl_ext.poe.rewards:minus_reference",
        "reward_model": "trl_ext.poe.reward_models:reward_model",
        "accuracy_reward": "trl.rewards:accuracy_reward",
        "reasoning_accuracy_reward": "trl.rewards:reasoning_accuracy_reward",
        "think_format_reward": "trl.rewards:think_format_reward",
        "get_cosine_scaled_reward": "trl.rewards:get_cosine_scaled_reward",
        "get_repetition_penalty_reward": "trl.rewards:get_repetition_penalty_reward",
        "get_soft_overlong_punishment": "trl.rewards:get_soft_overlong_punishment",
    },
    "a function (prompts, completions, **columns) -> one number a completion, or a factory of one",
    {"evaluate": "trl_ext.rewards.metric:MetricReward"},
)
KL_ESTIMATORS = Registry(
    "KL estimator",
    "trl_ext.kl_estimators",
    {
        "k1": "trl_ext.functional:k1",
        "k2": "trl_ext.functional:k2",
        "k3": "trl_ext.functional:k3",
    },
    "a function (logps, ref_logps) -> per-token estimate, all (B, T)",
)
