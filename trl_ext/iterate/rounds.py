"""Collect from the policy, fit offline, and again; a killed round is gone on with."""

import gc
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState

from trl_ext.build import config_of
from trl_ext.collect import Collector
from trl_ext.collect.messages import said_once
from trl_ext.environment import command_name
from trl_ext.errors import ConfigError, DataError, RunError, TrlExtError
from trl_ext.iterate.progress import COMPLETIONS, Progress, Round
from trl_ext.iterate.recipes import (
    begin_anew,
    check_goes_on,
    check_iterates,
    check_prompts,
    evaluates,
    may_change,
    write_fit_recipe,
)
from trl_ext.launch import check_kept, silence_what_no_user_can_mend, train_in
from trl_ext.recipe import Recipe, read_recipe
from trl_ext.record import RECIPE, RunRecord, is_first_process, last_checkpoint
from trl_ext.rewards.process import RANK_VARIABLES


def iterate(
    recipe: Recipe, rounds: int, *, resume: bool = False, overwrite: bool = False
) -> tuple[list[Round], str]:
    """Collect, score and fit offline, `rounds` times.

    `output_dir` gets `round-1/`, `round-2/`, …, each with its `completions.jsonl`, `recipe.yaml`,
    the record and checkpoints of its fit, and the model or adapter; and `iterate.json`. A recipe
    that evaluates has the test split sampled before the first round and after each, into
    `held_out.jsonl`.

    Args:
        recipe: with trainer `offline_rwr`, prompts and rewards.
        rounds: how many there are to be; with `resume` those that are finished count.
        resume: go on where the run in `output_dir` was interrupted, or with more rounds.
        overwrite: replace the run that `output_dir` holds.

    Returns:
        The finished rounds, and a table of them.

    Raises:
        TrlExtError: if the recipe cannot be iterated, is another than that of the run, or a round
            fails; what is finished stays.
    """
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
        raise ConfigError(f"rounds={rounds!r} must be a whole number of at least 1.")
    silence_what_no_user_can_mend()
    check_iterates(recipe)
    output_dir = Path(recipe.values["output_dir"]).expanduser()
    record = RunRecord(output_dir, writes=is_first_process())
    record.check_free(resume=resume, overwrite=overwrite)
    check_kept(recipe, output_dir, overwrite)
    if resume:
        check_goes_on(recipe, output_dir, rounds)
    progress = Progress(output_dir, writes=record.writes)
    with record.begun(overwrite=overwrite):
        collector = Collector(recipe, held_out=evaluates(recipe))
        check_prompts(collector)
        unfinished = progress.folder(progress.finished() + 1)
        if record.writes and (anew := begin_anew(recipe, output_dir, unfinished)):
            print(anew, file=sys.stderr, flush=True)
        record.describe(recipe.to_yaml())
    return _Rounds(recipe, rounds, progress).run(collector)


