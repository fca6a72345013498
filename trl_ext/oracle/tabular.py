"""`TabularLM`: a causal language model whose next-token logits are a table over prefixes."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, initialization
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from trl_ext.oracle.prefixes import END, IMPOSSIBLE, TabularLMConfig, table_rows


class IdentityHead(nn.Module):
    """The LM head [I 0], (V, hidden): reads the logits off the hidden state, trains nothing.

    Its weight is a buffer, so that a TabularLM has one parameter, the table. TRL's fused head
    multiplies by `weight` itself.
    """

    weight: Tensor
    bias = None

    def __init__(self, config: TabularLMConfig):
        super().__init__()
        self.register_buffer("weight", torch.eye(config.vocab_size, config.hidden_size))

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self.weight)


class TabularPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of both classes below."""

    config_class = TabularLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _input_embed_layer = "table"
    config: TabularLMConfig

    def _init_weights(self, module: nn.Module) -> None:
        # The inherited one takes a range of 0 for "not given".
        if isinstance(module, nn.Embedding):
            initialization.normal_(module.weight, std=self.config.initializer_range)


class TabularModel(TabularPreTrainedModel):
    """The backbone: `table` (P·R, V) holds the logits, and LoRA's `target_modules` is its name.

    A hidden state is [logit row, one-hot code of the row]: the first part is what the LM head
    reads, the second lets a linear value head represent any value function over prefixes.
    """

    # Set by gradient_checkpointing_enable, then ignored: a lookup has nothing worth recomputing.
    gradient_checkpointing = False

    def __init__(self, config: TabularLMConfig):
        super().__init__(config)
        self.table = nn.Embedding(config.num_rows, config.vocab_size)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: object
    ) -> BaseModelOutputWithPast:
        """(B, S) token ids -> hidden states (B, S, V + P·R); further arguments have no effect."""
        rows, ended = table_rows(self.config, input_ids, attention_mask)
        looked_up = self.table(rows)
        end_certain = torch.full_like(looked_up[0, 0], IMPOSSIBLE)
        end_certain[END] = 0.0
        logits = torch.where(ended[..., None], end_certain, looked_up)
        code = functional.one_hot(rows, self.config.num_rows).to(logits.dtype)
        code = code.masked_fill(ended[..., None], 0.0)
        return BaseModelOutputWithPast(last_hidden_state=torch.cat([logits, code], dim=-1))


class TabularLM(TabularPreTrainedModel, GenerationMixin):
    """A causal LM whose logits are `model.table` rows: the judge of every algorithm here.

    Loads and saves like any transformers model (also through the Auto classes, once
    `trl_ext.oracle` is imported) and trains under TRL's trainers as they are. Train it in
    float32 or float64: TRL's configs turn bf16 on by default, which rounds the logits. There is
    no key-value cache: `use_cache` is accepted and the whole sequence is read at each step.
    """

    def __init__(self, config: TabularLMConfig):
        super().__init__(config)
        self.model = TabularModel(config)
        self.lm_head = IdentityHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """(B, S) token ids -> logits (B, S or logits_to_keep, V), and the mean loss of `labels`."""
        hidden = self.model(input_ids, attention_mask).last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, **kwargs):
        """The whole sequence at every step: a row depends on all tokens and nothing is cached."""
        prepare = super().prepare_inputs_for_generation  # pyright: ignore[reportAttributeAccessIssue]
        return prepare(input_ids, next_sequence_length=None, **kwargs)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    @torch.no_grad()
    def load_table(self, table: Tensor) -> "TabularLM":
        """Overwrite the logits with `table` (P, R, V), as `Enumeration.table_of` gives; self.

        Raises:
            ValueError: a table of another shape, or with entries that are not finite.
        """
        shape = (self.config.num_prompts, self.config.num_prefixes, self.config.vocab_size)
        if table.shape != shape or not table.isfinite().all():
            raise ValueError(
                f"a table of finite logits of shape {shape} is needed, got shape "
                f"{tuple(table.shape)} with {int((~table.isfinite()).sum())} entries not finite"
            )
        self.model.table.weight.copy_(table.flatten(0, 1))
        return self


AutoModel.register(TabularLMConfig, TabularModel)
AutoModelForCausalLM.register(TabularLMConfig, TabularLM)
