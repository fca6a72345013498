"""From a recipe to a trained model: build the trainer, train, save, leave the record."""

import json
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from transformers import ProgressCallback, Trainer
from trl import RewardTrainer

from trl_ext.build import build_trainer
from trl_ext.callbacks import (
    DurableCheckpoints,
    RecordMetrics,
    ShortProgress,
    StopOnDivergence,
    StopOnSignal,
    Stopped,
    sync_files,
)
from trl_ext.errors import ConfigError
from trl_ext.recipe import Recipe
from trl_ext.record import (
    RECIPE,
    RunRecord,
    checkpoint_to_resume,
    is_first_process,
    is_last_step,
)
from trl_ext.report import before_after_table, hacking_table, held_out_gains
from trl_ext.resume import check_same_run, explained, saving_failed, what_is_left
from trl_ext.reward_model.before_after import accuracy_table
from trl_ext.trl_adapter import end_training, load_checkpoint
from trl_ext.trl_adapter.probe import LongestBatchFirst
from trl_ext.watch import watch_of
from trl_ext.watch.files import BEST


def train(
    recipe: Recipe, *, resume: bool | str = False, overwrite: bool = False, probe: bool = False
) -> str:
    """Train what a recipe says and leave the result and its record in `output_dir`.

    Args:
        recipe: from `read_recipe`.
        resume: True continues from the newest complete checkpoint in `output_dir`, a path from
            that checkpoint.
        overwrite: replace the run that `output_dir` holds.
        probe: run the longest possible batch first (`trl_ext.trl_adapter.probe`).

    Returns:
        How it ended: "finished", or "finished (stopped by the reward-hacking watch)".

    Raises:
        TrlExtError: if the recipe's parts do not fit together, a reward fails, memory runs out, or
            a checkpoint cannot be written; the message says what is left to resume from.
        Stopped: if a signal ended training; a checkpoint of its last step is there.
    """
    silence_what_no_user_can_mend()
    output_dir = Path(recipe.values["output_dir"]).expanduser()
    record = RunRecord(output_dir, writes=is_first_process())
    record.check_free(resume=bool(resume), overwrite=overwrite)
    check_kept(recipe, output_dir, overwrite)
    checkpoint = checkpoint_to_resume(output_dir, resume)
    if checkpoint:
        check_same_run(recipe, checkpoint)
    elif resume:
        print(f"{output_dir} has no checkpoint: starting from the beginning.", file=sys.stderr)
    return train_in(record, recipe, checkpoint, overwrite=overwrite, probe=probe)


def train_in(
    record: RunRecord,
    recipe: Recipe,
    checkpoint: Path | None,
    *,
    overwrite: bool = False,
    probe: bool = False,
    ends: bool = True,
) -> str:
    """Train what a recipe says, in the folder of a record that is known to be free for it.

    Args:
        record: where the result goes.
        recipe: from `read_recipe`.
        checkpoint: go on from there; None: from the beginning.
        overwrite: replace what is there.
        probe: as `train`.
        ends: False if these processes go on to something else: then they stay connected, and
            nothing is printed about how to use the result.

    Returns:
        As `train`.

    Raises:
        TrlExtError, Stopped: as `train`.
    """
    with record.begun(overwrite=overwrite):
        trainer = build_trainer(recipe, resumed=checkpoint is not None)
        if probe:
            trainer.add_callback(LongestBatchFirst(trainer))
        record.forget_after(int(checkpoint.name.split("-")[1]) if checkpoint else -1)
        record.describe(recipe.to_yaml())
    _train_recorded(trainer, record, checkpoint, ends=ends)
    watch = watch_of(trainer)
    stopped = watch is not None and watch.stopped
    return "finished (stopped by the reward-hacking watch)" if stopped else "finished"


def check_kept(recipe: Recipe, output_dir: Path, overwrite: bool) -> None:
    """Refuse to replace a run with one that is made from it.

    Raises:
        ConfigError: if the model, an expert, the dataset or what a reward is made of lies in the
            directory that would be removed.
    """
    if not overwrite:
        return
    keys = ("model_name_or_path", "dataset_name", "reward_model_name_or_path")
    keys += ("process_reward", "process_reference", "experts", "reward_funcs", "gold_reward_funcs")
    used = {key: recipe.values.get(key) for key in keys}
    for key, value in _texts_in(used):
        path = Path(value).expanduser()
        if path.exists() and path.resolve().is_relative_to(output_dir.resolve()):
            raise ConfigError(
                f"--overwrite would remove {key} {str(path)!r}, which lies in the output_dir. "
                "Give another: output_dir=..."
            )


