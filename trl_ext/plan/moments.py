"""What comes on top while text is generated, scored and trained on, at the worst moment of each."""

from dataclasses import replace

from trl_ext.plan.activations import (
    Batch,
    Numbers,
    adapter_casts,
    boundary,
    kept_by_end,
    kept_by_layer,
    weight_casts,
)
from trl_ext.plan.passes import (
    cache_bytes,
    growing_bytes,
    head_backward,
    head_tile,
    sampling_bytes,
    vocabulary_kl_bytes,
)
from trl_ext.plan.resident import step_bytes
from trl_ext.plan.run import Run
from trl_ext.plan.shapes import Shapes, numel
from trl_ext.plan.standing import Items, critic_bytes, gradient_bytes
from trl_ext.plan.work import backward_work, forward_work, last_norm_work


def _gathered(shapes: Shapes, run: Run) -> int:
    """Weights that sharding puts together for use: the layer at work and the next."""
    if run.division.kind != "zero3":
        return 0
    return 2 * run.numbers.compute * shapes.layer.parameters


def generating(shapes: Shapes, run: Run, stays: Items, vllm: int) -> Items:
    """The worse of reading the prompts and of the last token."""
    if run.uses_vllm:
        return stays | {"vLLM": vllm}
    how, layer = run.numbers, shapes.layer
    rows = run.rollout_rows
    has_autocast = not how.adapter  # a generating PeftModel runs what is inside, without it
    plain = how if has_autocast else replace(how, compute=how.stream)
    prompts, whole = Batch(rows, run.prompt), Batch(rows, run.prompt + run.completion)
    casts = _all_casts(shapes, how) if has_autocast else 0
    gathered = how.stream * numel(shapes.parameters) if run.gathers else _gathered(shapes, run)
    common = {"half-precision copies": casts, "gathered weights": gathered}
    reading = {
        "KV cache": cache_bytes(layer, shapes.num_layers, prompts, plain),
        "layer at work": forward_work(layer, plain, prompts, is_autocast=has_autocast),
    }
    last = {
        "KV cache": cache_bytes(layer, shapes.num_layers, whole, plain),
        "layer at work": growing_bytes(layer, whole, plain),
        "sampling": sampling_bytes(rows, shapes.vocabulary, plain),
    }
    return stays | common | _larger(reading, last)


def _all_casts(shapes: Shapes, how: Numbers) -> int:
    """Autocast's copies of trained weights, which it keeps from the first layer to the last."""
    casts = weight_casts if how.trains_base else adapter_casts
    return shapes.num_layers * casts(shapes.layer.projections, how)


def _larger(*moments: Items) -> Items:
    return max(moments, key=lambda items: sum(items.values()))


def scoring(shapes: Shapes, run: Run) -> Items:
    """Passes without gradients, a micro-batch at a time: the layers, then the head."""
    how, layer = run.numbers, shapes.layer
    batch = _batch(run)
    ends = boundary(layer, how, batch)
    casts = _all_casts(shapes, how)
    common = {"half-precision copies": casts, "gathered weights": _gathered(shapes, run)}
    in_layer = {"activations": ends, "layer at work": forward_work(layer, how, batch)}
    tile = head_tile(_scored_tokens(run), shapes.vocabulary, layer, how)
    return common | _larger(in_layer, {"activations": ends, "LM head": tile})


def _batch(run: Run) -> Batch:
    return Batch(run.rows, run.prompt + run.completion)


def _scored_tokens(run: Run) -> int:
    """Completion tokens of a micro-batch; offline rows count whole, a reward model has no head."""
    return 0 if run.trainer == "reward" else run.rows * run.completion


def training(shapes: Shapes, run: Run, stays: Items) -> Items:
    """The worst of: the end of the forward pass, the head's and a layer's backward, the step."""
    gradients = gradient_bytes(shapes, run)
    _, of_critic = critic_bytes(shapes, run)
    divided = run.division.over("zero2", "zero3")
    stays = stays | {"critic": stays["critic"] + 4 * numel(of_critic)}
    step = step_bytes(run.optimizer, gradients) // divided
    with_gradients = {"gradients": gradients // divided}
    moments = [with_gradients | {"optimizer step": step}]
    # With accumulation the gradients of earlier micro-batches are there from the start.
    at_start = with_gradients if run.accumulation > 1 else {"gradients": 0}
    kept = _kept(shapes, run)
    ends = kept | {"activations": kept["activations"] + _kept_at_end(shapes, run)}
    tile = {"LM head": _head(shapes, run, backward=False)}
    casts = _all_casts(shapes, run.numbers) if run.checkpointing else 0
    moments.append(at_start | ends | {"half-precision copies": casts} | tile)
    moments.append(at_start | ends | {"LM head": _head(shapes, run, backward=True)})
    moments.append(at_start | ends | {"layer at work": last_norm_work(shapes.layer, _batch(run))})
    moments += _layer_moments(shapes, run, kept, at_start, with_gradients)
    gathered = {"gathered weights": _gathered(shapes, run)}
    return stays | gathered | _larger(*moments)


def _layer_moments(
    shapes: Shapes, run: Run, kept: Items, at_start: Items, with_gradients: Items
) -> list[Items]:
    """The backward pass of the last layer, with all that is kept, and of the first, with all
    gradients there.

    The gradient of a head that is tied to the embedding waits for the embedding's.
    """
    how, layer, batch = run.numbers, shapes.layer, _batch(run)
    again = kept_by_layer(layer, how, batch) if run.checkpointing else 0
    work = {"layer at work": again + backward_work(layer, how, batch)}
    tied = how.trains_base and not shapes.head and _scored_tokens(run)
    waiting = {"LM head": how.stream * shapes.vocabulary * layer.hidden if tied else 0}
    first = {"activations": kept["activations"] // shapes.num_layers}
    return [at_start | kept | work | waiting, with_gradients | first | work | waiting]


def _passes(run: Run) -> int:
    """Forward passes whose activations wait together: a critic with a backbone has its own."""
    return 2 if run.critic in ("adapter", "model") else 1


def _kept(shapes: Shapes, run: Run) -> Items:
    """What all layers leave for the backward pass, and the mask of pairs of tokens."""
    how, layer, batch = run.numbers, shapes.layer, _batch(run)
    of_layer = (boundary if run.checkpointing else kept_by_layer)(layer, how, batch)
    mask = batch.rows * batch.length**2
    return {"activations": _passes(run) * shapes.num_layers * of_layer + mask}


def _kept_at_end(shapes: Shapes, run: Run) -> int:
    """What stands when the forward pass ends: last norm, hidden states, a critic's float32."""
    values = 4 * shapes.layer.hidden * _batch(run).tokens if run.critic else 0
    return _passes(run) * kept_by_end(shapes.layer, run.numbers, _batch(run)) + values


def _head(shapes: Shapes, run: Run, *, backward: bool) -> int:
    tokens, how, layer = _scored_tokens(run), run.numbers, shapes.layer
    if not tokens:
        return 0
    kl = vocabulary_kl_bytes(run.kl_estimator, shapes.vocabulary)
    if not backward:
        return kl + head_tile(tokens, shapes.vocabulary, layer, how)
    return kl + head_backward(
        tokens,
        shapes.vocabulary,
        layer,
        how,
        trains_head=how.trains_base,
        padded=_batch(run).tokens,
    )
