"""Options of offline reward-weighted regression, and the inherited ones that it refuses."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from trl import SFTConfig as TRLSFTConfig

from trl_ext.options import OwnOptions
from trl_ext.rewards.deadline import LONGEST_TIMEOUT, default_timeout
from trl_ext.rwr.config import LEAST_BETA


@dataclass
class OfflineRWRConfig(OwnOptions, TRLSFTConfig):
    """`trl.SFTConfig` for reward-weighted regression on logged completions.

    The fields from `num_generations` on say how `trl_ext collect` and `trl_ext iterate` sample
    completions; the trainer itself samples nothing.

    Args:
        beta: KL coefficient β of the Gibbs policy π* ∝ π_ref·exp(r/β), in reward units (Equation
            E1). Weights are softmax(r/β) within a group. 0 is best of n, inf is supervised
            fine-tuning on all rows.
        baseline: what a reward is compared with. "group": with the others of its prompt, which
            gives each prompt the same weight, and the target π* of each. "dataset": one softmax
            over all rows: a prompt with higher rewards gets more weight, and the target is no
            longer π* of each prompt. "value": the same of r − value, with the column `value`:
            advantage-weighted regression (Peng et al., 2019); the target is π* of each prompt
            again only where the value is β·log Z(x).
        reward_threshold: rows with a lower reward are left out; with beta=inf this is rejection
            sampling.
        importance_weights: multiply weights by π_ref/π, from the columns `ref_logp` and `logp`: the
            target is π_ref·exp(r/β) although another policy π sampled. With beta=inf these are the
            weights P_data/π of Equation E12.
        max_weight: no row weighs more than this many times what it would in a uniform group. What
            is cut off is not spread over the others; `offline_rwr/mass_clipped` says how much.
        min_effective_sample_size: raise β, one for the whole dataset, until the mean over groups of
            the effective sample size, in samples, reaches this; `offline_rwr/beta_used` says it.
        drop_uniform_groups: leave out groups whose rewards are all equal (before the threshold):
            they say nothing about the reward. Only with baseline="group". With beta=inf nothing is
            left out: there no reward has an effect, and all rows are asked for.
        token_reduction: "sum" regresses on log π(y|x), as derived; "mean" on its mean per token;
            "batch" divides by the number of tokens of the batch, as `trl.SFTTrainer` does, which it
            is with beta=inf and groups of one size.
        reference: what `trl_ext iterate` tilts: "moving", the policy of each round; "fixed", the
            first one, by importance weights.
        reward_timeout: seconds after which one call of a reward function is an error that names it.
            None: 45 with several processes, which wait for each other; no limit with one.
    """

    beta: float = field(
        default=0.25,
        metadata={
            "help": "KL coefficient of the Gibbs policy, in reward units: weights softmax(r/beta)."
        },
    )
    baseline: Literal["group", "dataset", "value"] = field(
        default="group",
        metadata={"help": "Compare rewards within a prompt's group, over all rows, or r - value."},
    )
    reward_threshold: float | None = field(
        default=None, metadata={"help": "Leave out rows with a lower reward."}
    )
    importance_weights: bool = field(
        default=False,
        metadata={"help": "Multiply weights by exp(ref_logp - logp): another policy sampled."},
    )
    max_weight: float | None = field(
        default=None, metadata={"help": "Largest weight of a row, in units of a uniform weight."}
    )
    min_effective_sample_size: float | None = field(
        default=None,
        metadata={"help": "Raise beta until groups have this many effective samples on average."},
    )
    drop_uniform_groups: bool = field(
        default=True,
        metadata={"help": "Leave out groups whose rewards are all equal, unless beta is inf."},
    )
    token_reduction: Literal["sum", "mean", "batch"] = field(
        default="sum",
        metadata={
            "help": "Regress on the completion's log-probability (sum), its token mean (mean), or "
            "divide by the tokens of the batch (batch)."
        },
    )
    reference: Literal["moving", "fixed"] = field(
        default="moving",
        metadata={
            "help": "Of `trl_ext iterate`: tilt the policy of each round (moving), or the first "
            "one (fixed)."
        },
    )
    num_generations: int = field(
        default=8, metadata={"help": "Completions that are collected for a prompt."}
    )
    temperature: float = field(
        default=1.0,
        metadata={
            "help": "Temperature for sampling. The higher the temperature, the more random the "
            "completions."
        },
    )
    top_p: float = field(
        default=1.0,
        metadata={
            "help": "Float that controls the cumulative probability of the top tokens to consider. "
            "Must be in (0, 1]. Set to 1.0 to consider all tokens."
        },
    )
    top_k: int = field(
        default=0,
        metadata={
            "help": "Number of highest probability vocabulary tokens to keep for top-k-filtering. "
            "If `0`, top-k-filtering is disabled and all tokens are considered."
        },
    )
    min_p: float | None = field(
        default=None,
        metadata={
            "help": "Minimum token probability, which will be scaled by the probability of the "
            "most likely token. It must be a value between 0.0 and 1.0."
        },
    )
    repetition_penalty: float = field(
        default=1.0,
        metadata={
            "help": "Float that penalizes new tokens based on whether they appear in the prompt "
            "and the generated text so far."
        },
    )
    max_completion_length: int = field(
        default=256, metadata={"help": "Maximum length of the generated completion."}
    )
    stop_strings: list[str] | None = field(
        default=None,
        metadata={
            "help": "A completion ends with the first token whose text contains one of these."
        },
    )
    reward_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "Weights for each reward function. If `None`, all rewards are weighted equally "
            "with weight `1.0`."
        },
    )
    reward_timeout: float | None = field(
        default=None,
        metadata={
            "help": "Seconds after which one call of a reward is an error. None: 45 with several "
            "processes, no limit with one."
        },
    )
    use_vllm: bool = field(
        default=False, metadata={"help": "Whether to use vLLM for generating completions."}
    )
    vllm_mode: Literal["colocate", "server"] = field(
        default="colocate",
        metadata={"help": "vLLM in the same process (colocate), or as a separate server."},
    )
    vllm_server_base_url: str | None = field(
        default=None, metadata={"help": "Base URL for the vLLM server."}
    )
    vllm_server_host: str = field(
        default="0.0.0.0", metadata={"help": "Host of the vLLM server to connect to."}
    )
    vllm_server_port: int = field(
        default=8000, metadata={"help": "Port of the vLLM server to connect to."}
    )
    vllm_server_timeout: float = field(
        default=240.0, metadata={"help": "Seconds to wait for the vLLM server to be up."}
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.3, metadata={"help": "Share of the GPU memory for vLLM in colocate mode."}
    )
    vllm_max_model_length: int | None = field(
        default=None, metadata={"help": "Context window for vLLM."}
    )
    vllm_tensor_parallel_size: int = field(
        default=1, metadata={"help": "Tensor parallel size for vLLM in colocate mode."}
    )

    # Inherited options without a meaning here: name -> reason. A literal, so that it can be read
    # without import.
    refused: ClassVar[dict[str, str]] = {
        "assistant_only_loss": "a completion is weighted whole: the loss is that of all its tokens",
        "dataset_text_field": "rows have a prompt and a completion, and no text of their own",
        "label_smoothing_factor": "the loss is -sum w_n log pi(y_n|x), without other labels",
        "loss_type": "the loss is -sum w_n log pi(y_n|x); token_reduction says how tokens add up",
    }

    def __post_init__(self):
        self.check()
        super().__post_init__()
        self.reward_timeout = self.reward_timeout or default_timeout(self.world_size)

    def findings(self) -> list[str]:
        """What is wrong with these options, a line each; together, once each has its type."""
        wrong_types = self.wrong_types()
        return self.refused_findings() + (wrong_types or [*self._of_data(), *self._of_weights()])

    def _of_weights(self) -> Iterator[str]:
        if not self.beta >= 0 or 0 < self.beta < LEAST_BETA:
            yield (
                f"  beta={self.beta!r} must be 0 (best of n) or between {LEAST_BETA:g} and inf "
                "(supervised fine-tuning)."
            )
        if self.beta == 0 and self.importance_weights:
            yield (
                "  beta=0 with importance_weights=True has no Gibbs policy as its target. Use "
                "beta > 0."
            )
        if self.reward_threshold is not None and self.reward_threshold != self.reward_threshold:
            yield "  reward_threshold=nan must be a number: rows below it are left out."
        for name in ("max_weight", "min_effective_sample_size"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                yield f"  {name}={value!r} must be at least 1, or None."
        if self.stop_strings is not None and "" in self.stop_strings:
            yield f"  stop_strings={self.stop_strings!r} holds an empty text. Remove it."
        if self.reward_timeout is not None and not 0 < self.reward_timeout <= LONGEST_TIMEOUT:
            yield (
                f"  reward_timeout={self.reward_timeout!r} must be > 0 and at most "
                f"{LONGEST_TIMEOUT:g} seconds, or None for the default."
            )

    def _of_data(self) -> Iterator[str]:
        if self.completion_only_loss is False:
            yield (
                "  completion_only_loss=False would weigh the prompt's tokens as well; the loss is "
                "that of completions. Remove it."
            )
        if self.packing and self.packing_strategy != "bfd":
            yield (
                f"  packing_strategy={self.packing_strategy!r} cuts completions in the middle, and "
                "a part has no weight of its own. Use packing_strategy='bfd'."
            )
        if self.packing and self.max_length is None:
            yield "  packing=True with max_length=None: max_length is the size of a pack. Set it."
        if self.padding_free and not self.packing and self.max_length is not None:
            yield (
                f"  padding_free=True with max_length={self.max_length!r}: without packing nothing "
                "is cut to it. Use packing=True, or max_length=None."
            )
        if self.eval_packing:
            yield "  eval_packing=True: evaluation is the mean over rows, unpacked. Remove it."
        kwargs = self.dataset_kwargs
        if isinstance(kwargs, dict) and kwargs.get("skip_prepare_dataset"):
            yield "  dataset_kwargs: skip_prepare_dataset leaves rows without tokens. Remove it."
        if self.token_reduction != "batch" and not self.average_tokens_across_devices:
            yield (
                "  average_tokens_across_devices=False: each process would divide by its own rows. "
                "Remove it."
            )