class _Rounds:
    """The rounds of one call.

    Args:
        recipe: of all rounds.
        asked: how many.
        progress: the files.
    """

    def __init__(self, recipe: Recipe, asked: int, progress: Progress):
        self.recipe = recipe
        self.progress = progress
        self.rounds = max(asked, progress.finished())
        self._is_launched = "LOCAL_RANK" in os.environ
        self._asked = {"rounds": self.rounds, "reference": config_of(recipe).reference}

    def run(self, collector: Collector) -> tuple[list[Round], str]:
        done = self.progress.finished()
        try:
            with said_once("trl_ext.rwr.offline_data"):
                return self._run(collector, done)
        except KeyboardInterrupt:
            self._say(self._how_to_go_on())
            raise
        except (TrlExtError, OSError) as error:
            kind = type(error) if isinstance(error, TrlExtError) else RunError
            number = self.progress.finished() + 1
            where = f"Round {number}: " if number <= self.rounds else ""
            raise kind(f"{where}{error}\n{self._how_to_go_on(error)}") from error

    def _run(self, collector: Collector, done: int) -> tuple[list[Round], str]:
        self.progress.write(self._asked, done)
        for number in range(done + 1, self.rounds + 1):
            self._round(number, collector)
            collector = self._collector(number)
            self.progress.write(self._asked, number)
        if done == self.rounds:
            collector = self._collector(done)
        self._sample_held_out(self.rounds, collector)
        self._everyone()
        self._forget(collector)
        finished = self.progress.write(self._asked, self.rounds)
        self.progress.write_evaluations(self.rounds)
        return finished, self.progress.table(finished)

    def _collector(self, number: int) -> Collector:
        """The policy after `number` rounds."""
        policy = self.progress.policy(number)
        return Collector(self.recipe, held_out=evaluates(self.recipe), policy=policy)

    def _round(self, number: int, collector: Collector) -> None:
        """Evaluate the policy, collect from it, fit the next one."""
        folder = self.progress.folder(number)
        if self.progress.policy(number - 1) is not None and collector.policy is None:
            collector = self._collector(number - 1)  # of a run that is gone on with
        if self.progress.writes:
            folder.mkdir(exist_ok=True)
        self._sample_held_out(number - 1, collector)
        completions = folder / COMPLETIONS
        if not self._is_there(completions):
            self._say(f"round {number} of {self.rounds}: collecting completions")
            collector.collect(completions, series=number, force=False)
        self._forget(collector)
        self._fit(number, completions)

    def _forget(self, collector: Collector) -> None:
        """Free what has sampled, before a fit or the end."""
        collector.forget()
        if not self._is_launched:
            # TRL sets them for a vLLM in this process: a fit would connect it to itself.
            for name in RANK_VARIABLES:
                os.environ.pop(name, None)

    def _sample_held_out(self, number: int, collector: Collector) -> None:
        """Sample the test split with the policy after `number` rounds, if the recipe says so."""
        held_out = self.progress.held_out(number)
        if evaluates(self.recipe) and not self._is_there(held_out):
            after = f"after round {number}" if number else "before the first round"
            self._say(f"held-out prompts, {after}")
            collector.collect(held_out, split="test")

    def _fit(self, number: int, completions: Path) -> None:
        folder = self.progress.folder(number)
        policy = self.progress.policy(number - 1)
        if self.progress.writes:
            write_fit_recipe(self.recipe, folder, completions, policy)
        self._everyone()
        recipe, checkpoint = read_recipe(folder / RECIPE), last_checkpoint(folder)
        self._everyone()  # the first one writes both anew
        self._say(f"round {number} of {self.rounds}: fitting")
        train_in(RunRecord(folder, writes=self.progress.writes), recipe, checkpoint, ends=False)
        gc.collect()  # trainers hold themselves in cycles
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    def _is_there(self, file: Path) -> bool:
        """Whether a file is there, the same on all processes."""
        self._everyone()
        is_there = file.exists()
        self._everyone()
        return is_there

    def _everyone(self) -> None:
        PartialState().wait_for_everyone()

    def _say(self, text: str) -> None:
        if self.progress.writes:
            print(text, file=sys.stderr, flush=True)

    def _how_to_go_on(self, error: Exception | None = None) -> str:
        finished, output_dir = self.progress.finished(), self.progress.output_dir
        policy = self.progress.policy(finished)
        left = f", the policy of the last one is in {policy}" if policy else ""
        command = f"{command_name()} iterate {output_dir / RECIPE} --rounds {self.rounds} --resume"
        text = f"{finished} of {self.rounds} rounds are finished{left}. Go on with: {command}"
        if not isinstance(error, DataError | ConfigError):
            return text
        ways = [
            f"{', '.join(keys)}, and the round is {done} anew"
            for done, keys in may_change(self.recipe).items()
        ]
        return f"{text} KEY=VALUE\nKEY may be {'; or '.join(ways)}."
