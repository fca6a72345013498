"""Draws other prompts for groups whose rewards are all equal, which teach nothing."""

import math
from collections.abc import Iterator
from itertools import chain, islice, repeat
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from datasets import Dataset
from trl.trainer.utils import nanstd

from trl_ext.errors import ConfigError
from trl_ext.functional import all_equal
from trl_ext.policy_config import PolicyConfig
from trl_ext.rewards.columns import asked_of_trainer
from trl_ext.rollout import Rollout
from trl_ext.trl_adapter.draws import Draw, one_each, with_same_columns
from trl_ext.trl_adapter.rollouts import Rollouts

# What TRL's generation returns first, a list each with a value a completion, or None.
_GENERATED = ("prompt_ids", "completion_ids", "tool_mask", "completions", "sampling_logps")


class Redraw(Rollouts):
    """Has TRL generate until enough groups are mixed, and go on with those alone."""

    def __init__(self, *args: Any, **kwargs: Any):
        self._rows: list[dict[str, Any]] = []
        self._kept: Draw | None = None
        self._first: Draw | None = None
        super().__init__(*args, **kwargs)

    def _rollout(self, inputs) -> Rollout:
        # TRL reads its rows and prompts again once completions are there: these lists are changed.
        self._rows, self._kept, self._first = list(inputs), None, None
        rollout = super()._rollout(self._rows)
        if self._first is not None:
            self._show_rewards_of(self._first)
        return rollout

    def _generate(self, prompts):
        generated = super()._generate(prompts)
        if self.args.min_mixed_groups is None or not self.model.training:
            return generated
        first = self._scored_draw(self._rows, prompts, generated)
        self._kept = kept = self._enough(first)
        if kept is not first:
            self._first = first
        self._rows[:], prompts[:] = kept.columns["of", "rows"], kept.columns["of", "prompts"]
        lists = [kept.columns.get(("generated", name)) for name in _GENERATED]
        self._prompt_ids = kept.columns["generated", "prompt_ids"]
        fields = {name: values for (of, name), values in kept.columns.items() if of == "field"}
        return *lists, fields, *generated[len(lists) + 1 :]

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        if self._kept is None:
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        kept, self._kept = self._kept, None
        self._to_score = inputs, prompts, completions, completion_ids_list
        self._rewards_per_func = kept.rewards.flatten(0, 2)
        for (of, name), values in kept.columns.items():
            if of == "logged":
                self._pending_extra_logs[name] = values
            elif of == "dense":
                given = {row: each for row, each in enumerate(values) if each is not None}
                self.reward_funcs[name].checked.token_rewards = given
        return self._rewards_per_func

    def _enough(self, first: Draw) -> Draw:
        """The first draw, with mixed groups of others until they are enough or the cap is met."""
        wanted, kept, rounds = self.args.min_mixed_groups, first, 1
        assert wanted is not None
        others = self._other_rows()
        while kept.share < wanted and rounds < self.args.max_sampling_rounds:
            # As many as are missing, and as many again as turn out uniform if it goes on like this.
            expected = (wanted - kept.share) / first.share if first.share else 1.0
            per_process = math.ceil(min(expected, 1.0) * first.mixed.size(1))
            again = self._draw(list(islice(others, per_process * len(first.mixed))))
            kept, again = with_same_columns(kept, again)
            kept = kept.with_mixed_of(again, self.accelerator.process_index)
            rounds += 1
        self.log_metric("sampling/rounds", rounds)
        self.log_metric("sampling/mixed_groups", kept.share)
        self.log_metric("sampling/mixed_groups_first", first.share)
        return kept

    def _other_rows(self) -> Iterator[dict[str, Any]]:
        """Rows of the dataset, in an order of this rollout's own that all processes agree on.

        Those whose prompts the rollout has come only once all others are used up.
        """
        data: Any = self.train_dataset
        known = set(gather_object([repr(row["prompt"]) for row in self._rows]))
        order = np.random.default_rng([self.args.seed, self._step]).permutation(len(data)).tolist()
        names = list(self._rows[0])
        for has_others in chain([True], repeat(False)):
            for index in order:
                row = data[index]
                if not has_others or repr(row["prompt"]) not in known:
                    yield {name: row[name] for name in names}

    def _draw(self, rows: list[dict[str, Any]]) -> Draw:
        """Completions of the prompts in these rows, which are those of all processes."""
        each = len(rows) // self.accelerator.num_processes
        first = self.accelerator.process_index * each
        own = [dict(row) for row in rows[first : first + each] for _ in range(self.group_size)]
        prompts = [row["prompt"] for row in own]
        return self._scored_draw(own, prompts, super()._generate(prompts))

    def _scored_draw(self, rows: list[dict[str, Any]], prompts: list, generated: tuple) -> Draw:
        *lists, fields = generated[: len(_GENERATED) + 1]
        columns: dict[tuple[str, Any], list] = {
            ("of", "rows"): rows,
            ("of", "prompts"): list(prompts),
        }
        for name, values in zip(_GENERATED, lists, strict=True):
            if values is not None:
                columns["generated", name] = values
        # Columns that a rollout_func adds for the rewards, which TRL puts into the rows later.
        with_fields = [dict(row) for row in rows]
        for name, values in fields.items():
            listed = values if isinstance(values, list) else [values] * len(rows)
            columns["field", name] = one_each(name, listed, len(rows))
            for row, value in zip(with_fields, listed, strict=True):
                row[name] = value
        rewards = super()._calculate_rewards(with_fields, prompts, lists[3], lists[1])
        for name, values in self._pending_extra_logs.items():
            columns["logged", name] = one_each(name, list(values), len(rows))
        for number, reward_func in enumerate(self.reward_funcs):
            if checked := getattr(reward_func, "checked", None):
                given = checked.token_rewards
                columns["dense", number] = [given.get(row) for row in range(len(rows))]
        shape = (self.accelerator.num_processes, -1, self.group_size)
        summed = self._summed(rewards).view(shape)
        mixed = ~all_equal(summed, ~summed.isnan())
        return Draw(columns, rewards.view(*summed.shape, -1), mixed)

    def _show_rewards_of(self, first: Draw) -> None:
        """Log the rewards of the prompts that came first: the others were chosen by theirs."""
        metrics, rewards = self._metrics["train"], first.rewards.flatten(0, 2)
        shown = [("reward", "reward_std", self._summed(rewards))]
        for name, values in zip(self.reward_func_names, rewards.unbind(1), strict=True):
            shown.append((f"rewards/{name}/mean", f"rewards/{name}/std", values))
        for mean, deviation, values in shown:
            metrics[mean][-1] = values.nanmean().item()
            metrics[deviation][-1] = nanstd(values).item()


def check_can_redraw(args: PolicyConfig, train_dataset: Any, reward_funcs: Any, tools: Any) -> None:
    """Whether groups of a rollout can be exchanged for others.

    Args:
        args: of the trainer; nothing is checked without `min_mixed_groups`.
        train_dataset: what prompts are drawn from.
        reward_funcs: guarded reward functions.
        tools: tools or environments, if there are any.

    Raises:
        ConfigError: if not.
    """
    if args.min_mixed_groups is None:
        return
    why = None
    if not isinstance(train_dataset, Dataset):
        why = "a stream gives its prompts in order only. Give a dataset of known length"
    elif {"image", "images"} & set(train_dataset.column_names):
        why = "prompts with images cannot be exchanged. Take text alone"
    elif tools:
        why = "what tools and environments leave behind cannot be exchanged. Leave them out"
    elif "ref_per_token_logps" in asked_of_trainer(reward_funcs or []):
        why = (
            "a reward asks for ref_per_token_logps, which are there only when all prompts are "
            "chosen. Leave it out"
        )
    if why is not None:
        raise ConfigError(
            f"min_mixed_groups={args.min_mixed_groups!r} cannot draw prompts again: {why}, or "
            "remove min_mixed_groups."
        )
