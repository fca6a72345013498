"""The prefixes of completions of a small shape, and the table row that belongs to each.

Token 0 ends a completion (and pads), tokens 1..V-1 are letters. A prompt is one letter; all that
follows it is the completion, so a longer prompt simply is a prompt with a completion begun. A
completion has at most T tokens. Only prefixes without the end token need logits: with K = V-1
letters there are R = Σ_{t<T} K^t of them, and prefix y_1..y_t has the number
Σ_s y_s K^(t-s), so that child(row, letter) = K·row + letter (bijective numeration, the empty
prefix is 0, shorter prefixes come first).
"""

from typing import ClassVar

from torch import Tensor
from transformers import AutoConfig
from transformers.configuration_utils import PretrainedConfig

from trl_ext.errors import ConfigError

END = 0
# exp(-1e4) is 0 in every float type, and unlike -inf it survives being multiplied by 0.
IMPOSSIBLE = -1e4
# Beyond this, enumerating is no longer a matter of seconds.
MAX_TABLE_ROWS = 10_000


class TabularLMConfig(PretrainedConfig):
    """Shape of a `TabularLM`.

    Args:
        vocab_size: V, the end token and V-1 letters.
        max_completion_length: T; after T tokens the end token has probability 1.
        num_prompts: P ≤ V-1; the prompts are the letters 1..P, each with its own table.
        initializer_range: standard deviation of the initial logits; 0 is the uniform policy.

    Raises:
        ConfigError: a value out of range, or a table of more than 10000 rows.
    """

    model_type = "tabular_lm"
    # TRL reads this of every model class that transformers does not ship; nothing is remote code.
    auto_map: ClassVar[dict[str, str]] = {}

    vocab_size: int = 4
    max_completion_length: int = 3
    num_prompts: int = 1
    initializer_range: float = 1.0
    eos_token_id: int = END
    pad_token_id: int = END
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.vocab_size < 2 or self.max_completion_length < 1:
            raise ConfigError(
                "a TabularLM needs vocab_size >= 2 (the end token and a letter) and "
                f"max_completion_length >= 1, got {self.vocab_size} and "
                f"{self.max_completion_length}"
            )
        if not 1 <= self.num_prompts < self.vocab_size:
            raise ConfigError(
                f"num_prompts must lie in 1..{self.vocab_size - 1} (a prompt is one of the "
                f"vocab_size - 1 letters), got {self.num_prompts}; raise vocab_size for more"
            )
        if self.num_rows > MAX_TABLE_ROWS:
            raise ConfigError(
                f"the table would have {self.num_rows} rows, more than {MAX_TABLE_ROWS}; "
                "lower vocab_size or max_completion_length"
            )

    @property
    def num_prefixes(self) -> int:
        """R, the rows of the table of one prompt: prefixes shorter than T without an end token."""
        return sum((self.vocab_size - 1) ** t for t in range(self.max_completion_length))

    @property
    def num_rows(self) -> int:
        """P·R, the rows of the whole table."""
        return self.num_prompts * self.num_prefixes

    @property
    def hidden_size(self) -> int:
        """V + P·R: a hidden state is the logit row, then the one-hot code of the row."""
        return self.vocab_size + self.num_rows


def table_rows(
    config: TabularLMConfig, input_ids: Tensor, attention_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The table row that gives the next token's logits, at each position.

    Args:
        config: shape of the table.
        input_ids: (B, S) int64, padded on either side.
        attention_mask: (B, S), 1 = token, 0 = padding. End tokens before the prompt are padding
            with or without it, as a prompt never starts with one.

    Returns:
        rows (B, S) int64, 0 where `ended`; ended (B, S) bool: no row, the end token is certain,
        because the completion has ended or has T tokens.

    Raises:
        ValueError: a prompt token that is not one of 1..num_prompts.
    """
    letters = config.vocab_size - 1
    kept = (input_ids != END).cumsum(-1) > 0
    if attention_mask is not None:
        kept = kept & attention_mask.bool()
    depth = kept.cumsum(-1) - 1
    ended = ((input_ids == END) & kept).cumsum(-1) > 0
    ended = ended | (depth >= config.max_completion_length)
    # number(t) = Σ_{s≤t} y_s K^(t-s), all positions at once; t and s count completion tokens.
    digits = input_ids * (kept & (depth > 0))
    gap = (depth[:, :, None] - depth[:, None, :]).clamp(0, config.max_completion_length)
    numbers = ((letters**gap).tril() * digits[:, None, :]).sum(-1)
    rows = numbers + _prompt_index(config, input_ids, kept)[:, None] * config.num_prefixes
    return rows.masked_fill(ended, 0), ended


def _prompt_index(config: TabularLMConfig, input_ids: Tensor, kept: Tensor) -> Tensor:
    """0-based prompt of each row of a batch, (B,); 0 for a row that is all padding."""
    first = kept.int().argmax(-1, keepdim=True)
    prompts = input_ids.gather(-1, first).squeeze(-1)
    if (prompts > config.num_prompts).any():
        raise ValueError(
            f"a prompt must start with one of the tokens 1..{config.num_prompts} "
            f"(num_prompts={config.num_prompts}), got token {int(prompts.max())}"
        )
    return (prompts - 1).clamp(min=0)


AutoConfig.register(TabularLMConfig.model_type, TabularLMConfig)
