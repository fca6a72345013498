"""The watch as a callback of a policy trainer."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback

from trl_ext.errors import ConfigError
from trl_ext.rewards import build_rewards
from trl_ext.watch.checks import (
    NO_REFERENCE,
    NO_START,
    check_gold,
    what_is_missing,
    without_reference,
)
from trl_ext.watch.files import BEST, HACKING, PICTURE, BestPolicy, with_names, write_json
from trl_ext.watch.history import Alarm, History
from trl_ext.watch.measures import Completions, Mean
from trl_ext.watch.picture import draw_watch
from trl_ext.watch_options import watch_findings

logger = logging.getLogger(__name__)


class RewardHackingWatch(TrainerCallback):
    """Measure a gold reward on held-out prompts while a proxy is trained on; say when they part.

    Source: Gao, Schulman and Hilton (2023), "Scaling laws for reward model overoptimization": the
    proxy goes on rising with the KL to the policy before training, and the gold reward falls.

    A callback of any `PolicyTrainer` that evaluates on a held-out set, from before training on
    (`eval_on_start`). Each evaluation measures proxy and gold reward, KL to the policy before
    training, length, truncation, repetition and distinct n-grams, logged as `eval_watch/...`; each
    rollout the same on training prompts, as `watch/...`. The policy with the best gold reward is
    kept in `output_dir/best`, all numbers in `output_dir/hacking.json`, a picture in `hacking.png`.

    It raises an alarm, once a kind, where the gold reward is significantly below its best so far (a
    paired test over prompts, `trl_ext.watch.measures.change_since`) while the proxy is above what
    it was then; where the length, the repetition or the distinct n-grams leave those before
    training by more than a factor; and where the KL exceeds its budget.

    Args:
        gold: a reward function that training does not use, or a list, whose sum counts. An
            ordinary function as `reward_funcs` has them; a model is wrapped into one.
        every: steps between two measured rollouts. Evaluations are all measured.
        rollouts: score the gold reward on measured rollouts, too; it raises no alarm there.
        action: "warn" says it and goes on; "stop" ends training after the step, with a checkpoint
            from which a resumed run goes on, without an alarm of that kind.
        drift: the factor, above 1. None: no alarm.
        kl_budget: nats per completion. None: no alarm. It needs a reference: a beta above 0, with
            rwr `log_kl`, or a new adapter.

    Attributes:
        alarms: kind -> what was said.
        alarm_steps: kind -> the step at which it was said.
        stopped: the alarm that ended training, or None.

    Raises:
        ConfigError: an option out of range; and when the trainer is built no held-out prompts, no
            evaluation before training, a gold reward that is trained on, or a KL budget without a
            reference (of an adapter that is trained further, at the first evaluation).
        RewardError: a gold reward that fails, or scores no held-out completion.
    """

    def __init__(
        self,
        gold: Callable[..., Any] | list[Callable[..., Any]],
        *,
        every: int = 1,
        rollouts: bool = False,
        action: str = "warn",
        drift: float | None = 2.0,
        kl_budget: float | None = None,
    ):
        options = {"every": every, "rollouts": rollouts, "action": action}
        options |= {"drift": drift, "kl_budget": kl_budget}
        if wrong := watch_findings(options):
            lines = [f"  {name}={options[name]!r} {problem}." for name, problem in wrong]
            raise ConfigError("\n".join(["RewardHackingWatch:", *lines]))
        self._given = gold if isinstance(gold, list) else [gold]
        if not self._given:
            raise ConfigError("RewardHackingWatch: gold=[] holds no reward. Give one or more.")
        self.every, self.rollouts, self.action = every, rollouts, action
        self.history = History(drift, kl_budget)
        self.alarms: dict[str, str] = {}
        self.alarm_steps: dict[str, int] = {}
        self.stopped: str | None = None
        self._trainer: Any = None
        self._best: BestPolicy | None = None
        self._batches: list[Completions] = []
        self._last_measured: int | None = None
        self._says_kl_is_unknown = self._says_nothing_is_compared = True
        self._is_over = False

    @classmethod
    def from_config(cls, args: Any) -> "RewardHackingWatch":
        """The watch that the options of a `PolicyConfig` describe."""
        names = ("every", "rollouts", "action", "drift", "kl_budget")
        options = {name: getattr(args, f"watch_{name}") for name in names}
        return cls(build_rewards(args.gold_reward_funcs), **options)

    def begin(self, trainer: Any) -> None:
        """Meet the trainer, before anything is measured.

        Raises:
            ConfigError: all that keeps it from measuring.
        """
        if self._trainer is trainer:
            return
        if watch_of(trainer) is not self:
            raise ConfigError(
                "Two reward-hacking watches would write the same files: give gold_reward_funcs or "
                "one RewardHackingWatch, with all gold rewards in a list."
            )
        found = what_is_missing(trainer, self.history.kl_budget)
        try:
            self._gold = trainer.held_out_rewards(self._given)
        except ConfigError as error:
            found.append(str(error))
        if found:
            raise ConfigError("\n".join(["RewardHackingWatch:", *(f"  {each}" for each in found)]))
        self._trainer = trainer

    def extra_state(self) -> dict[str, Any]:
        """What a checkpoint keeps for `load_extra_state`."""
        alarms = {"alarms": {**self.alarms}, "alarm_steps": {**self.alarm_steps}}
        return alarms | {"last_measured": self._last_measured, "history": self.history.state()}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `extra_state` gave when the checkpoint was written.

        What was said is not said again, and does not stop a run that was told to go on.
        """
        self.alarms, self.alarm_steps = {**state["alarms"]}, {**state["alarm_steps"]}
        self._last_measured = state["last_measured"]
        self.history.load_state(state["history"])
        self.stopped = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._check_trainer()
        if state.global_step == 0 and not args.eval_on_start:
            raise ConfigError(NO_START)
        self._is_over = False
        self._best = BestPolicy(self._trainer, resumes=state.global_step > 0)

    def on_rollout(self, args, state, control, *, trainer, rollout, **kwargs):
        """An event of `PolicyTrainer`: completions have been generated and scored."""
        if not trainer.model.training:
            self._batches.append(self._seen(rollout, with_gold=True))
            return
        last = self._last_measured
        if last is not None and state.global_step - last < self.every:
            return
        self._last_measured = state.global_step
        numbers = self._seen(rollout, with_gold=self.rollouts).numbers()
        self._log(numbers)
        self._raise_alarms(self.history.judge_text(numbers, "rollouts", state.global_step))

    def on_held_out_begin(self, args, state, control, **kwargs):
        """An event of `PolicyTrainer`: an evaluation begins."""
        self._batches = []

    def on_held_out_end(self, args, state, control, *, prompts, **kwargs):
        """An event of `PolicyTrainer`: an evaluation is over, and not yet logged."""
        seen, self._batches = Completions.joined(self._batches, prompts), []
        numbers, step = seen.numbers(), state.global_step
        check_gold(seen, is_first=not self.history.evaluations)
        self._log(numbers)
        self._raise_alarms(self.history.judge_text(numbers, "evaluations", step))
        self._raise_alarms(self.history.judge_gold(seen, numbers, step))
        self._say_if_not_compared()

    def on_evaluate(self, args, state, control, **kwargs):
        self._check_trainer()
        if self._best is None:  # evaluated without training
            self._best = BestPolicy(self._trainer, resumes=state.global_step > 0)
        if self.history.newest_is_best:
            self._best.keep(self.history.evaluations[-1])
        if self._writes:
            write_json(self._record(), self._folder / HACKING)
        self._stop_if_asked(control)
        if self._is_over:
            self._draw()

    def on_step_end(self, args, state, control, **kwargs):
        self._stop_if_asked(control)

    def on_train_end(self, args, state, control, **kwargs):
        self._is_over = True
        self._draw()

    def _seen(self, rollout: Any, *, with_gold: bool) -> Completions:
        """What a rollout holds, of all processes."""
        trainer, gold = self._trainer, None
        if with_gold:
            each = trainer.score_held_out(self._gold)
            total = each.nansum(1).masked_fill(each.isnan().all(1), torch.nan)
            gold = _on_cpu(total.view(rollout.rewards_PG.shape))
        log_ratio = trainer.log_ratio_to_reference(rollout)
        if log_ratio is None:
            self._say_that_kl_is_unknown()
        prompt_ids, ids = map(gather_object, (trainer.prompt_ids, trainer.completion_ids))
        ends = set(trainer.eos_token_ids)
        return Completions(
            proxy_PG=_on_cpu(rollout.rewards_PG),
            gold_PG=gold,
            log_ratio_PG=None if log_ratio is None else _on_cpu(log_ratio),
            prompt_ids=prompt_ids,
            token_ids=ids,
            truncated=[not row or row[-1] not in ends for row in ids],
        )

    def _log(self, numbers: dict[str, Mean]) -> None:
        for name, mean in numbers.items():
            self._trainer.log_metric(f"watch/{name}", mean.value)

    def _raise_alarms(self, alarms: list[Alarm]) -> None:
        for kind, step, message in alarms:
            if kind in self.alarms:
                continue
            self.alarms[kind], self.alarm_steps[kind] = message, step
            if self._writes:
                logger.warning("Reward-hacking watch, %s. This is said once.", message)
            if self.action == "stop" and self.stopped is None:
                self.stopped = message

    def _stop_if_asked(self, control: Any) -> None:
        if self.stopped is not None:
            control.should_save = control.should_training_stop = True

    def _say_if_not_compared(self) -> None:
        rows = self.history.evaluations
        if len(rows) > 1 and "gold_change" not in rows[-1] and self._says_nothing_is_compared:
            self._says_nothing_is_compared = False
            if self._writes:
                logger.warning(
                    "Reward-hacking watch: the evaluation of step %d is on other prompts than the "
                    "best one before it, or has fewer than two: they are not compared.",
                    rows[-1]["step"],
                )

    def _check_trainer(self) -> None:
        if self._trainer is None:
            raise ConfigError(
                "RewardHackingWatch is a callback of trl_ext's policy trainers (RWRTrainer, "
                "GRPOTrainer, ReinforceTrainer, PPOTrainer), and this trainer is none of them. "
                "Use one of them, or remove it."
            )

    def _say_that_kl_is_unknown(self) -> None:
        budget = self.history.kl_budget
        if budget is not None:
            raise ConfigError(without_reference(budget))
        if self._says_kl_is_unknown and self._writes:
            logger.warning("Reward-hacking watch: %s.", NO_REFERENCE)
        self._says_kl_is_unknown = False

    @property
    def _folder(self) -> Path:
        return Path(self._trainer.args.output_dir)

    @property
    def _writes(self) -> bool:
        return self._trainer.accelerator.is_main_process

    def _record(self) -> dict[str, Any]:
        best = self.history.best
        return {
            "prompts": len(best["gold"]),
            "best_step": best["step"],
            "best": str(self._folder / BEST),
            "alarms": self.alarms,
            "alarm_steps": self.alarm_steps,
            "evaluations": [with_names(each) for each in self.history.evaluations],
        }

    def _draw(self) -> None:
        if self._writes and self.history.evaluations:
            best, steps = self.history.best["step"], self.alarm_steps
            draw_watch(self.history.evaluations, best, steps, self._folder / PICTURE)


def watch_of(trainer: Any) -> RewardHackingWatch | None:
    """The watch among a trainer's callbacks, or None."""
    callbacks = trainer.callback_handler.callbacks
    return next((each for each in callbacks if isinstance(each, RewardHackingWatch)), None)


def _on_cpu(values: Tensor) -> Tensor:
    return values.detach().double().cpu()
