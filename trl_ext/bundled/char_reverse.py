"""A character model of a million parameters, fine-tuned until it reverses letters half well.

It starts at about 40% sampled accuracy, so nearly every group of samples is mixed and a reward
teaches it in a minute on a CPU: for a first recipe and for end-to-end tests.
"""

import random
import string
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_ext.tasks.char_reverse import MAX_LETTERS, answer_of, draw, prompt_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

SEED = 0
BATCH_SIZE = 64
LEARNING_RATE = 3e-3
# Training stops at the first probe of at least this accuracy; the cap is several times the need.
TARGET_ACCURACY = 0.40
PROBE_EVERY, PROBE_SIZE = 10, 256
MAX_STEPS = 2000
CONTEXT_LENGTH = 32
PAD, END, UNKNOWN = "<pad>", "<eos>", "<unk>"
SYMBOLS = [PAD, END, UNKNOWN, *string.ascii_lowercase, ">"]
IGNORED = -100  # label that transformers' cross-entropy leaves out


def build(folder: Path) -> None:
    """Train the model and write it to `folder`, leaving the caller's random state alone."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        tokenizer = _tokenizer()
        model = _model()
        _fine_tune(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer() -> "PreTrainedTokenizerFast":
    """One token a character; anything but a letter or the arrow is <unk>."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: index for index, symbol in enumerate(SYMBOLS)}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        padding_side="left",
        model_max_length=CONTEXT_LENGTH,
    )


def _model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(SYMBOLS),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=SYMBOLS.index(END),
        pad_token_id=SYMBOLS.index(PAD),
    )
    return LlamaForCausalLM(config)


def _fine_tune(model: Any, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Supervised steps on fresh training strings until a probe reaches the target accuracy."""
    import torch
    from tqdm.auto import tqdm

    strings = draw(random.Random(SEED))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    layout = "{desc}: sampled accuracy {n:.0%} of {total:.0%} |{bar}| {elapsed}"
    title = "Training char-reverse-1m, once"
    with tqdm(total=TARGET_ACCURACY, desc=title, bar_format=layout) as bar:
        for step in range(1, MAX_STEPS + 1):
            model.train()
            loss = model(**_batch(tokenizer, list(islice(strings, BATCH_SIZE)))).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % PROBE_EVERY == 0:
                accuracy = sampled_accuracy(model, tokenizer, list(islice(strings, PROBE_SIZE)))
                bar.n = min(accuracy, TARGET_ACCURACY)
                bar.refresh()
                if accuracy >= TARGET_ACCURACY:
                    return
    raise AssertionError(f"{MAX_STEPS} steps did not reach accuracy {TARGET_ACCURACY}")


def _batch(tokenizer: "PreTrainedTokenizerFast", strings: list[str]) -> "dict[str, torch.Tensor]":
    """Prompt, answer and end token, padded on the left; only answer and end token are learnt."""
    texts = [prompt_of(s) + answer_of(s) + END for s in strings]
    batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    width = batch["input_ids"].size(1)
    labels = batch["input_ids"].clone()
    for row, letters in zip(labels, strings, strict=True):
        row[: width - len(letters) - 1] = IGNORED
    return {**batch, "labels": labels}


def sampled_accuracy(model: Any, tokenizer: "PreTrainedTokenizerFast", strings: list[str]) -> float:
    """Share of strings whose reverse is sampled, once each, at temperature 1."""
    import torch

    model.eval()
    prompts = tokenizer(
        [prompt_of(s) for s in strings],
        padding=True,
        return_tensors="pt",
        return_token_type_ids=False,
    )
    with torch.no_grad():
        tokens = model.generate(**prompts, do_sample=True, max_new_tokens=MAX_LETTERS + 1)
    answers = tokenizer.batch_decode(
        tokens[:, prompts["input_ids"].size(1) :], skip_special_tokens=True
    )
    right = [answer == answer_of(s) for answer, s in zip(answers, strings, strict=True)]
    return sum(right) / len(right)
