"""KL over the vocabulary from hidden states, against the same KL of full logits.

Tolerance `close`: the kernel works in float32 and takes differences of log-normalisers, which are
below 16 in size here, so one rounding of one is at most 16 · 2⁻²⁴ = 1e-6; the handful of roundings
that a value has gives 5e-6. A gradient is a sum over at most 40 tokens of (a probability of at most
1) × (a log-ratio with that error) × (a hidden state or weight of at most 4): errors of
independent sign give √40 · 4 · 1e-6 = 2e-5.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.distributed import (
    HashStore,
    destroy_process_group,
    init_device_mesh,
    init_process_group,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from trl.kernels import chunked_divergence
from trl.trainer.utils import add_fused_lm_head

from tests.tiny import VOCABULARY, save_tiny_llama
from trl_ext import vocabulary_kl
from trl_ext.errors import ConfigError
from trl_ext.functional import exact_forward_kl, exact_kl, topk_kl
from trl_ext.oracle import Enumeration, TabularLM, TabularLMConfig, kl_divergence
from trl_ext.vocabulary_kl import (
    Head,
    exact_forward_kl_of_hidden,
    exact_kl_of_hidden,
    hidden_states_of,
    topk_kl_of_hidden,
)

B, T, H, REF_H, V, K = 4, 10, 5, 3, 23, 4
close = partial(torch.testing.assert_close, atol=5e-6, rtol=1e-5)
gradients_close = partial(torch.testing.assert_close, atol=2e-5, rtol=1e-5)

# Ours, and the function of full logits that it must equal.
PAIRS = {
    "exact": (exact_kl_of_hidden, exact_kl),
    "forward": (exact_forward_kl_of_hidden, exact_forward_kl),
    "topk": (partial(topk_kl_of_hidden, k=K), partial(topk_kl, k=K)),
}
each_divergence = pytest.mark.parametrize(("of_hidden", "of_logits"), PAIRS.values(), ids=PAIRS)


class Case:
    """Random hidden states and heads of π and π_ref, as leaves; about a third masked out."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0, **head: Any):
        generator = torch.Generator().manual_seed(seed)

        def leaf(*shape: int) -> Tensor:
            values = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
            return values.requires_grad_()

        self.hidden, self.ref_hidden = leaf(B, T, H), leaf(B, T, REF_H)
        self.head = Head(leaf(V, H), leaf(V), **head)
        self.ref_head = Head(leaf(V, REF_H))
        self.mask = (torch.rand(B, T, generator=generator) < 0.7).int()

    def of_hidden(self, divergence: Callable[..., Tensor], temperature: float = 1.0) -> Tensor:
        given = (self.hidden, self.head, self.ref_hidden, self.ref_head)
        return divergence(*given, temperature=temperature, mask=self.mask)

    def of_logits(self, divergence: Callable[..., Tensor], temperature: float = 1.0) -> Tensor:
        """From full logits in float64, 0 where masked out."""
        logits = logits_of(self.head, self.hidden)
        ref_logits = logits_of(self.ref_head, self.ref_hidden).detach()
        return divergence(logits, ref_logits, temperature=temperature) * self.mask

    def gradients(self, values: Tensor) -> tuple[Tensor, ...]:
        """Of a sum of `values` with unequal weights: to the hidden states and the head of π."""
        weights = torch.linspace(-1, 2, values.numel(), dtype=values.dtype).view_as(values)
        assert self.head.bias is not None
        leaves = (self.hidden, self.head.weight, self.head.bias)
        return torch.autograd.grad((weights * values).sum(), leaves)


def logits_of(head: Head, hidden: Tensor) -> Tensor:
    """The definition of a head, in float64."""
    assert head.weight.ndim == 2
    logits = hidden.double() @ head.weight.double().T
    if head.bias is not None:
        logits = logits + head.bias.double()
    logits = head.logit_scale * logits
    return logits if head.softcap is None else head.softcap * (logits / head.softcap).tanh()


def assert_equal(case: Case, of_hidden: Any, of_logits: Any, temperature: float = 1.0) -> None:
    ours = case.of_hidden(of_hidden, temperature)
    full = case.of_logits(of_logits, temperature)
    assert ours.shape == (B, T) and ours.dtype == torch.float32
    assert torch.equal(ours == 0, case.mask == 0)
    close(ours.double(), full)
    for got, expected in zip(case.gradients(ours), case.gradients(full), strict=True):
        gradients_close(got.double(), expected.double())


