"""`ProductOfExperts`: a causal language model made of experts, at decoding time."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from trl_ext.errors import ConfigError, RunError
from trl_ext.functional import plausible, weighted_scores
from trl_ext.poe.cache import ProductCache, ProductOfExpertsConfig, ProductOutput
from trl_ext.poe.checks import (
    check_experts,
    check_finite,
    check_ids,
    check_outcome,
    check_source,
    checked_cutoff,
    device_of,
    model_of,
)
from trl_ext.poe.experts import Step, TokenReward, sources_of
from trl_ext.poe.weights import WeightRule


class ProductOfExperts(PreTrainedModel, GenerationMixin):
    """π(v | x_≤t) = Π_k p_k(v | x_≤t)^{w_k} / Z(x_≤t): decode from several experts as from one.

    Equation E14, for two experts P_N, P_θ of weights α and 1 − α: the target of training with the
    reward log P_N − log P_θ and the KL coefficient 1/α, had without training (Equations E15-E19).
    It is normalised at each token; trained policies approach the product of whole sequences
    (Equation E21). Works with transformers' `generate`: sampling, greedy, beams, left-padded
    batches, streamers, `num_return_sequences`.

    Experts are
    - causal language models, on one device and of one dtype;
    - LoRA adapters of one PEFT model, and that model without them: `Adapter(model, "name")`,
      `Adapter(model, None)`, or simply the two model objects. One copy of the weights and one
      batched forward pass serve them all;
    - `NGramExpert`, `NaiveBayesExpert`, or anything with log_probs(input_ids, attention_mask);
    - `TokenReward`, with weight 1/β.

    Models among them are put into evaluation mode.

    Args:
        experts: name -> expert, or a list.
        weights: name -> weight, or a list; `EntropyWeights` for weights that depend on the
            context. A weight is a number, or a function of positions (B, T), 0 = the first token
            of the completion, that returns one number each. Negative weights push away.
        plausibility: keep only tokens with at least this times the probability of the likeliest,
            as `plausible_under` sees them. None keeps all; wanted for weights that sum to 0 or
            less.
        plausible_under: name of the expert that judges; the one of the largest weight by default.
        tokenizers: name -> tokenizer, to compare vocabularies. Those of counted experts and of
            models from a local folder are found without.

    Raises:
        ConfigError: if experts differ in vocabulary, device or dtype, cannot be experts, or the
            weights sum to nothing.
    """

    config_class = ProductOfExpertsConfig
    main_input_name = "input_ids"
    _no_split_modules: ClassVar[list[str]] = []
    # What its prompts are written with, where it was loaded from paths (`load_product`).
    tokenizer: Any = None

    def __init__(
        self,
        experts: Mapping[str, Any] | Sequence[Any],
        weights: Any,
        *,
        plausibility: float | None = None,
        plausible_under: str | None = None,
        tokenizers: Mapping[str, Any] | None = None,
    ):
        named = _named(experts)
        sources = sources_of(named)
        vocab_size = check_experts(named, tokenizers or {})
        models = [model for model in map(model_of, named.values()) if model is not None]
        super().__init__(_config(models, vocab_size))
        self.experts = named
        self.sources = sources
        self.members = nn.ModuleList(models)
        self.generation_config = _generation_config(models)
        self.eval()
        for source, places in sources:
            check_source(", ".join(list(named)[place] for place in places), source)
        priors = [_prior_entropy(expert, vocab_size) for expert in named.values()]
        self.weights = WeightRule(list(named), weights, priors, plausibility is not None)
        self.plausibility = checked_cutoff(plausibility)
        self.judge = self._place(plausible_under) if plausible_under else self.weights.heaviest

    @property
    def device(self) -> torch.device:
        """Where the experts are."""
        known = (device_of(expert) for expert in self.experts.values())
        return next((device for device in known if device is not None), torch.device("cpu"))

    def new_cache(self) -> ProductCache:
        """An empty cache, for `past_key_values`."""
        return ProductCache([source for source, _ in self.sources])

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: ProductCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        prompt_lengths: Tensor | None = None,
        output_expert_logits: bool = False,
        **_: Any,
    ) -> ProductOutput:
        """The logits of the product's next token at each position.

        Args:
            input_ids: (B, T) the tokens that `past_key_values` has not seen.
            attention_mask: (B, S + T), 1 = token, with those seen.
            position_ids: (B, T), 0 = a row's first token; from the mask by default.
            past_key_values: from `new_cache`, or an earlier output.
            use_cache: whether to make a cache where none is given.
            logits_to_keep: how many of the last positions to score; 0 for all.
            prompt_lengths: (B,) tokens of each prompt, where a schedule's position 0 comes.
            output_expert_logits: whether to give what each expert said, too.

        Raises:
            RunError: if an expert's scores are not numbers, or the product leaves no token.
        """
        if past_key_values is None and use_cache:
            past_key_values = self.new_cache()
        if past_key_values is not None and not isinstance(past_key_values, ProductCache):
            raise ConfigError(
                f"past_key_values is a {type(past_key_values).__name__}; a product of experts goes "
                "on from a cache of its own: new_cache(), or an earlier output's past_key_values."
            )
        step = self._pass(input_ids, attention_mask, position_ids, past_key_values, logits_to_keep)
        scores = self._scores(step, past_key_values)
        norms = [s.logsumexp(-1) for s in scores]
        mask = step.mask[:, -step.keep :].bool()
        check_finite(list(self.experts), norms, mask)
        positions = None
        if self.weights.is_scheduled:
            first = 0 if prompt_lengths is None else _checked_lengths(prompt_lengths, input_ids)
            positions = (step.new_positions[:, -step.keep :] + 1 - first).clamp(min=0)
        keep = None
        if self.plausibility is not None:
            keep = plausible(scores[self.judge], self.plausibility)
        logps = scores
        if self.weights.by_entropy:
            logps = [s - norm[..., None] for s, norm in zip(scores, norms, strict=True)]
        weights = self.weights(logps, positions)
        product = weighted_scores(scores, weights, keep)
        log_z = product.logsumexp(-1)
        check_outcome(list(self.experts), log_z, mask)
        for expert, weight, norm in zip(self.experts.values(), weights, norms, strict=True):
            if not isinstance(expert, TokenReward):
                log_z = log_z - weight.to(norm.device) * norm
        return ProductOutput(
            logits=product,
            log_z=log_z,
            past_key_values=past_key_values,
            expert_logits=tuple(scores) if output_expert_logits else None,
        )

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, **options: Any) -> Any:
        """As transformers' `generate`, of the product. Pad prompts on the left."""
        ids = inputs if inputs is not None else options.get("input_ids")
        if ids is None:
            raise ConfigError("generate needs input_ids (B, T): a tokenizer's output, **unpacked.")
        check_ids(ids, self.device, self.config.vocab_size)
        mask = options.get("attention_mask")
        if self.weights.is_scheduled and options.get("prompt_lengths") is None:
            rows = torch.full((len(ids),), ids.size(1), device=ids.device)
            options["prompt_lengths"] = rows if mask is None else mask.sum(1)
        config = options.get("generation_config") or self.generation_config
        chosen = {name: options.get(name, getattr(config, name, None)) for name in _OF_CACHES}
        if chosen["cache_implementation"] is not None:
            raise ConfigError(
                f"cache_implementation={chosen['cache_implementation']!r} is not for a product of "
                "experts, whose cache holds those of its experts. Leave it out."
            )
        if options.get("past_key_values") is None and chosen["use_cache"] is not False:
            options["past_key_values"] = self.new_cache()
        return super().generate(inputs, **options)  # pyright: ignore[reportAttributeAccessIssue]

    @torch.no_grad()
    def log_probs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        prompt_lengths: Tensor | None = None,
    ) -> Tensor:
        """log π(v | x_≤t): row t is the distribution of the token after x_t. Equation E14.

        Args:
            input_ids: (B, T) token ids.
            attention_mask: (B, T), 1 = token, 0 = padding on either side.
            prompt_lengths: (B,) as in `forward`.

        Returns:
            (B, T, V) nats, float32, normalised over V; uniform at padding.
        """
        output = self._whole(input_ids, attention_mask, prompt_lengths)
        assert output.logits is not None
        logits = output.logits
        if attention_mask is not None:
            logits = logits.masked_fill(attention_mask[..., None] == 0, 0.0)
        return logits.log_softmax(-1)

    @torch.no_grad()
    def log_z(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        prompt_lengths: Tensor | None = None,
    ) -> Tensor:
        """log Z(x_≤t) = log Σ_v Π_k p_k(v | x_≤t)^{w_k}, nats, (B, T); 0 at padding.

        For weights α and 1 − α it is 0 where the experts agree and negative elsewhere.
        """
        log_z = self._whole(input_ids, attention_mask, prompt_lengths).log_z
        assert log_z is not None
        return log_z if attention_mask is None else log_z.masked_fill(attention_mask == 0, 0.0)

    def expert_log_probs(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Each expert's own (B, T, V), nats: name -> log p_k(v | x_≤t), or a reward's values."""
        check_ids(input_ids, self.device, self.config.vocab_size)
        with torch.no_grad():
            step = self._pass(input_ids, attention_mask, None, None, 0)
            scores = dict(zip(self.experts, self._scores(step, None), strict=True))
        return {name: self.own_log_probs(name, s) for name, s in scores.items()}

    def own_log_probs(self, name: str, logits: Tensor) -> Tensor:
        """(…, V) log-probabilities out of an expert's logits; a reward's values as they are."""
        is_reward = isinstance(self.experts[name], TokenReward)
        return logits if is_reward else logits.log_softmax(-1)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a product has no weights of its own.

        Raises:
            ConfigError: always; it says what to do.
        """
        raise ConfigError(
            "A product of experts has no weights of its own to save. Save its experts, or distil "
            "it into one model (trl_ext.PoEDistillationTrainer)."
        )

    def _whole(
        self, input_ids: Tensor, attention_mask: Tensor | None, prompt_lengths: Tensor | None
    ) -> ProductOutput:
        check_ids(input_ids, self.device, self.config.vocab_size)
        return self(input_ids, attention_mask, prompt_lengths=prompt_lengths)

    def _pass(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: ProductCache | None,
        keep: int,
    ) -> Step:
        ids = input_ids if cache is None else cache.append(input_ids)
        has_padding = attention_mask is not None
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        if mask.shape != ids.shape:
            raise ConfigError(
                f"attention_mask is {tuple(mask.shape)} for tokens {tuple(ids.shape)}, those seen "
                "before included; it must be of their shape."
            )
        if position_ids is None:
            position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        new = input_ids.size(1)
        return Step(
            input_ids,
            position_ids[:, -new:],
            ids,
            mask,
            has_padding,
            min(keep, new) or new,
            cache is not None,
        )

    def _scores(self, step: Step, cache: ProductCache | None) -> list[Tensor]:
        """Each expert's (B, keep, V), in order."""
        scores: list[Tensor] = [torch.empty(0)] * len(self.experts)
        caches = cache.caches if cache is not None else [None] * len(self.sources)
        for (source, places), own in zip(self.sources, caches, strict=True):
            for place, of_one in zip(places, source.scores(step, own), strict=True):
                _check_width(self.experts, place, of_one, self.config.vocab_size)
                scores[place] = of_one[..., : self.config.vocab_size]
        return scores

    def _place(self, name: str) -> int:
        if name not in self.experts:
            raise ConfigError(
                f"plausible_under={name!r} is no expert. The experts: {', '.join(self.experts)}."
            )
        return list(self.experts).index(name)


# Options of generate about the cache, which a generation config may hold too.
_OF_CACHES = ("use_cache", "cache_implementation")


def _checked_lengths(lengths: Tensor, ids: Tensor) -> Tensor:
    """(B, 1)."""
    if not isinstance(lengths, Tensor) or lengths.shape != ids.shape[:1]:
        shape = tuple(lengths.shape) if isinstance(lengths, Tensor) else lengths
        raise ConfigError(
            f"prompt_lengths is {shape}; it must be a tensor ({len(ids)},), one length a row."
        )
    return lengths[:, None]


def _check_width(experts: Mapping[str, Any], place: int, scores: Tensor, width: int) -> None:
    name, expert = list(experts.items())[place]
    is_padded = model_of(expert) is not None or not isinstance(expert, TokenReward)
    if scores.size(-1) < width or (scores.size(-1) > width and not is_padded):
        raise RunError(
            f"The expert {name!r} scores {scores.size(-1)} tokens, and the experts share {width}."
        )


def _named(experts: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
    if not isinstance(experts, Mapping | Sequence) or isinstance(experts, str):
        raise ConfigError(
            f"experts is a {type(experts).__name__}; it must be a mapping name -> expert, or a "
            "list of experts."
        )
    if not isinstance(experts, Mapping):
        experts = {str(place): expert for place, expert in enumerate(experts)}
    if not experts:
        raise ConfigError("A product of experts needs at least one expert, got none.")
    return dict(experts)


def _config(models: Sequence[Any], vocab_size: int) -> ProductOfExpertsConfig:
    config = ProductOfExpertsConfig()
    config.vocab_size = vocab_size
    lengths = [getattr(m.config, "max_position_embeddings", None) for m in models]
    known = [length for length in lengths if isinstance(length, int)]
    if known:
        config.max_position_embeddings = min(known)
    return config


def _generation_config(models: Sequence[Any]) -> GenerationConfig:
    """That of the first model: its end and padding tokens, its sampling defaults."""
    for model in models:
        own = getattr(model, "generation_config", None)
        if own is not None:
            return GenerationConfig.from_dict(own.to_dict() | {"cache_implementation": None})
    return GenerationConfig()


def _prior_entropy(expert: Any, vocab_size: int) -> float:
    known = getattr(expert, "prior_entropy", None)
    return float(known) if known is not None else float(torch.tensor(vocab_size).log())
