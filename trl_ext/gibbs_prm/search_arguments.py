"""What a search by steps asks of its arguments."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from trl_ext.errors import ConfigError
from trl_ext.gibbs_prm.rollout_checks import budgets_of, check_count
from trl_ext.gibbs_prm.rollout_vllm import VLLMSampler
from trl_ext.gibbs_prm.sampling import GenerateSampler, Rollouts
from trl_ext.gibbs_prm.scorer import GibbsScorer
from trl_ext.models.adapter import Adapter
from trl_ext.models.loading import tokenizer_beside
from trl_ext.models.log_probs import TokenIds, check_rows
from trl_ext.models.vocabulary import check_vocabularies


def sampler_of(generator: Any, scorer: GibbsScorer, options: dict[str, Any]) -> Rollouts:
    """What samples: of a model a `GenerateSampler` with these options, or the sampler given.

    Raises:
        ConfigError: the generator is neither, its tokens are not the scorer's, options are out of
            range, or a sampler has its own.
    """
    model: Any = generator
    if isinstance(generator, str) and generator in ("reference", "policy"):
        model = getattr(scorer, generator)
    if isinstance(model, PreTrainedModel | PeftModel | Adapter):
        own: dict[str, Any] = {"max_completion_length": None} | options
        if model is not scorer.reference and model is not scorer.policy:
            _check_tokenizer(tokenizer_beside(model), scorer)
        return GenerateSampler(model, scorer.tokenizer, **own)
    if not all(hasattr(model, n) for n in ("sample", "max_completion_length", "end_ids")):
        raise ConfigError(
            f"generator is {generator!r}; it must be 'reference' or 'policy' (the scorer's), a "
            "causal language model, or a sampler (GenerateSampler, VLLMSampler)."
        )
    if options:
        raise ConfigError(
            f"{' and '.join(options)} are set, and the generator is a sampler, which has its own. "
            f"Give them to {type(generator).__name__}, and leave them out here."
        )
    name = type(generator).__name__
    check_count(f"max_completion_length of {name}", model.max_completion_length)
    if not isinstance(model.end_ids, frozenset | set):
        raise ConfigError(f"end_ids of {name} is {model.end_ids!r}; it must be a set of token ids.")
    _check_tokenizer(getattr(model, "tokenizer", None), scorer)
    return model


def _check_tokenizer(tokenizer: Any, scorer: GibbsScorer) -> None:
    """Whether the generator's tokens, where its tokenizer is known, are the scorer's."""
    if tokenizer is not None:
        check_vocabularies({"the generator": tokenizer, "the scorer": scorer.tokenizer})


def check_scorer(scorer: Any) -> GibbsScorer:
    """A scorer whose token log-ratios add up, with its tokenizer.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(scorer, GibbsScorer):
        raise ConfigError(
            f"scorer is a {type(scorer).__name__}; it must be a GibbsScorer, whose log-ratios of "
            "tokens add up to the score of any prefix."
        )
    if scorer.tokenizer is None:
        raise ConfigError(
            "The scorer has no tokenizer, and the ends of steps are found in text. Give "
            "GibbsScorer(…, tokenizer=)."
        )
    return scorer


def check_strings(strings: Any) -> tuple[str, ...]:
    """Texts that stop a completion.

    Raises:
        ConfigError: they are one text, or one of them is empty or no text.
    """
    is_list = isinstance(strings, Iterable) and not isinstance(strings, str)
    if not is_list or not all(isinstance(s, str) and s for s in strings):
        raise ConfigError(
            f"stop_strings is {strings!r}; it must be a list of texts of one character or more."
        )
    return tuple(strings)


def check_seed(seed: Any) -> int:
    """A whole number from 0.

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"seed is {seed!r}; it must be a whole number, 0 or more.")
    return seed


def check_room(sampler: Rollouts, scorer: GibbsScorer, prompt_ids: TokenIds) -> None:
    """Whether all that read a prompt have room for the longest completion behind it.

    Raises:
        ConfigError: one has not.
    """
    length = sampler.max_completion_length
    models = [scorer.policy, scorer.reference]
    if isinstance(sampler, GenerateSampler):
        models.append(sampler.model)
    for model in models:
        check_rows(model, prompt_ids, [[0] * length for _ in prompt_ids])
    if isinstance(sampler, VLLMSampler):
        longest = sampler.llm.llm_engine.model_config.max_model_len
        budgets_of(prompt_ids, None, length, longest)


def check_prompts(prompts: Any) -> Sequence[Any]:
    """A list of prompts.

    Raises:
        ConfigError: it is one text, or no list.
    """
    if isinstance(prompts, str):
        raise ConfigError(f"prompts is one text; it must be a list of them: [{prompts!r}].")
    if not isinstance(prompts, Iterable) or isinstance(prompts, Mapping):
        raise ConfigError(
            f"prompts is a {type(prompts).__name__}; it must be a list of texts or of lists of "
            "messages."
        )
    return list(prompts)