def _texts_in(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The texts of a setting, each with its key, such as `reward_funcs.0.expert`."""
    if isinstance(value, str) and value:
        yield key, value
    elif isinstance(value, Mapping | list):
        parts = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, part in parts:
            yield from _texts_in(part, f"{key}.{name}" if key else str(name))


def silence_what_no_user_can_mend() -> None:
    """TRL's own use of names that transformers renames, and of pinned memory without a device."""
    for message in (
        ".*gradient_checkpointing.* is deprecated",
        ".*'pin_memory' argument is set as true but no accelerator is found",
    ):
        warnings.filterwarnings("ignore", message=message)


def _train_recorded(
    trainer: Trainer, record: RunRecord, checkpoint: Path | None, *, ends: bool
) -> None:
    stop, progress, metrics = StopOnSignal(), ShortProgress(), RecordMetrics(record, trainer)
    for callback in (metrics, StopOnDivergence(), stop, DurableCheckpoints()):
        trainer.add_callback(callback)
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(progress)
    began_at = int(checkpoint.name.split("-")[1]) if checkpoint else 0
    try:
        if checkpoint and is_last_step(checkpoint, trainer.args.max_steps):
            # transformers would take one step more before it looks whether there is one left.
            print(f"Nothing is left to train after step {began_at}.", file=sys.stderr)
            load_checkpoint(trainer, checkpoint)
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if stop.signal:
            # Who ends first has a launcher end the others: not while one still writes.
            trainer.accelerator.wait_for_everyone()
            raise Stopped(stop.signal)
        _finish(trainer, record, ends=ends)
    except KeyboardInterrupt:
        left = what_is_left(record.output_dir)
        print(f"Stopped at step {trainer.state.global_step}. {left}", file=sys.stderr)
        raise
    except Exception as error:
        loading = checkpoint if checkpoint and not stop.stepped else None
        phase = getattr(trainer, "phase", "train")
        told = explained(error, record, trainer.state.global_step, loading, phase=phase)
        if told is error:
            raise
        raise told from error
    finally:
        progress.close()
        stop.restore()


def _finish(trainer: Trainer, record: RunRecord, *, ends: bool) -> None:
    if trainer.eval_dataset is not None and not _is_evaluated(trainer):
        trainer.evaluate()
    try:
        trainer.save_model(str(record.output_dir))
        _write_model_card(trainer, record)
        if record.writes:
            sync_files(record.output_dir)
    except Exception as error:
        raise saving_failed(error, record, trainer.state.global_step) from error
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    if not ends:
        trainer.accelerator.wait_for_everyone()  # the first one writes
        return
    if record.writes:
        gains = held_out_gains(record)
        if gains:
            print(f"\n{before_after_table(gains)}\n")
        if isinstance(trainer, RewardTrainer) and (
            compared := accuracy_table(trainer.state.log_history, trainer.eval_dataset)
        ):
            print(f"\n{compared}\n")
        if watched := hacking_table(record):
            print(f"{watched}\n")
        watch = watch_of(trainer)
        kept = record.output_dir / BEST if watch is not None and watch.stopped else None
        print(_how_to_use(trainer, record.output_dir, kept), flush=True)
        if watch is not None and watch.stopped:
            left = what_is_left(record.output_dir)
            print(
                f"The reward-hacking watch stopped training, {watch.stopped}. {left}",
                file=sys.stderr,
            )
    end_training(trainer)


def _is_evaluated(trainer: Trainer) -> bool:
    """Whether the policy as it is was evaluated; the same on all processes, unlike a file."""
    return any(
        log["step"] == trainer.state.global_step and any(key.startswith("eval_") for key in log)
        for log in trainer.state.log_history
    )


def _write_model_card(trainer: Trainer, record: RunRecord) -> None:
    """TRL's card; it has no name for a model that is a folder, nor for one that stays local."""
    trainer.create_model_card(model_name=record.output_dir.name)
    card = record.output_dir / "README.md"
    if record.writes and card.is_file():
        began = yaml.safe_load((record.output_dir / RECIPE).read_text())["model_name_or_path"]
        text = card.read_text().replace("[None](https://huggingface.co/None)", f"`{began}`")
        card.write_text(text.replace('model="None"', f'model="{record.output_dir}"'))


def _how_to_use(trainer: Trainer, output_dir: Path, best: Path | None = None) -> str:
    """Where the result lies, and a command that uses it, with a prompt as in training.

    Args:
        trainer: that made it.
        output_dir: of the run.
        best: the policy to use in place of the last one; None: the last one.
    """
    what = "LoRA adapter" if (output_dir / "adapter_config.json").is_file() else "model"
    left = f"The {what} is in {output_dir}, with the recipe that made it."
    if best is not None:
        left = f"{left} The one with the best gold reward is in {best}."
        output_dir = best
    if isinstance(trainer, RewardTrainer):
        entry = f"{{name: reward_model, model: {output_dir}}}"
        return f"{left} As a reward of another recipe:\n  reward_funcs: [{entry}]"
    dataset = trainer.eval_dataset or trainer.train_dataset
    prompt = next(iter(dataset)).get("prompt", "Your prompt")  # pyright: ignore
    tokens = getattr(trainer.args, "max_completion_length", 20)
    program = (
        "from transformers import pipeline; "
        # Double quotes within: the shell's are single.
        f'model = pipeline("text-generation", {json.dumps(str(output_dir))}); '
        f'print(model({json.dumps(prompt)}, max_new_tokens={tokens})[0]["generated_text"])'
    )
    return (
        f"{left} Try it on one of its prompts:\n  {shlex.quote(sys.executable)} -c "
        f"{shlex.quote(program)}"
    )
