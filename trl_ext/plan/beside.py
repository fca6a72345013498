"""A model that stands beside the one that trains, and scores: its weights, and its passes."""

from dataclasses import dataclass

from trl_ext.plan.activations import Batch, Numbers, boundary, kept_by_end, kept_by_layer
from trl_ext.plan.resident import DTYPE_BYTES, optimizer_bytes
from trl_ext.plan.shapes import Shape, Shapes, numel
from trl_ext.plan.work import backward_work, forward_work

Items = dict[str, int]
# Rows of the table.
REWARDS, PROCESS, EXPERTS = "reward models", "process reward", "experts"
# `trl_ext.models.log_probs`: the logits of one tile of its kernel, float32.
_TILE = 4 * 1024 * 8192


@dataclass(frozen=True)
class Beside:
    """A model that scores completions, whole on every card.

    Attributes:
        item: its row in the table.
        shapes: with its adapter.
        how: how it computes.
        rows: sequences of one of its passes.
        is_shared: its weights are another's: an adapter alone is its own.
        has_head: whether it has an LM head, and not the one number of a reward model.
        learns: it is trained, too, by AdamW: its adapter, or without one all of it.
        checkpointing: whether it computes activations again when it learns.
        loads: whether it is on the card before the first completion.
        stacks_head: whether a copy of its LM head stands beside those of others, as in a product.
    """

    item: str
    shapes: Shapes
    how: Numbers
    rows: int
    is_shared: bool = False
    has_head: bool = True
    learns: bool = False
    checkpointing: bool = False
    loads: bool = True
    stacks_head: bool = False

    @property
    def standing(self) -> int:
        """Bytes of its weights, and of its optimizer's states."""
        own = (self.shapes if self.has_head else self.shapes.headless).parameters
        weights = 0 if self.is_shared else self.how.stream * numel(own)
        states = optimizer_bytes("adamw_torch", self.trained, self._size) if self.learns else 0
        width = self.shapes.layer.hidden if self.stacks_head else 0
        copied = self.how.stream * self.shapes.vocabulary * width
        return weights + copied + self.how.adapter * numel(self.shapes.adapter) + states

    @property
    def trained(self) -> tuple[Shape, ...]:
        """What of it learns, if it does."""
        return self.shapes.adapter or self.shapes.parameters

    @property
    def _size(self) -> int:
        return self.how.adapter if self.shapes.adapter else self.how.stream

    def passing(self, length: int) -> list[Items]:
        """Bytes of a pass over rows of this many tokens, at its worst moments, item by item."""
        layer, batch = self.shapes.layer, Batch(self.rows, length)
        ends = boundary(layer, self.how, batch)
        if self.learns:
            return self._learning(batch)
        head = _TILE + ends if self.has_head else 0
        if self.item == EXPERTS:  # a product takes their states, three times in float32
            head = 12 * layer.hidden * batch.tokens
        return [
            {"activations": ends, "layer at work": forward_work(layer, self.how, batch)},
            {"activations": ends, "LM head": head},
        ]

    def _learning(self, batch: Batch) -> list[Items]:
        """A layer's backward pass, with what all layers keep, and the optimizer's step."""
        layer, how = self.shapes.layer, self.how
        whole = kept_by_layer(layer, how, batch)
        of_layer = boundary(layer, how, batch) if self.checkpointing else whole
        kept = self.shapes.num_layers * of_layer + kept_by_end(layer, how, batch)
        again = whole if self.checkpointing else 0
        gradients = {"gradients": self._size * numel(self.trained)}
        work = {"layer at work": again + backward_work(layer, how, batch)}
        # torch's AdamW goes over all parameters at once, with one intermediate of their size.
        step = {"optimizer step": gradients["gradients"]}
        return [gradients | {"activations": kept} | work, gradients | step]


def computing(
    shapes: Shapes, dtype: str, compute: int | None = None, *, learns: bool = False
) -> Numbers:
    """How a model computes that stands beside.

    Args:
        shapes: its own.
        dtype: of its weights; "auto" for that of its checkpoint.
        compute: bytes inside autocast; None without one.
        learns: whether it is trained.
    """
    size = DTYPE_BYTES[(shapes.dtype or "float32") if dtype == "auto" else dtype]
    return Numbers(
        stream=size,
        compute=compute or size,
        adapter=4 if shapes.adapter else 0,
        trains_base=learns and not shapes.adapter,
        quantised=False,
        dropout=False,
        attention="sdpa",
    )
