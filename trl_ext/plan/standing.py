"""What is on a card in every phase: weights, adapters, reference, critic, optimizer states."""

from trl_ext.plan.resident import (
    DTYPE_BYTES,
    int8_bytes,
    nf4_bytes,
    optimizer_bytes,
)
from trl_ext.plan.run import Run
from trl_ext.plan.shapes import Shape, Shapes, numel

Items = dict[str, int]


def standing(shapes: Shapes, run: Run) -> Items:
    """Item -> bytes on each card, from the first optimizer step on.

    ZeRO 1 divides optimizer states and float32 copies over the cards, ZeRO 2 the gradients too,
    ZeRO 3 and FSDP also weights, adapters and reference. DDP keeps gradients a second time, in
    buckets.
    """
    of_weights = run.division.over("zero3")
    of_states = run.division.over("zero1", "zero2", "zero3")
    trained = _trained(shapes, run)
    critic, critic_trained = critic_bytes(shapes, run)
    adapters = numel(shapes.adapter) * run.numbers.adapter
    adapters += numel(shapes.saved_whole) * run.numbers.stream
    return {
        "weights": _weights(shapes, run) // of_weights,
        "adapters": adapters // of_weights,
        "reference": _model_bytes(shapes, run) // of_weights if run.copies_reference else 0,
        "critic": critic + optimizer_bytes(run.optimizer, critic_trained, 4),
        "master copies": 4 * numel(trained) // of_states if run.division.is_deepspeed else 0,
        "optimizer states": _states(shapes, run, trained) // of_states,
        "DDP buckets": gradient_bytes(shapes, run) if run.division.kind == "ddp" else 0,
    }


def _weights(shapes: Shapes, run: Run) -> int:
    """As loaded, but for what FSDP trains: it divides float32 weights and computes in half."""
    if run.numbers.trains_base:
        return numel(shapes.parameters) * _trained_size(run)
    return _model_bytes(shapes, run)


def _states(shapes: Shapes, run: Run, trained: tuple[Shape, ...]) -> int:
    size = 4 if run.division.is_deepspeed else run.numbers.adapter or _trained_size(run)
    embedding = shapes.vocabulary * shapes.layer.hidden if run.numbers.trains_base else 0
    return optimizer_bytes(run.optimizer, trained, size, embedding=embedding)


def _trained_size(run: Run) -> int:
    """Bytes of a trained weight of the model itself; FSDP keeps a float32 one."""
    if run.division.kind == "zero3" and not run.division.is_deepspeed and run.numbers.compute == 2:
        return 4
    return run.numbers.stream


def _model_bytes(shapes: Shapes, run: Run) -> int:
    """Weights in the dtype they are loaded in, or quantised."""
    others = run.numbers.stream * numel(shapes.other)
    if run.quantisation == "8bit":
        return int8_bytes(shapes.linear) + others
    if run.quantisation:
        nested = run.quantisation.endswith("nested")
        return nf4_bytes(shapes.linear, nested=nested) + others
    return run.numbers.stream * numel(shapes.linear) + others


def _trained(shapes: Shapes, run: Run) -> tuple[Shape, ...]:
    if run.numbers.trains_base:
        return shapes.parameters
    return shapes.adapter + shapes.saved_whole


def critic_bytes(shapes: Shapes, run: Run) -> tuple[int, tuple[Shape, ...]]:
    """Bytes of PPO's critic, and the shapes that it trains: a float32 head, and what is below."""
    shapes = run.critic_shapes or shapes
    head = ((1, shapes.layer.hidden), (1,))
    if run.critic in ("", "head"):
        return (4 * numel(head), head) if run.critic else (0, ())
    below = _model_bytes(shapes.headless, run) if run.critic == "model" else 0
    if run.numbers.trains_base:
        return below + 4 * numel(head), shapes.headless.parameters + head
    return below + 4 * numel(shapes.adapter + head), shapes.adapter + head


def gradient_bytes(shapes: Shapes, run: Run) -> int:
    if run.numbers.trains_base:
        return numel(shapes.parameters) * _trained_size(run)
    size = run.numbers.adapter
    return numel(shapes.adapter) * size + numel(shapes.saved_whole) * run.numbers.stream


def loading(shapes: Shapes, run: Run, stays: Items, vllm: int) -> Items:
    """Weights as they come in: a tensor that is quantised on the card is there in full as well."""
    loaded = {name: stays[name] for name in ("weights", "adapters", "reference", "DDP buckets")}
    critic, _ = critic_bytes(shapes, run)
    largest = max((numel((shape,)) for shape in shapes.linear), default=0)
    unpacked = DTYPE_BYTES[run.dtype] * largest if run.quantisation else 0
    return loaded | {"critic": critic, "layer at work": unpacked, "vLLM": vllm}
