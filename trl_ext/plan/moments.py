"""What comes on top while text is generated, scored and trained on, at the worst moment of each."""

from collections.abc import Sequence
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
from trl_ext.plan.beside import EXPERTS, Beside
from trl_ext.plan.passes import (
    cache_bytes,
    divergence_bytes,
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
    rows = max(run.rollout_rows, run.eval_rows)
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


def scoring(shapes: Shapes, run: Run, beside: Sequence[Beside]) -> Items:
    """The worst of: passes of the policy without gradients, of rewards, scorers and experts."""
    evaluated = replace(run, rows=max(run.eval_rows, run.rows if run.scores else 0))
    experts = [each for each in beside if each.item == EXPERTS]
    moments = [m for e in beside if e not in experts for m in e.passing(_batch(run).length)]
    if evaluated.rows:
        for each in _backbones(shapes, run):
            moments += _own_scoring(each, evaluated, experts)
    if run.eval_rows:
        more = [replace(e, rows=e.rows // run.rows * run.eval_rows) for e in experts]
        moments += [m for each in more for m in each.passing(_batch(run).length)]
    return _larger(*moments)


def _own_scoring(shapes: Shapes, run: Run, experts: Sequence[Beside]) -> list[Items]:
    """A micro-batch at a time: the layers, then the head."""
    how, layer = run.numbers, shapes.layer
    batch = _batch(run)
    ends = {"activations": boundary(layer, how, batch)}
    casts = _all_casts(shapes, how)
    common = {"half-precision copies": casts, "gathered weights": _gathered(shapes, run)}
    tile = _head(shapes, run, experts, backward=False)
    in_layer = {"layer at work": forward_work(layer, how, batch)}
    return [common | ends | in_layer, common | ends | {"LM head": tile}]


def _batch(run: Run) -> Batch:
    return Batch(run.rows, run.prompt + run.completion)


def _scored_tokens(run: Run) -> int:
    """Completion tokens of a micro-batch; offline rows count whole, a reward model has no head."""
    return 0 if run.trainer == "reward" else run.rows * run.completion


def training(shapes: Shapes, run: Run, stays: Items, experts: Sequence[Beside]) -> Items:
    """The worst of: the end of the forward pass, the head's and a layer's backward, the step.

    Experts are read when the student has been, whose activations wait.
    """
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
    tile = {"LM head": _head(shapes, run, experts, backward=False)}
    casts = _all_casts(shapes, run.numbers) if run.checkpointing else 0
    moments.append(at_start | ends | {"half-precision copies": casts} | tile)
    moments.append(at_start | ends | {"LM head": _head(shapes, run, experts, backward=True)})
    moments.append(at_start | ends | {"layer at work": last_norm_work(shapes.layer, _batch(run))})
    moments += _layer_moments(shapes, run, kept, at_start, with_gradients)
    passes = [moment for each in experts for moment in each.passing(_batch(run).length)]
    moments += [at_start | _together(ends, moment) for moment in passes]
    gathered = {"gathered weights": _gathered(shapes, run)}
    return stays | gathered | _larger(*moments)


def _together(one: Items, other: Items) -> Items:
    return one | {item: one.get(item, 0) + count for item, count in other.items()}


def _layer_moments(
    shapes: Shapes, run: Run, kept: Items, at_start: Items, with_gradients: Items
) -> list[Items]:
    """The backward pass of the last layer, with all that is kept, and of the first, with all
    gradients there.

    The gradient of a head that is tied to the embedding waits for the embedding's.
    """
    how, layer = run.numbers, shapes.layer
    work = {"layer at work": max(_at_work(each, run) for each in _backbones(shapes, run))}
    tied = how.trains_base and not shapes.head and _scored_tokens(run)
    waiting = {"LM head": how.stream * shapes.vocabulary * layer.hidden if tied else 0}
    first = {"activations": kept["activations"] // shapes.num_layers}
    return [at_start | kept | work | waiting, with_gradients | first | work | waiting]


def _at_work(shapes: Shapes, run: Run) -> int:
    """A layer's backward pass; with checkpointing what it keeps is there only now."""
    how, layer, batch = run.numbers, shapes.layer, _batch(run)
    again = kept_by_layer(layer, how, batch) if run.checkpointing else 0
    return again + backward_work(layer, how, batch)


def _backbones(shapes: Shapes, run: Run) -> list[Shapes]:
    """Models whose activations wait together: a critic with a backbone has its own."""
    has_own = run.critic in ("adapter", "model")
    return [shapes, *([run.critic_shapes or shapes] if has_own else [])]


def _kept(shapes: Shapes, run: Run) -> Items:
    """What all layers leave for the backward pass, and the mask of pairs of tokens."""
    how, batch = run.numbers, _batch(run)
    of_layer = boundary if run.checkpointing else kept_by_layer
    backbones = _backbones(shapes, run)
    layers = sum(each.num_layers * of_layer(each.layer, how, batch) for each in backbones)
    return {"activations": layers + batch.rows * batch.length**2}


def _kept_at_end(shapes: Shapes, run: Run) -> int:
    """What stands when the forward pass ends: last norm, hidden states, a critic's float32."""
    backbones, batch = _backbones(shapes, run), _batch(run)
    values = 4 * backbones[-1].layer.hidden * batch.tokens if run.critic else 0
    return sum(kept_by_end(each.layer, run.numbers, batch) for each in backbones) + values


def _head(shapes: Shapes, run: Run, experts: Sequence[Beside], *, backward: bool) -> int:
    tokens, how, layer = _scored_tokens(run), run.numbers, shapes.layer
    if not tokens:
        return 0
    kl = vocabulary_kl_bytes(run.kl_estimator, shapes.vocabulary)
    if run.trainer == "poe_distillation":
        teacher = sum(e.how.stream * e.shapes.layer.hidden for e in experts if not e.is_shared)
        kl += divergence_bytes(tokens, teacher, how, backward=backward)
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
