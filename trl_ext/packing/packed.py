"""Where each token of a padded batch lies in one row without padding, each prompt once."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from trl_ext.packing.segments import Segments

# Segments whose lengths differ by no more than this factor attend together, padded to the longest.
_SPREAD = 1.5


@dataclass(frozen=True, eq=False)
class Packed:
    """N tokens: those of each prompt but its last, then for each completion what predicts it.

    What predicts a completion is the last token of its prompt and its own tokens but the last (with
    `keeps_last`, also that). So a row of T tokens takes T, and a prompt of P takes P − 1, however
    many completions it has.

    Attributes:
        ids: (1, N) tokens.
        positions: (1, N), each in its own row without padding, from 0 on.
        labels: (1, N) the token that each predicts, −100 where that is none of a completion.
        mask: (B, T) bool, the tokens of completions.
        places: (B, T) where the token lies that predicts each; of any value where masked out.
        prompts: the prompts' segments; None if all prompts have one token.
        completions: segments of similar length each, longest first.
    """

    ids: Tensor
    positions: Tensor
    labels: Tensor
    mask: Tensor
    places: Tensor
    prompts: Segments | None
    completions: list[Segments]
    keeps_last: bool
    _within: dict[int, list[Tensor]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor,
        kept: int,
        *,
        share_prompts: bool = True,
        keeps_last: bool = False,
    ) -> "Packed | None":
        """Pack a padded batch.

        Args:
            input_ids: (B, S) prompts padded on the left, then completions padded on the right.
            attention_mask: (B, S), 1 = no padding.
            kept: T, the columns of the completions.
            share_prompts: rows with the same prompt have one segment for it.
            keeps_last: keep the last token of each completion, which predicts none of its tokens.

        Returns:
            None where there is nothing to pack: a row without a prompt, a hole in a row, or no
            token of a completion.
        """
        ids, mask = input_ids[:, -kept:], attention_mask[:, -kept:].bool()
        prompt_ids, prompt_mask = input_ids[:, :-kept], attention_mask[:, :-kept].bool()
        if not _is_packable(prompt_mask, mask):
            return None
        of_prompts = prompt_ids.masked_fill(~prompt_mask, -1)
        if share_prompts:
            of_prompts, prompt_of = of_prompts.unique(dim=0, return_inverse=True)
        else:
            prompt_of = torch.arange(len(mask), device=mask.device)
        is_begin = of_prompts >= 0
        is_begin[:, -1] = False  # of a prompt, all but its last token
        begins = is_begin.sum(1)
        read = torch.cat([prompt_ids[:, -1:], ids[:, :-1]], dim=1)
        is_read, labels = mask, ids
        if keeps_last:
            read = torch.cat([prompt_ids[:, -1:], ids], dim=1)
            is_read = torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1)
            labels = torch.cat([ids.masked_fill(~mask, -100), torch.full_like(ids[:, :1], -100)], 1)
        lengths = is_read.sum(1)
        by_length = lengths.argsort(descending=True, stable=True)
        steps = torch.arange(is_read.size(1), device=mask.device)
        first = int(begins.sum())
        ordered = lengths[by_length]
        places = torch.empty_like(lengths)
        places[by_length] = first + ordered.cumsum(0) - ordered
        in_order = is_read[by_length]
        places = places[:, None] + steps
        positions = (begins[prompt_of][:, None] + steps)[by_length][in_order]
        return cls(
            ids=torch.cat([of_prompts[is_begin], read[by_length][in_order]])[None],
            positions=torch.cat([(is_begin.cumsum(1) - 1)[is_begin], positions])[None],
            labels=torch.cat([ids.new_full((first,), -100), labels[by_length][in_order]])[None],
            mask=mask,
            places=places,
            prompts=Segments(0, begins) if first else None,
            completions=list(_of_similar_length(first, ordered, prompt_of[by_length])),
            keeps_last=keeps_last,
        )

    def unpacked(self, values: Tensor) -> Tensor:
        """(1, N) of what predicts each token -> (B, T), 0 where masked out."""
        found = values[0].index_select(0, self.places[:, : self.mask.size(1)][self.mask])
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, found)

    def places_of_states(self) -> Tensor:
        """(B, T+1) where the states lie that predict the tokens 0..T−1, and what would follow.

        Of padding, the last state of its row. For `keeps_last`.
        """
        assert self.keeps_last
        last = self.mask.sum(1, keepdim=True)
        steps = torch.arange(self.places.size(1), device=last.device).minimum(last)
        return self.places.gather(1, steps)

    @cached_property
    def attended(self) -> list[Tensor]:
        """For each of `completions` (R, 1, L, K) bool: the keys, prompt first, of each token."""
        return [self._attended(segments) for segments in self.completions]

    def attended_within(self, window: int) -> list[Tensor]:
        """`attended`, but only the `window` tokens up to each; the same for each layer."""
        if window not in self._within:
            is_short = window > int(self.positions.max())
            self._within[window] = (
                self.attended
                if is_short
                else [
                    seen & self._distances(segments).lt(window)
                    for segments, seen in zip(self.completions, self.attended, strict=True)
                ]
            )
        return self._within[window]

    def _attended(self, segments: Segments) -> Tensor:
        rows, width = segments.is_padding.shape
        causal = segments.is_padding.new_ones(width, width).tril().expand(rows, -1, -1)
        if self.prompts is None:
            return causal[:, None]
        of_prompt = ~self.prompts.is_padding[segments.prompt_of]
        return torch.cat([of_prompt[:, None].expand(-1, width, -1), causal], dim=2)[:, None]

    def _distances(self, segments: Segments) -> Tensor:
        """(R, 1, L, K) from each token back to each key."""
        steps = torch.arange(segments.is_padding.size(1), device=self.mask.device)
        own = (steps[:, None] - steps).expand(len(segments.lengths), -1, -1)
        if self.prompts is None:
            return own[:, None]
        begins = self.prompts.lengths[segments.prompt_of]
        of_keys = torch.arange(self.prompts.is_padding.size(1), device=self.mask.device)
        to_prompt = (begins[:, None] + steps)[:, :, None] - of_keys
        return torch.cat([to_prompt, own], dim=2)[:, None]


def which_prompt(prompt_ids: Tensor, prompt_mask: Tensor) -> Tensor:
    """(B,) the number of each row's prompt: equal for equal ones."""
    return prompt_ids.masked_fill(prompt_mask == 0, -1).unique(dim=0, return_inverse=True)[1]


def _is_packable(prompt_mask: Tensor, mask: Tensor) -> bool:
    """Whether every row is padding, prompt, completion, padding, and has a prompt."""
    ends_with_prompt = prompt_mask.size(1) > 0 and bool(prompt_mask[:, -1].all())
    rises = not bool((prompt_mask[:, :-1] & ~prompt_mask[:, 1:]).any())
    falls = not bool((~mask[:, :-1] & mask[:, 1:]).any())
    return ends_with_prompt and rises and falls and bool(mask.any())


def _of_similar_length(first: int, lengths: Tensor, prompt_of: Tensor) -> Iterator[Segments]:
    """Segments in a row whose lengths, longest first, are alike; those of length 0 left out."""
    known = lengths.tolist()
    begin = 0
    while begin < len(known) and known[begin]:
        end = begin
        while end < len(known) and known[end] * _SPREAD >= known[begin]:
            end += 1
        yield Segments(first, lengths[begin:end], prompt_of[begin:end])
        first += sum(known[begin:end])
        begin = end