@pytest.mark.equation("E26", "E27")
@each_divergence
@pytest.mark.parametrize("temperature", [0.7, 1, 2.0])
def test_values_and_gradients_are_those_of_full_logits(of_hidden, of_logits, temperature):
    assert_equal(Case(), of_hidden, of_logits, temperature)


@each_divergence
@pytest.mark.parametrize(
    "head", [{"logit_scale": 0.25}, {"softcap": 2.0}, {"logit_scale": 1.5, "softcap": 3.0}]
)
def test_logit_scale_and_softcap(of_hidden, of_logits, head):
    assert_equal(Case(**head), of_hidden, of_logits, temperature=1.3)


@each_divergence
@pytest.mark.parametrize("tokens", [1, 3, 7, 1000])
def test_chunk_boundaries(monkeypatch, of_hidden, of_logits, tokens):
    """Vocabulary tiles of 23 = 4·5 + 3, TRL's own token tiles of 2, ours of 1 to all."""
    monkeypatch.setattr(vocabulary_kl, "TOKENS_AT_ONCE", tokens)
    monkeypatch.setattr(vocabulary_kl, "TOPK_TOKENS_AT_ONCE", tokens)
    monkeypatch.setattr(chunked_divergence, "VOCAB_CHUNK_SIZE", 5)
    monkeypatch.setattr(chunked_divergence, "TOKEN_CHUNK_SIZE", 2)
    assert_equal(Case(), of_hidden, of_logits)


