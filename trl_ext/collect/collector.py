"""A policy that samples and scores the prompts of a recipe, batch after batch, into a file."""

import gc
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from tqdm import tqdm

from trl_ext.build import build_from, parts_of
from trl_ext.collect.forms import FORMS, Row, groups_of
from trl_ext.collect.messages import without_tied, without_unscored
from trl_ext.collect.prompts import (
    Prompts,
    batches_of,
    check_asked,
    check_rows,
    digest_of,
    length_of,
    seed_of,
)
from trl_ext.collect.samples import Samples, write_rows
from trl_ext.collect.settings import (
    is_tempered_only,
    prompts_at_once,
    sampling_recipe,
    weights_at,
    what_matters,
)
from trl_ext.collect.summary import Summary, summarise
from trl_ext.errors import ConfigError
from trl_ext.gibbs_prm.scored_file import check_output
from trl_ext.recipe import Recipe
from trl_ext.record import is_first_process
from trl_ext.trl_adapter import PolicyTrainer, load_weights


def collect(
    recipe: Recipe,
    output: str | Path,
    *,
    split: str = "train",
    limit: int | None = None,
    form: str = "completions",
    force: bool = False,
) -> tuple[Summary, int]:
    """Sample `num_generations` completions of each prompt of a recipe, score them, write them.

    Rows have `prompt`, `completion`, `reward` (the weighted sum of the reward functions),
    `rewards` (by function), `group` (number of the prompt), `prompt_ids`, `completion_ids`, `logp`
    (log π(y|x), nats, at the sampling temperature; only where nothing else shapes the sampling),
    `ref_logp` (of the reference, where the recipe loads one), `is_truncated`, and the dataset's
    other columns. A batch is seeded by the recipe's seed and its first prompt: interrupted and
    called again, this ends with the same rows.

    Args:
        recipe: of a policy trainer or of `offline_rwr`, from `read_recipe`.
        output: a .jsonl or .parquet file.
        split: "train" or "test" of the recipe's dataset.
        limit: the first prompts only.
        form: "completions"; "preferences" (`prompt`, `chosen`, `rejected`: best and worst of each
            prompt) or "rankings" (`prompt`, `completions`, `scores`).
        force: replace what there is.

    Returns:
        Numbers of what was sampled, and how many rows were written.

    Raises:
        TrlExtError: if the recipe's parts do not fit together, the file cannot be written, holds
            what another recipe sampled, or a reward fails.
    """
    collector = Collector(recipe, held_out=split == "test")
    return collector.collect(Path(output), split=split, limit=limit, form=form, force=force)


