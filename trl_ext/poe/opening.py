"""What a recipe or a caller names as an expert, opened: a path, a corpus to count, an object."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_ext.errors import ConfigError
from trl_ext.models.loading import open_tokenizer
from trl_ext.poe.checks import model_of
from trl_ext.poe.corpora import corpus_texts
from trl_ext.poe.counted import NaiveBayesExpert, NGramExpert
from trl_ext.poe.loading import expert_tokenizer, load_experts
from trl_ext.poe.scoring import check_expert

# Kind of counted expert -> its class, the name of its size, and that size where none is given.
_KINDS: Mapping[str, tuple[Any, str, int]] = {
    "ngram": (NGramExpert, "order", 2),
    "naive_bayes": (NaiveBayesExpert, "window", 2),
}
# Small beside the count of a frequent context, times a vocabulary of 50,000.
_PSEUDO_COUNT = 0.001


@dataclass
class Opened:
    """An expert with what errors call it and the tokenizer that it reads, if that is known.

    Attributes:
        is_own: it was loaded here, and may be moved to the device of this process.
    """

    name: str
    expert: Any
    tokenizer: Any
    is_own: bool

    def place(self) -> Any:
        """The expert, on the accelerator of this process if it was loaded here."""
        if self.is_own:
            from accelerate import PartialState

            (model_of(self.expert) or self.expert).to(PartialState().device)
        return self.expert


def open_expert(expert: Any, *, tokenizer: Any = None) -> Opened:
    """An expert from what names it.

    Args:
        expert: an object (see `trl_ext.poe.scoring.check_expert`), a path, hub id or `bundled:`
            name of a causal language model, the folder of a LoRA adapter or of a counted expert,
            or a mapping {ngram: corpus, order: 2, pseudo_count: 0.001} or {naive_bayes: corpus,
            window: 2}: counted here, of what `corpus_texts` reads; add_eos (true), column and
            vocab_size as in `fit`.
        tokenizer: a name or an object; in place of the one beside the expert.

    Raises:
        ConfigError: if it cannot be opened.
        DataError: if a corpus cannot be read.
    """
    tokenizer = open_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    if isinstance(expert, Mapping):
        return _count(expert, tokenizer)
    if isinstance(expert, str | Path):
        return _load(str(expert), tokenizer)
    check_expert("The expert", expert)
    name = f"the {type(expert).__name__}"
    return Opened(name, expert, tokenizer or getattr(expert, "tokenizer", None), is_own=False)


def _load(name: str, tokenizer: Any) -> Opened:
    [expert] = load_experts({name: name}, dtype="auto", device="cpu").values()
    tokenizer = tokenizer or getattr(expert, "tokenizer", None) or expert_tokenizer(name)
    return Opened(name, expert, tokenizer, is_own=True)


def _count(expert: Mapping[str, Any], tokenizer: Any) -> Opened:
    kinds = [kind for kind in _KINDS if kind in expert]
    sizes = [_KINDS[kind][1] for kind in kinds]
    known = {"pseudo_count", "vocab_size", "add_eos", "column", *kinds, *sizes}
    unknown = sorted(set(expert) - known)
    if len(kinds) != 1 or unknown:
        raise ConfigError(
            f"The expert {dict(expert)!r} must be a mapping with ngram or naive_bayes, a corpus, "
            "and optionally order or window, pseudo_count, vocab_size, add_eos, column"
            + (f"; {unknown[0]!r} is none of these." if unknown else ".")
        )
    if tokenizer is None:
        raise ConfigError(
            f"The expert {dict(expert)!r} is counted in tokens. Give tokenizer: the policy's path."
        )
    [kind] = kinds
    made_of, size_name, size = _KINDS[kind]
    counted = made_of.fit(
        corpus_texts(str(expert[kind]), expert.get("column")),
        **{size_name: expert.get(size_name, size)},
        pseudo_count=expert.get("pseudo_count", _PSEUDO_COUNT),
        vocab_size=expert.get("vocab_size"),
        tokenizer=tokenizer,
        add_eos=expert.get("add_eos", True),
        progress=False,
    )
    return Opened(f"{kind} of {expert[kind]}", counted, tokenizer, is_own=True)


def tokenised_prompts(prompts: list, tokenizer: Any) -> list[list[int]]:
    """(P,) lists of token ids as TRL makes them: with the chat template where they are messages."""
    from trl import is_conversational

    if not is_conversational({"prompt": prompts[0]}):
        return tokenizer(text=prompts)["input_ids"]
    return tokenizer.apply_chat_template(
        conversation=prompts, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