class LargestTensor(TorchDispatchMode):
    """The elements of the largest tensor that an operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        found = result if isinstance(result, tuple | list) else [result]
        sizes = [each.numel() for each in found if isinstance(each, Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


@each_divergence
def test_the_logits_of_all_tokens_never_exist(monkeypatch, of_hidden, of_logits):
    """With 5 tokens at once no tensor is larger than a tile of theirs, in either pass."""
    monkeypatch.setattr(vocabulary_kl, "TOKENS_AT_ONCE", 5)
    monkeypatch.setattr(vocabulary_kl, "TOPK_TOKENS_AT_ONCE", 5)
    monkeypatch.setattr(chunked_divergence, "VOCAB_CHUNK_SIZE", V)
    # (B, T, H) and the (V, H) gradient are inevitable and, here, larger than the tile.
    inevitable = max(5 * V, B * T * H, V * H)
    case = Case()
    with LargestTensor() as largest:
        case.gradients(case.of_hidden(of_hidden))
    assert largest.numel == inevitable < case.mask.sum() * V
    with LargestTensor() as largest:
        case.of_logits(of_logits)
    assert largest.numel == B * T * V


@each_divergence
def test_no_logits_are_kept_for_the_backward_pass(monkeypatch, of_hidden, of_logits):
    monkeypatch.setattr(vocabulary_kl, "TOPK_TOKENS_AT_ONCE", 5)
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        Case().of_hidden(of_hidden)
    assert kept and not [shape for shape in kept if len(shape) > 1 and shape[-1] == V]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        Case().of_logits(of_logits)
    assert (B, T, V) in kept


@each_divergence
def test_what_is_masked_out_is_not_read(of_hidden, of_logits):
    """Masking equals slicing, and a NaN that is masked out reaches neither value nor gradient."""
    case = Case()
    with torch.no_grad():
        for states in (case.hidden, case.ref_hidden):
            states[case.mask == 0] = torch.nan
    values = case.of_hidden(of_hidden)
    clean = Case().of_hidden(of_hidden)
    assert torch.equal(values, clean)
    hidden, *of_head = case.gradients(values)
    assert (hidden[case.mask == 0] == 0).all() and hidden[case.mask == 1].abs().min() > 0
    assert all(gradient.isfinite().all() for gradient in of_head)


@each_divergence
def test_nothing_kept_is_a_differentiable_zero(of_hidden, of_logits):
    case = Case()
    case.mask.zero_()
    values = case.of_hidden(of_hidden)
    assert torch.equal(values, torch.zeros(B, T))
    assert all((gradient == 0).all() for gradient in case.gradients(values))


@each_divergence
def test_the_reference_is_a_constant(of_hidden, of_logits):
    case = Case()
    case.of_hidden(of_hidden).sum().backward()
    assert case.ref_hidden.grad is None and case.ref_head.weight.grad is None
    assert case.hidden.grad is not None


@each_divergence
def test_without_gradient_there_is_no_graph(of_hidden, of_logits):
    case = Case()
    with torch.no_grad():
        values = case.of_hidden(of_hidden)
    assert not values.requires_grad
    close(values.double(), case.of_logits(of_logits).detach())


def test_topk_is_exact_in_float64_and_with_the_whole_vocabulary_is_the_exact_kl():
    case = Case(torch.float64)
    wide = partial(topk_kl_of_hidden, k=V)
    torch.testing.assert_close(case.of_hidden(wide), case.of_logits(exact_kl))
    ours, full = case.of_hidden(PAIRS["topk"][0]), case.of_logits(PAIRS["topk"][1])
    torch.testing.assert_close(ours, full)
    for got, expected in zip(case.gradients(ours), case.gradients(full), strict=True):
        torch.testing.assert_close(got, expected)


def test_at_the_reference_the_kl_is_0_to_rounding():
    case = Case()
    value = exact_kl_of_hidden(
        *(case.hidden, case.head, case.hidden, case.head), temperature=1.0, mask=case.mask
    )
    assert value.abs().max() <= 5e-6


@each_divergence
def test_projections_are_rounded_as_trl_rounds_them(of_hidden, of_logits):
    """Autocast to bfloat16 rounds states and weights, and not the logits."""
    case, rounded = Case(), Case()
    with torch.no_grad():
        # A bias is not multiplied, and float32 in the kernel; 0 is the same in every dtype.
        for one in (case, rounded):
            assert one.head.bias is not None
            one.head.bias.zero_()
        for tensor in (rounded.hidden, rounded.ref_hidden):
            tensor.copy_(tensor.bfloat16())
        for head in (rounded.head, rounded.ref_head):
            head.weight.copy_(head.weight.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        ours = case.of_hidden(of_hidden)
    close(ours.double(), rounded.of_logits(of_logits))


@each_divergence
def test_a_bfloat16_head_is_not_rounded_once_a_chunk(monkeypatch, of_hidden, of_logits):
    """The gradient of 28 chunks is as near to float64's as that of one."""
    case = Case(torch.bfloat16)
    exact = case.gradients(case.of_logits(of_logits))[1].double()

    def error(tokens: int) -> float:
        monkeypatch.setattr(vocabulary_kl, "TOKENS_AT_ONCE", tokens)
        monkeypatch.setattr(vocabulary_kl, "TOPK_TOKENS_AT_ONCE", tokens)
        gradient = case.gradients(case.of_hidden(of_hidden))[1]
        assert gradient.dtype == torch.bfloat16
        return (gradient.double() - exact).norm().item()

    assert error(1) <= 1.1 * error(1000)


def test_refused_shapes():
    case, other = Case(), Case()
    case.mask = case.mask[:, 1:]
    with pytest.raises(ValueError, match=r"do not fit: got \(4, 10, 5\), \(4, 10, 3\), \(4, 9\)"):
        case.of_hidden(exact_kl_of_hidden)
    other.head = Head(torch.zeros(V, H + 1))
    with pytest.raises(ValueError, match=r"width 5 do not fit a head \(V, H\) of shape \(23, 6\)"):
        other.of_hidden(exact_kl_of_hidden)
    other.head = Head(torch.zeros(V + 1, H))
    with pytest.raises(ConfigError, match="has 24 tokens and the reference's 23"):
        other.of_hidden(PAIRS["topk"][0])
    with pytest.raises(ValueError, match="k must be at least 1"):
        Case().of_hidden(partial(topk_kl_of_hidden, k=0))


# --- models


IDS = torch.tensor([[1, 2, 3, 4, 5], [3, 1, 1, 2, 0]])

SIZES: dict[str, Any] = {
    "vocab_size": 17,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": {},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0},
    "gemma2": {"final_logit_softcapping": 1.5},
    "phi": {},  # has a bias
    "hyperclovax": {"logits_scaling": 4.0},
}


