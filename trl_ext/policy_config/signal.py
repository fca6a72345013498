"""Options that say what a policy trainer spends its time on."""

from dataclasses import dataclass, field
from typing import Any

from trl_ext.options import OwnOptions


@dataclass
class SignalOptions(OwnOptions):
    """What a policy trainer has its passes on.

    What is left out of the passes leaves losses and gradients as they are. `min_mixed_groups` does
    not: it draws other prompts for groups whose rewards are all equal, and so trains on a selection
    of prompts, and of completions by their rewards.

    Args:
        trim_padding: score rows without the padding of their batch: packed into one row where
            `trl_ext.packing` knows the model, else without the columns that are padding in all of
            them; and form micro-batches of about as many tokens, out of the rows of an optimizer
            step.
        share_prompts: where rows are packed, run a prompt once for all of its completions.
        skip_zero_credit: completions whose credit is 0 have no pass with gradient, where no other
            term of the loss needs them.
        max_tokens_per_micro_batch: tokens of a pass with gradient, unless one row alone has more.
            None: half of what the padded micro-batch has, where no more passes are needed for that
            than `gradient_accumulation_steps`.
        min_mixed_groups: least share of a rollout's groups whose rewards (their weighted sum, over
            what was scored) are not all equal. Where fewer are, prompts that the rollout has not
            are drawn at random from the dataset, as many as are expected to make up for it, and
            those whose groups are mixed take the places of others. Logged: `sampling/rounds`,
            `sampling/mixed_groups` (share at the end), `sampling/mixed_groups_first`. The `reward`
            of the log is that of the prompts that came first, as without this option, and
            `completions/` that of all; everything else is of the rollout trained on. None: off.
        max_sampling_rounds: times that completions are generated for one rollout, at most.
    """

    trim_padding: bool = field(
        default=True, metadata={"help": "Score rows without the padding of their batch."}
    )
    share_prompts: bool = field(
        default=True,
        metadata={"help": "Run a prompt once for all of its completions in a packed pass."},
    )
    skip_zero_credit: bool = field(
        default=True,
        metadata={"help": "Leave completions with credit 0 out of passes with gradient."},
    )
    max_tokens_per_micro_batch: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of a pass with gradient. None: half of a padded micro-batch's, if no "
            "more passes are needed."
        },
    )

    min_mixed_groups: float | None = field(
        default=None,
        metadata={"help": "Draw other prompts until this share of groups has rewards that differ."},
    )
    max_sampling_rounds: int = field(
        default=3,
        metadata={"help": "Times that completions are generated for one rollout, at most."},
    )

    def signal_findings(self) -> list[str]:
        """What is wrong with these options, a line each."""
        found, limit = [], self.max_tokens_per_micro_batch
        if limit is not None and limit < 1:
            found.append(
                f"  max_tokens_per_micro_batch={limit!r} must be at least 1, or None for about "
                "half of what a padded micro-batch has."
            )
        rounds, wanted = self.max_sampling_rounds, self.min_mixed_groups
        if rounds < 1:
            found.append(f"  max_sampling_rounds={rounds!r} must be at least 1.")
        elif wanted is None and rounds != self._defaults()["max_sampling_rounds"]:
            found.append(
                f"  max_sampling_rounds={rounds!r} does nothing without min_mixed_groups. Set "
                "that, or remove it."
            )
        return found if wanted is None else found + self._unfit_for_redraw(wanted)

    def _unfit_for_redraw(self, wanted: float) -> list[str]:
        trls: Any = self
        found, group = [], trls.num_generations
        if not 0 < wanted <= 1:
            found.append(f"  min_mixed_groups={wanted!r} must be above 0 and at most 1, or None.")
        if group == 1:
            found.append(
                f"  min_mixed_groups={wanted!r} compares the rewards of a prompt's completions, "
                "and num_generations=1 gives it one. Use more completions, or remove it."
            )
        rows = trls.per_device_train_batch_size * trls.steps_per_generation
        if rows % group:
            found.append(
                f"  min_mixed_groups={wanted!r} needs whole groups in each process, and its rows "
                f"of a rollout, per_device_train_batch_size={trls.per_device_train_batch_size} "
                f"times steps_per_generation={trls.steps_per_generation}, are no multiple of "
                f"num_generations={group}. Change one of the three."
            )
        return found
