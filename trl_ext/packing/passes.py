"""What stands in for a model while padded rows are scored, and runs them without the padding."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from trl_ext.packing.packed import Packed
from trl_ext.packing.support import is_rotary, rescales_with_length, why_not_packed


class TrimmedPass:
    """Called as TRL calls a model with a fused head; leaves out what is padding in all rows.

    Args:
        model: what TRL would call, perhaps wrapped for several processes.
        unwrapped: the transformers model or PeftModel in it.
        kept: T, the columns of the completions.
    """

    def __init__(self, model: Any, unwrapped: Any, kept: int):
        self.model, self.kept = model, kept
        # Else a row's positions would be others without the padding on its left.
        self._may_shift = is_rotary(unwrapped)
        self._may_trim = not rescales_with_length(unwrapped)
        self._cuts: list[tuple[slice, int]] = []

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **options: Any
    ) -> Any:
        width = attention_mask.size(1)
        cut = self._cut(attention_mask)
        self._cuts.append((cut, width))
        output = self.model(
            input_ids=input_ids[:, cut],
            attention_mask=attention_mask[:, cut],
            labels=labels[:, cut],
            **options,
        )
        for name in ("log_probs", "entropy"):
            if (found := getattr(output, name)) is not None:
                setattr(output, name, pad(found, (0, width - cut.stop)))
        return output

    def states(self, call: int, hidden: Tensor) -> Tensor:
        """(b, T+1, H) that predict the tokens 0..T−1 and what would follow, of a call's states."""
        cut, width = self._cuts[call]
        from_last_of_prompt = hidden[:, max(width - self.kept - 1, 0) - cut.start :]
        return pad(from_last_of_prompt, (0, 0, 0, width - cut.stop))

    def _cut(self, attention_mask: Tensor) -> slice:
        """From the first to the last column that any row attends to; some of both parts."""
        width, attended = attention_mask.size(1), attention_mask.any(dim=0).nonzero().squeeze(1)
        if not len(attended) or not self._may_trim:
            return slice(0, width)
        first = min(int(attended[0]), width - self.kept - 1) if self._may_shift else 0
        return slice(max(first, 0), max(int(attended[-1]) + 1, width - self.kept + 1))


class PackedPass:
    """Called as `TrimmedPass`; runs the rows packed, each prompt once.

    Args:
        model, unwrapped, kept: as there.
        share_prompts: a prompt is run once for all of its completions in a call.
        keeps_last: run the last token of each completion too, which `states` needs.
    """

    def __init__(
        self, model: Any, unwrapped: Any, kept: int, *, share_prompts: bool, keeps_last: bool
    ):
        self.model, self.kept = model, kept
        self._options = {"share_prompts": share_prompts, "keeps_last": keeps_last}
        self._trimmed = TrimmedPass(model, unwrapped, kept)
        # Of each call: where its states lie, or which of the trimmed calls it was. Not how it was
        # packed: attention masks are part of that, and this one outlives the pass.
        self._calls: list[Tensor | int] = []

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **options: Any
    ) -> Any:
        packed = Packed.of(input_ids, attention_mask, self.kept, **self._options)
        if packed is None:
            self._calls.append(sum(isinstance(call, int) for call in self._calls))
            return self._trimmed(input_ids, attention_mask, labels, **options)
        if packed.keeps_last:
            self._calls.append(packed.places_of_states())
        output = self.model(**packed_inputs(packed), shift_labels=packed.labels, **options)
        return SimpleNamespace(
            log_probs=packed.unpacked(output.log_probs),
            entropy=None if output.entropy is None else packed.unpacked(output.entropy),
        )

    def states(self, call: int, hidden: Tensor) -> Tensor:
        """As `TrimmedPass.states`."""
        how = self._calls[call]
        return self._trimmed.states(how, hidden) if isinstance(how, int) else hidden[0][how]


def scoring_pass(
    model: Any, unwrapped: Any, kept: int, *, share_prompts: bool, keeps_last: bool
) -> TrimmedPass | PackedPass:
    """The cheapest pass that gives a model's log-probabilities; arguments as of `PackedPass`."""
    if why_not_packed(unwrapped) is not None:
        return TrimmedPass(model, unwrapped, kept)
    return PackedPass(model, unwrapped, kept, share_prompts=share_prompts, keeps_last=keeps_last)


def backbone_states(
    run: Any,
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    kept: int,
    *,
    trim_padding: bool = True,
    share_prompts: bool = True,
) -> Tensor:
    """(B, T+1, H) hidden states that predict the tokens 0..T−1 and what would follow.

    Args:
        run: a transformers model without its head, or what is called like one.
        model: that model, or the one whose backbone it is.
        input_ids, attention_mask: (B, S) prompts padded on the left, completions on the right.
        kept: T, the columns of the completions.
        trim_padding: run them packed, where the model can be.
        share_prompts: a prompt is run once for all of its completions.
    """
    packed = None
    if trim_padding and why_not_packed(model) is None:
        packed = Packed.of(
            input_ids, attention_mask, kept, share_prompts=share_prompts, keeps_last=True
        )
    if packed is None:
        whole = run(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return whole.last_hidden_state[:, -kept - 1 :]
    hidden = run(**packed_inputs(packed), use_cache=False).last_hidden_state
    return hidden[0][packed.places_of_states()]


def packed_inputs(packed: Packed) -> dict[str, Any]:
    """What a transformers model, or its backbone, is called with."""
    return {
        "input_ids": packed.ids,
        "position_ids": packed.positions,
        # With four dimensions it is left as it is: attention knows from `packed`.
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=packed.ids.device),
        "packed": packed,
    }