@pytest.mark.parametrize(("family", "options"), FAMILIES.items(), ids=FAMILIES)
def test_hidden_states_and_head_give_the_logits_of_the_model(family, options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **options))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(50)
        if model.get_output_embeddings().bias is not None:
            model.get_output_embeddings().bias.normal_()
    with hidden_states_of(model) as passes:
        logits = model(IDS).logits
    torch.testing.assert_close(Head.of(model).logits(passes[0]), logits)


@pytest.fixture
def llama(tmp_path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(save_tiny_llama(tmp_path))


def with_lora(model: Any, **options: Any) -> PeftModel:
    """Adapters whose effect is not 0."""
    options = {"target_modules": ["q_proj", "v_proj"]} | options
    adapted = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **options))
    assert isinstance(adapted, PeftModel)
    return adapted


def base_of(model: PeftModel) -> Any:
    return model.get_base_model()


def kl_gradients(model: Any, outer: Any) -> tuple[Tensor, list[Tensor]]:
    """KL to a fixed reference of one forward pass of `outer` around `model`, and its gradients.

    The loss also contains an output of the pass, as any policy loss does.
    """
    ref_head = Head(torch.linspace(-1, 1, VOCABULARY * 16).view(VOCABULARY, 16))
    with hidden_states_of(model) as passes:
        log_probability = outer(IDS).logits.log_softmax(-1)[..., 1].mean()
        states = passes[0][:, :-1]
        mask = torch.ones(states.shape[:2])
        values = exact_kl_of_hidden(
            *(states, Head.of(model), states.detach(), ref_head), temperature=1.0, mask=mask
        )
        (values.sum() - log_probability).backward()
    # Gradient checkpointing runs layers again in the backward pass, and not the backbone.
    assert len(passes) == 1
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return values.detach(), found


@pytest.mark.parametrize("lora", [False, True])
def test_gradient_checkpointing_changes_nothing(llama, lora):
    outer = with_lora(llama) if lora else llama
    outer.train()
    plain_values, plain = kl_gradients(llama, outer)
    outer.gradient_checkpointing_enable({"use_reentrant": False})
    if lora:
        llama.enable_input_require_grads()
    values, checkpointed = kl_gradients(llama, outer)
    torch.testing.assert_close(values, plain_values)
    assert len(plain) == len(checkpointed) > 0
    for got, expected in zip(checkpointed, plain, strict=True):
        torch.testing.assert_close(got, expected)
        assert expected.abs().max() > 0


def test_an_adapter_counts_when_it_is_active(llama):
    """KL of the adapted policy to itself with the adapter disabled, from one hook on the base."""
    model = with_lora(llama)
    with hidden_states_of(base_of(model)) as passes:
        logits = model(IDS).logits
        with torch.no_grad(), model.disable_adapter():
            ref_logits, ref_head = model(IDS).logits, Head.of(base_of(model))
    hidden, ref_hidden = passes
    assert hidden.requires_grad and not ref_hidden.requires_grad
    values = exact_kl_of_hidden(
        hidden, Head.of(llama), ref_hidden, ref_head, temperature=1.0, mask=torch.ones(IDS.shape)
    )
    close(values, exact_kl(logits, ref_logits))
    assert values.min() > 1e-4


def test_a_head_that_is_trained_whole_beside_an_adapter(llama):
    model = with_lora(llama, modules_to_save=["lm_head"])
    with torch.no_grad():
        Head.of(base_of(model)).weight.mul_(2)
    with hidden_states_of(base_of(model)) as passes:
        logits = model(IDS).logits
        with model.disable_adapter():
            ref_logits, ref_head = model(IDS).logits, Head.of(base_of(model))
    head = Head.of(base_of(model))
    assert head.weight.requires_grad and not torch.equal(head.weight, ref_head.weight)
    torch.testing.assert_close(head.logits(passes[0]), logits)
    torch.testing.assert_close(ref_head.logits(passes[1]), ref_logits)