class Collector:
    """The policy of a recipe, loaded when first needed.

    Args:
        recipe: as for `collect`.
        held_out: open the test split as well.
        policy: a folder with weights of the same model that are sampled with instead; the
            reference stays the recipe's own model.

    Raises:
        TrlExtError: if the recipe's parts do not fit together.
    """

    def __init__(self, recipe: Recipe, *, held_out: bool = False, policy: Path | None = None):
        self.first = recipe
        self.recipe = sampling_recipe(recipe, held_out=held_out)
        self.policy = policy
        self._parts = parts_of(self.recipe)
        self.config = self._parts["args"]
        self.group = self.config.num_generations_eval
        self.batch = prompts_at_once(self.config.per_device_eval_batch_size, self.group)

    @cached_property
    def trainer(self) -> PolicyTrainer:
        """The policy trainer that samples; nothing of it is trained."""
        trainer = build_from(self.recipe, self._parts)
        assert isinstance(trainer, PolicyTrainer)
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            raise ConfigError(
                "Each process samples with the whole model, and accelerate_config="
                f"{self.recipe.launcher.get('accelerate_config')!r} spreads it over several. Leave "
                "accelerate_config out; num_processes=N shares the prompts."
            )
        if self.policy is not None:
            with without_tied(trainer.model):
                load_weights(trainer, self.policy)
        return trainer

    def dataset(self, split: str) -> Prompts:
        """The prompts of a split.

        Raises:
            DataError: if its rows cannot be written beside completions.
        """
        dataset = self._parts["train_dataset" if split == "train" else "eval_dataset"]
        check_rows(dataset, split)
        return dataset

    def collect(
        self,
        output: Path,
        *,
        split: str = "train",
        limit: int | None = None,
        form: str = "completions",
        force: bool = False,
        series: int = 0,
    ) -> tuple[Summary, int]:
        """As the function `collect`; two of different `series` draw different samples.

        Raises:
            TrlExtError: as there.
        """
        check_asked(split, limit, form)
        dataset = self.dataset(split)
        if is_first_process():
            check_output(output, force)
        about = self._about(dataset, split, limit, series)
        samples = Samples(output, about, force=force) if is_first_process() else None
        with samples.kept() if samples else nullcontext(), without_unscored():
            self._sample(dataset, limit, series, samples)
        if samples is None:
            return self._told(None)
        try:
            summary = summarise(samples.rows())
            rows = (row for group in groups_of(samples.rows()) for row in FORMS[form](group))
            written = write_rows(output, rows, form)
            samples.remove()
        finally:
            samples.close()
        return self._told((summary, written))

    def forget(self) -> None:
        """Free the memory of the models, before others are loaded."""
        self.__dict__.pop("trainer", None)
        self._parts = {}
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    def _told(self, result: Any) -> Any:
        """What the first process has found, on every one; they wait for it here."""
        told = [result]
        if self.config.world_size > 1:
            broadcast_object_list(told)
        return told[0]

    def _sample(
        self,
        dataset: Prompts,
        limit: int | None,
        series: int,
        samples: Samples | None,
    ) -> None:
        """Sample what is not there yet: on from the first batch that is not whole."""
        size = self.batch * self.config.world_size
        done = self._told(samples.done if samples else 0)
        first = done // (size * self.group) * size
        is_there = done - first * self.group  # of the batch that was cut, written already
        total = length_of(dataset, limit)
        if total is not None and done >= total * self.group:
            return
        if done and is_first_process():
            print(f"Going on from {done} completions.", file=sys.stderr)
        shows = is_first_process() and sys.stderr.isatty() and not self.config.disable_tqdm
        with tqdm(
            desc="sampled", unit=" prompts", total=total, initial=first, disable=not shows
        ) as bar:
            for number, rows in batches_of(dataset, first, limit, size):
                found = self._batch(number, rows, series)
                if samples is not None:
                    samples.write(found[is_there:])
                is_there = 0
                bar.update(len(rows))

    def _batch(self, number: int, rows: list[Row], series: int) -> list[Row]:
        """The completions of all processes for the prompts `number` to `number` + len(rows)."""
        rank, world = self.config.process_index, self.config.world_size
        share = -(-len(rows) // world)
        # Every process needs as many: the last one repeats a prompt, and what comes of it is cut.
        mine = [rows[min(i, len(rows) - 1)] for i in range(rank * share, (rank + 1) * share)]
        trainer = self.trainer  # loading draws random numbers: before the seed
        set_seed(seed_of(self.config.seed, series, number, rank))
        found = gather_object(trainer.sample_and_score(mine))
        return [
            self._row(rows[index // self.group], number + index // self.group, sample)
            for index, sample in enumerate(found[: len(rows) * self.group])
        ]

    def _row(self, prompt: Row, number: int, sample: Row) -> Row:
        sample["rewards"] = dict(zip(self._reward_names, sample["rewards"], strict=True))
        if not is_tempered_only(self.config):
            del sample["logp"]
        others = {name: value for name, value in prompt.items() if name != "prompt"}
        first = {"prompt": prompt["prompt"]} | sample | {"group": number}
        return first | others

    @cached_property
    def _reward_names(self) -> list[str]:
        """The names of the reward functions; a second one of a name has its number."""
        names = self.trainer.reward_func_names
        return [
            name if name not in names[:i] else f"{name}_{names[: i + 1].count(name)}"
            for i, name in enumerate(names)
        ]

    def _about(
        self, dataset: Prompts, split: str, limit: int | None, series: int
    ) -> Mapping[str, Any]:
        """What makes two collections one."""
        policy = None if self.policy is None else [str(self.policy), *weights_at(self.policy)]
        return {
            **what_matters(self.recipe),
            "policy": policy,
            "split": split,
            "limit": limit,
            "series": series,
            "prompts of a batch": self.batch,
            "processes": self.config.world_size,
            "rows of the dataset": digest_of(dataset, limit),
        }
