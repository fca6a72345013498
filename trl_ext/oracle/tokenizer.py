"""The tokenizer of a `TabularLM`: one letter, one token."""

import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_ext.errors import ConfigError

END_TOKEN = "<eos>"


def tabular_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Tokens "<eos>" (0, also the padding), "a" (1), "b" (2), …; pads on the left, adds nothing.

    An unknown character is an error when a text is encoded, never a silent token.

    Raises:
        ConfigError: vocab_size not in 2..53 (the end token and the 52 letters).
    """
    if not 2 <= vocab_size <= len(string.ascii_letters) + 1:
        raise ConfigError(
            f"a tabular tokenizer has 2..{len(string.ascii_letters) + 1} tokens, got {vocab_size}"
        )
    tokens = [END_TOKEN, *string.ascii_letters[: vocab_size - 1]]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_TOKEN,
        pad_token=END_TOKEN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