def test_heads_that_cannot_be_read_are_refused(llama):
    model = with_lora(llama, target_modules=["lm_head"])
    with pytest.raises(ConfigError, match=r"has an adapter.*Leave lm_head out of target_modules"):
        Head.of(base_of(model))
    with model.disable_adapter():
        Head.of(base_of(model))
    head = llama.get_output_embeddings().base_layer
    for weight, says in ((torch.zeros(0), "ZeRO-3"), (torch.zeros(6, 16).byte(), "quantised to")):
        head.weight = torch.nn.Parameter(weight, requires_grad=False)
        llama.set_output_embeddings(head)
        with pytest.raises(ConfigError, match=says):
            Head.of(llama)


def test_wrapped_models_are_refused(llama):
    for wrapped in (with_lora(llama), torch.nn.Sequential(llama), llama.model):
        with pytest.raises(ConfigError, match=f"got a {type(wrapped).__name__}.*Unwrap it"):
            Head.of(wrapped)  # pyright: ignore[reportArgumentType]
        with pytest.raises(ConfigError, match="Unwrap it"), hidden_states_of(wrapped):  # pyright: ignore[reportArgumentType]
            pass


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    destroy_process_group()


def test_a_pass_through_ddp_counts(llama, one_process):
    values, alone = kl_gradients(llama, llama)
    through_ddp, wrapped = kl_gradients(llama, DistributedDataParallel(llama))
    torch.testing.assert_close(through_ddp, values)
    for got, expected in zip(wrapped, alone, strict=True):
        torch.testing.assert_close(got, expected)


def test_a_head_split_up_by_fsdp2_is_gathered(llama, one_process):
    values, alone = kl_gradients(llama, llama)
    sharded: Any = fully_shard(llama, mesh=init_device_mesh("cpu", (1,)))
    assert isinstance(sharded.lm_head.weight, DTensor)
    whole = Head.of(sharded).weight
    assert not isinstance(whole, DTensor) and whole.requires_grad
    through_fsdp, split = kl_gradients(sharded, sharded)
    torch.testing.assert_close(through_fsdp, values)
    for got, expected in zip(split, alone, strict=True):
        assert isinstance(got, DTensor)
        torch.testing.assert_close(got.full_tensor(), expected)


def test_the_pass_of_trls_fused_head_counts(llama):
    expected = llama.model(IDS).last_hidden_state
    add_fused_lm_head(llama)
    with hidden_states_of(llama) as passes:
        llama(IDS, labels=IDS, fused_lm_head=True)
    torch.testing.assert_close(passes, [expected])


def test_the_hook_goes_away_with_the_context(llama):
    with pytest.raises(KeyError), hidden_states_of(llama) as passes:
        llama(IDS)
        raise KeyError
    llama(IDS)
    assert len(passes) == 1


@pytest.mark.equation("E26", "E27")
def test_on_the_oracle_the_kl_is_the_enumerated_one():
    """Σ_y π(y|x) Σ_t KL_t(y_<t) = KL(π‖π_ref) of completions, with its whole gradient.

    Each of at most 3 KLs that add up has the error of `close`, and the gradient is one of them.
    """
    torch.manual_seed(0)
    config = TabularLMConfig(vocab_size=4, max_completion_length=3, num_prompts=2)
    policy, reference, space = TabularLM(config), TabularLM(config), Enumeration(config)
    prompts = torch.arange(1, 3).repeat_interleave(len(space))[:, None]
    ids = torch.cat([prompts, space.tokens.repeat(2, 1)], dim=1)
    with hidden_states_of(policy) as passes:
        policy(ids)
    with hidden_states_of(reference) as ref_passes, torch.no_grad():
        reference(ids)
    kl_at_tokens = exact_kl_of_hidden(
        *(passes[0][:, :-1], Head.of(policy), ref_passes[0][:, :-1], Head.of(reference)),
        temperature=1.0,
        mask=space.mask.repeat(2, 1),
    )
    logps = space.logps(policy)
    ours = (logps.exp() * kl_at_tokens.sum(-1).view_as(logps)).sum(-1)
    enumerated = kl_divergence(logps, space.logps(reference).detach())
    torch.testing.assert_close(ours, enumerated, atol=1.5e-5, rtol=0)
    (gradient,) = torch.autograd.grad(ours.sum(), policy.model.table.weight, retain_graph=True)
    (expected,) = torch.autograd.grad(enumerated.sum(), policy.model.table.weight)
    torch.testing.assert_close(gradient, expected, atol=1.5e-5, rtol=0)
