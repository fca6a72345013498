"""How far the rounds are: `iterate.json`, and the table at the end."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trl_ext.collect.forms import Row
from trl_ext.collect.summary import Summary, summarise
from trl_ext.errors import RunError
from trl_ext.record import EVALUATIONS, METRICS, RunRecord
from trl_ext.report import held_out_gains

FILE, COMPLETIONS, HELD_OUT = "iterate.json", "completions.jsonl", "held_out.jsonl"
_ESS = "offline_rwr/effective_sample_size"


@dataclass(frozen=True)
class Mean:
    """A mean reward over prompts, and half the width of its 95% interval (None of one prompt)."""

    reward: float
    half_width: float | None
    prompts: int

    def __str__(self) -> str:
        """As the table has it."""
        spread = "" if self.half_width is None else f" ±{self.half_width:.3f}"
        return f"{self.reward:.3f}{spread}"


@dataclass(frozen=True)
class Round:
    """What is known of a finished round.

    Attributes:
        number: from 1.
        collected: of the completions that the policy before this round was sampled for.
        held_out_before, held_out_after: of the test split; None where the recipe does not evaluate,
            or where that is not done yet.
        effective_sample_size: of the weights, samples a prompt, mean over prompts; None where the
            fit did not say.
    """

    number: int
    collected: Mean
    held_out_before: Mean | None
    held_out_after: Mean | None
    effective_sample_size: float | None


class Progress:
    """The files of all rounds in an output_dir.

    Args:
        output_dir: of all rounds.
        writes: whether this process writes.
    """

    def __init__(self, output_dir: Path, *, writes: bool):
        self.output_dir = output_dir
        self.writes = writes

    def folder(self, number: int) -> Path:
        """Where round `number` is."""
        return self.output_dir / f"round-{number}"

    def policy(self, number: int) -> Path | None:
        """The weights after `number` rounds; None: those of the recipe."""
        return self.folder(number) if number else None

    def held_out(self, number: int) -> Path:
        """The held-out completions of the policy after `number` rounds."""
        return (self.policy(number) or self.output_dir) / HELD_OUT

    def finished(self) -> int:
        """The number of finished rounds.

        Raises:
            RunError: if the file does not say.
        """
        path = self.output_dir / FILE
        if not path.exists():
            return 0
        try:
            number = len(json.loads(path.read_text(encoding="utf-8"))["finished"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{path} does not say which rounds are finished: {error!r}. Is it damaged? Begin "
                "again with --overwrite, or give another output_dir=..."
            ) from error
        return number

    def write(self, asked: dict[str, Any], finished: int) -> list[Round]:
        """Write what was asked and every finished round; those rounds."""
        rounds = [self._round(number) for number in range(1, finished + 1)]
        if self.writes:
            text = json.dumps(asked | {"finished": [asdict(each) for each in rounds]}, indent=2)
            new = self.output_dir / f".{FILE}.new"
            new.write_text(text + "\n", encoding="utf-8")
            new.replace(self.output_dir / FILE)
        return rounds

    def _round(self, number: int) -> Round:
        rows = RunRecord(self.folder(number)).rows(METRICS)
        sizes = [row[_ESS] for row in rows if row.get(_ESS) is not None]
        return Round(
            number=number,
            collected=_mean_of(self.folder(number) / COMPLETIONS),
            held_out_before=_mean_if_there(self.held_out(number - 1)),
            held_out_after=_mean_if_there(self.held_out(number)),
            effective_sample_size=sizes[-1] if sizes else None,
        )

    def write_evaluations(self, finished: int) -> None:
        """Every held-out reward, a line a policy, as a run leaves them; `step` is the round."""
        found = [
            _rewards_by_prompt(self.held_out(number))
            for number in range(finished + 1)
            if self.held_out(number).exists()
        ]
        if not self.writes or len(found) != finished + 1:
            return
        prompts = 1 + max(max(rewards) for rewards in found)
        record = RunRecord(self.output_dir)
        (self.output_dir / EVALUATIONS).unlink(missing_ok=True)
        for number, rewards in enumerate(found):
            row = [rewards.get(prompt, []) for prompt in range(prompts)]
            record.append(EVALUATIONS, {"step": number, "rewards": row})

    def table(self, rounds: list[Round]) -> str:
        """A line a round, and what all of them gained on held-out prompts."""
        cells = [
            ["round", "collected", "held out before", "after", "effective samples"],
            *([_cell(value) for value in _columns(each)] for each in rounds),
        ]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  " + "  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells
        ]
        for name, gain in held_out_gains(RunRecord(self.output_dir)).items():
            low, high = gain.interval
            lines.append(
                f"  held-out {name}: {gain.before:.3f} to {gain.after:.3f}, gain "
                f"{gain.gain:+.3f} (95% interval {low:+.3f} to {high:+.3f}, paired over "
                f"{gain.prompts} prompts)"
            )
        return "\n".join(["Mean reward ± half of its 95% interval over prompts", *lines])


def _columns(each: Round) -> tuple:
    held_out = (each.held_out_before, each.held_out_after)
    return (each.number, each.collected, *held_out, each.effective_sample_size)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _mean_of(path: Path) -> Mean:
    found: Summary = summarise(_rows(path))
    assert found.reward is not None  # what no reward scored is not written
    return Mean(found.reward, found.half_width, found.prompts)


def _mean_if_there(path: Path) -> Mean | None:
    return _mean_of(path) if path.exists() else None


def _rewards_by_prompt(path: Path) -> dict[int, list[float]]:
    rewards: dict[int, list[float]] = {}
    for row in _rows(path):
        rewards.setdefault(row["group"], []).append(row["reward"])
    return rewards
