"""What rewards over tokens share: models that score completions, and the policy's reference."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from trl_ext.errors import ConfigError, RewardError
from trl_ext.models.loading import open_tokenizer
from trl_ext.models.vocabulary import check_vocabularies
from trl_ext.poe.opening import Opened, open_expert, tokenised_prompts
from trl_ext.poe.scoring import completion_log_probs, tensors_of
from trl_ext.rewards.returned import shown

POLICY = "policy"
TokenIds = Sequence[Sequence[int]]


class Reference:
    """log P_θ of the tokens of completions: the policy's own, or that of a model.

    Args:
        opened: the model; None for what the policy's trainer hands over.
    """

    def __init__(self, opened: Opened | None):
        self.model = opened
        self.asks_for = {"ref_per_token_logps"} if opened is None else {"prompt_ids"}

    @classmethod
    def opened(cls, reference: Any, tokenizer: Any) -> "Reference":
        """From the argument `reference` of a reward."""
        is_policy = isinstance(reference, str) and reference == POLICY
        return cls(None if is_policy else open_expert(reference, tokenizer=tokenizer))

    def check_was_given(self, name: str, logps: Any) -> None:
        """Whether the trainer handed over what it must.

        Raises:
            RewardError: if not.
        """
        if self.model is None and logps is None:
            raise RewardError(
                f"{name} with reference='policy' needs the column ref_per_token_logps, which the "
                "trainers of trl_ext make and trl.GRPOTrainer does not. Use one of them, or give "
                "the reference itself: reference=<path of the policy before training>."
            )


class OverTokens:
    """What rewards over tokens share: models that are asked for the tokens of completions."""

    def __init__(
        self,
        name: str,
        models: Sequence[Opened | None],
        tokenizer: Any,
        *,
        per_token: bool,
        batch_size: int,
        floor: float | None = None,
    ):
        if not isinstance(per_token, bool):
            raise ConfigError(f"per_token is {per_token!r}; it must be true or false.")
        self.__name__ = name
        self.per_token = per_token
        self.batch_size = batch_size
        self.floor = floor
        self._models = [model for model in models if model is not None]
        self._tokenizers = {
            model.name: model.tokenizer for model in self._models if model.tokenizer is not None
        }
        if len(self._tokenizers) > 1:
            check_vocabularies(self._tokenizers)
        given = open_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        self._reads = given or next(iter(self._tokenizers.values()), None)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Whether the policy's tokens are those of the models. A policy trainer calls it.

        Raises:
            ConfigError: with the first token that differs.
        """
        if self._tokenizers:
            check_vocabularies({"the policy": tokenizer, **self._tokenizers})

    def check_policy(self, policy: nn.Module) -> None:
        """Whether the models stay as they are while the policy trains. A policy trainer calls it.

        Raises:
            ConfigError: with the model that does not.
        """
        trained = {
            id(tensor): name for name, tensor in policy.named_parameters() if tensor.requires_grad
        }
        for model in self._models:
            shared = next((id(t) for t in tensors_of(model.expert) if id(t) in trained), None)
            if shared is not None:
                raise ConfigError(
                    f"{self.__name__}: {model.name} shares weights with the policy "
                    f"({trained[shared]} is the first), and would move as it trains. Give its "
                    "path, or load it separately: from_pretrained(...) once more. Where only an "
                    "adapter trains, its base may be shared: Adapter(peft_model, None)."
                )

    def prompt_ids_of(self, prompts: list, prompt_ids: TokenIds | None) -> TokenIds:
        """As generated from where the trainer says so, else tokenised anew."""
        if prompt_ids is not None or not prompts:
            return prompt_ids or []
        if self._reads is None:
            raise RewardError(
                f"{self.__name__} gets texts from this trainer and has no tokenizer for them. Give "
                "tokenizer= the policy's path."
            )
        return tokenised_prompts(prompts, self._reads)

    def check_trainer(self, prompt_ids: TokenIds | None, columns: Mapping[str, Any]) -> None:
        """Whether a trainer that calls takes numbers of tokens: ours gives `prompt_ids`."""
        if self.per_token and prompt_ids is None:
            check_takes_tokens(self.__name__, columns, "Set per_token: false")

    def scores(
        self,
        model: Opened,
        texts: tuple[list, list],
        prompt_ids: TokenIds,
        completion_ids: TokenIds,
    ) -> list[list[float]]:
        """Log-probabilities of each token under a model, nats, finite."""
        try:
            scores = completion_log_probs(
                model.place(), prompt_ids, completion_ids, batch_size=self.batch_size
            )
        except ConfigError as error:
            raise RewardError(f"{self.__name__}: the expert {model.name!r}: {error}") from error
        return [
            self._finite(row, model.name, index, texts, completion_ids)
            for index, row in enumerate(scores)
        ]

    def _finite(
        self, row: list[float], name: str, index: int, texts: tuple[list, list], ids: TokenIds
    ) -> list[float]:
        lowest = float("-inf") if self.floor is None else self.floor
        row = [max(value, lowest) if value == value else value for value in row]
        for place, value in enumerate(row):
            if abs(value) < float("inf"):
                continue
            forbids = value < 0
            says = "forbids" if forbids else f"gave log-probability {value} to"
            advice = (
                "Smooth it (a pseudo_count above 0), or set floor=-20."
                if forbids
                else "Its weights or its input are broken; load it in a wider dtype (float32)."
            )
            raise RewardError(
                f"{self.__name__}: the expert {name!r} {says} token {ids[index][place]}, number "
                f"{place} of the completion. {shown(index, *texts)} {advice}"
            )
        return row

    def returned(self, rows: list[list[float]]) -> list[Any]:
        """As asked for: the numbers of tokens, or their sums."""
        return rows if self.per_token else [sum(row) for row in rows]


def check_takes_tokens(name: str, columns: Mapping[str, Any], instead: str) -> None:
    """Whether a reward that got no prompt ids may give one number a token.

    Args:
        name: of the reward.
        columns: what it was called with; `trainer_state` among them if a trainer calls.
        instead: what to do beside using another trainer.

    Raises:
        RewardError: if it is called by a trainer, which is none of trl_ext's.
    """
    if "trainer_state" in columns:
        raise RewardError(
            f"{name} gives one number a token, and this trainer takes one a completion: it is not "
            f"one of trl_ext. {instead}, or use trl_ext's trainer."
        )


def checked_size(batch_size: Any) -> int:
    """`batch_size`, which must be a count.

    Raises:
        ConfigError: if it is none.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size!r}; it must be a whole number from 1 on.")
    return batch_size


def checked_floor(floor: Any) -> float | None:
    """`floor`, which must be a log-probability or None.

    Raises:
        ConfigError: if it is neither.
    """
    is_number = isinstance(floor, int | float) and not isinstance(floor, bool)
    if floor is not None and not (is_number and float("-inf") < floor < 0):
        raise ConfigError(
            f"floor is {floor!r}; it must be a log-probability below 0, such as -20, or null."
        )
    return floor
