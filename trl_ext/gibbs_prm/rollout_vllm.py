"""Rollouts by vLLM, whose prefix cache shares what prefixes have in common."""

from collections.abc import Iterable, Sequence
from typing import Any

from trl_ext.errors import MissingDependencyError
from trl_ext.gibbs_prm.rollout_checks import (
    as_ids,
    budgets_of,
    check_count,
    check_ids,
    check_temperature,
    until_end,
)


class VLLMSampler:
    """Rollouts of a `vllm.LLM`, with the interface of `Rollouts`.

    Args:
        llm: a `vllm.LLM`. Its prefix cache, on by default, reads shared tokens once.
        max_completion_length: tokens that a completion has at most, its end token included.
        temperature: the logits are divided by it; positive.
        stop_token_ids: tokens that end a completion, beside the end tokens of vLLM's tokenizer and
            of the model's generation config.

    Attributes:
        shares: whether the engine's prefix cache is on.
        note: says so if it is not, else None.

    Raises:
        MissingDependencyError: vllm is not installed.
        ConfigError: an argument out of range.
    """

    def __init__(
        self,
        llm: Any,
        *,
        max_completion_length: int,
        temperature: float = 1.0,
        stop_token_ids: Iterable[int] = (),
    ):
        _vllm()
        self.llm = llm
        self.max_completion_length = check_count("max_completion_length", max_completion_length)
        self.temperature = check_temperature(temperature)
        engine = llm.llm_engine
        own = engine.model_config.try_get_generation_config().get("eos_token_id")
        self.tokenizer = llm.get_tokenizer()
        stops = [*as_ids(self.tokenizer.eos_token_id), *check_ids("stop_token_ids", stop_token_ids)]
        self.end_ids = frozenset([*as_ids(own), *stops])
        self.shares = bool(engine.vllm_config.cache_config.enable_prefix_caching)
        self.note = None
        if not self.shares:
            self.note = (
                "vLLM reads every prefix anew: its prefix cache is off. Make the LLM with "
                "enable_prefix_caching=True."
            )

    def sample(
        self,
        prefixes: Sequence[Sequence[int]],
        num_rollouts: int,
        *,
        prompt_lengths: Sequence[int] | None = None,
        seed: int = 0,
    ) -> list[list[list[int]]]:
        """As `Rollouts.sample`; vLLM repeats them where it batches alike.

        Raises:
            ConfigError: as `GenerateSampler.sample`.
        """
        check_count("num_rollouts", num_rollouts)
        longest = self.llm.llm_engine.model_config.max_model_len
        budgets = budgets_of(prefixes, prompt_lengths, self.max_completion_length, longest)
        if not prefixes:
            return []
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(prefix)} for prefix in prefixes],
            sampling_params=[
                # vLLM draws rollout k with the seed + k: no two of all rollouts share one.
                self._parameters(num_rollouts, budget, seed + number * num_rollouts)
                for number, budget in enumerate(budgets)
            ],
            use_tqdm=False,
        )
        return [
            [until_end(rollout.token_ids, self.end_ids, budget) for rollout in output.outputs]
            for output, budget in zip(outputs, budgets, strict=True)
        ]

    def _parameters(self, num_rollouts: int, budget: int, seed: int) -> Any:
        return _vllm().SamplingParams(
            n=num_rollouts,
            max_tokens=budget,
            temperature=self.temperature,
            top_p=1.0,
            top_k=-1,
            min_p=0.0,
            seed=seed,
            stop_token_ids=sorted(self.end_ids),
            detokenize=False,
        )


def _vllm() -> Any:
    try:
        import vllm  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingDependencyError(
            "VLLMSampler needs the package vllm, which is not installed: pip install vllm. "
            "GenerateSampler samples with transformers alone."
        ) from error
    return vllm
