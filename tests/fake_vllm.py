"""A vLLM made of transformers: what TRL calls of it, so that `use_vllm` runs where it cannot be."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl.generation import vllm_generation

# What TRL sets for a colocated vLLM, and leaves.
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class SamplingParams:
    """The names of vLLM's own that TRL and trl_ext give; another one is an error, as there."""

    n: int = 1
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: Any = None
    stop_token_ids: list[int] | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    logprobs: int | None = None
    structured_outputs: Any = None


@dataclass
class Call:
    """A request, and what came of it.

    Attributes:
        weights: of the engine's head at that time.
        logps: a list a completion.
    """

    prompts: list[list[int]]
    params: SamplingParams
    weights: Tensor
    completions: list[list[int]] = field(default_factory=list)
    logps: list[list[float]] = field(default_factory=list)


class Engine:
    """Samples with a copy of the model, rounded to bfloat16: its probabilities are others.

    Attributes:
        built: every engine since `install`.
        calls: what this one was asked.
        events: "sync", "reset", "sleep", "wake", "generate", in their order.
        nan_at: of each completion, the position whose log-probability is no number; None: none.
    """

    built: list["Engine"] = []  # noqa: RUF012
    nan_at: int | None = None

    def __init__(self, model: str, **options: Any):
        given: Any = AutoModelForCausalLM.from_pretrained(model)
        self.model = given.to(torch.bfloat16).float()
        self.options = {"model": model, **options}
        self.calls: list[Call] = []
        self.events: list[str] = []
        self._random = torch.Generator().manual_seed(1)
        Engine.built.append(self)

    def load_weights(self, weights: list[tuple[str, Tensor]]) -> None:
        """As the runner's model: each under the name that the checkpoint has for it."""
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, weight in weights:
                own[name].copy_(weight.to(torch.bfloat16))
        if self.events[-1:] != ["sync"]:
            self.events.append("sync")

    @torch.no_grad()
    def sample(self, prompts: list[list[int]], params: SamplingParams) -> Call:
        """`params.n` completions of each prompt, those of the first one first."""
        self.events.append("generate")
        call = Call(prompts, params, self.model.lm_head.weight.clone())
        for prompt in prompts:
            for _ in range(params.n):
                ids, logps = self._one(prompt, params)
                call.completions.append(ids)
                call.logps.append(logps)
        self.calls.append(call)
        return call

    def _one(self, prompt: list[int], params: SamplingParams) -> tuple[list[int], list[float]]:
        stops = {self.model.config.eos_token_id, *(params.stop_token_ids or [])}
        ids: list[int] = []
        logps: list[float] = []
        while len(ids) < params.max_tokens and not (ids and ids[-1] in stops):
            logits = self.model(torch.tensor([prompt + ids])).logits[0, -1] / params.temperature
            if len(ids) < params.min_tokens:
                logits[list(stops)] = -torch.inf
            probabilities = logits.log_softmax(-1)
            token = torch.multinomial(probabilities.exp(), 1, generator=self._random).item()
            logps.append(float("nan") if len(ids) == self.nan_at else probabilities[token].item())
            ids.append(int(token))
        return ids, logps


class LLM(Engine):
    """`vllm.LLM`, as TRL's colocate mode calls it."""

    def __init__(self, model: str, **options: Any):
        super().__init__(model, **options)
        runner = SimpleNamespace(model=self)
        worker = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(
            model_executor=worker, model_config=SimpleNamespace(max_model_len=64)
        )

    def generate(self, prompts: list[dict], sampling_params: SamplingParams, use_tqdm: bool):
        """Request outputs."""
        call = self.sample([prompt["prompt_token_ids"] for prompt in prompts], sampling_params)
        found = zip(call.completions, call.logps, strict=True)
        return [
            SimpleNamespace(prompt_token_ids=prompt, outputs=[_output(*next(found))])
            for prompt in call.prompts
        ]

    def reset_prefix_cache(self) -> None:
        """Forget what was computed with other weights."""
        self.events.append("reset")

    def sleep(self, level: int) -> None:
        """Leave the card; level 2 forgets the weights."""
        assert level == 2
        self.events.append("sleep")
        with torch.no_grad():
            for weight in self.model.parameters():
                weight.zero_()

    def wake_up(self, tags: list[str]) -> None:
        """Come back."""
        self.events.append(f"wake {' '.join(tags)}")


def _output(ids: list[int], logps: list[float]) -> SimpleNamespace:
    entries = [
        {token: SimpleNamespace(logprob=logp, rank=1)}
        for token, logp in zip(ids, logps, strict=True)
    ]
    return SimpleNamespace(token_ids=ids, logprobs=entries)


class Client(Engine):
    """TRL's `VLLMClient` with its server behind it.

    Attributes:
        served: the model that the server was started with.
    """

    served = ""

    def __init__(self, base_url: str, group_port: int, connection_timeout: float):
        super().__init__(self.served, base_url=base_url, connection_timeout=connection_timeout)

    def init_communicator(self, device: torch.device) -> None:
        """Nothing to connect."""

    def get_server_info(self) -> dict[str, Any]:
        """What the fragment's command line asks for."""
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_params(self, metadata: list[tuple], weights: Any) -> None:
        """Every tensor that was announced, in that order."""
        received = list(weights)
        assert [(name, list(w.shape)) for name, w in received] == [(n, s) for n, _, s in metadata]
        self.load_weights(received)

    def reset_prefix_cache(self) -> None:
        """Forget what was computed with other weights."""
        self.events.append("reset")

    def generate(
        self,
        prompts: list[list[int]],
        features: Any,
        structured_outputs_regex: str | None,
        generation_kwargs: dict[str, Any],
        **params: Any,
    ) -> dict[str, Any]:
        """Completions, prompt after prompt."""
        call = self.sample(prompts, SamplingParams(**(params | generation_kwargs)))
        none_for_nan = [[[None if x != x else x] for x in logps] for logps in call.logps]
        return {
            "prompt_ids": prompts,
            "completion_ids": call.completions,
            "logprobs": none_for_nan,
            "logprob_token_ids": [[[token] for token in ids] for ids in call.completions],
        }


def install(monkeypatch: Any, model: str) -> type[Engine]:
    """Put the fake where TRL imports vLLM, and a server of `model` behind its client."""
    for name, value in {
        "is_vllm_available": lambda *_: True,
        "LLM": LLM,
        "SamplingParams": SamplingParams,
        "VLLMClient": Client,
    }.items():
        monkeypatch.setattr(vllm_generation, name, value, raising=False)
    for name in VARIABLES:
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    monkeypatch.setattr(Engine, "built", [])
    monkeypatch.setattr(Engine, "nan_at", None)
    monkeypatch.setattr(Client, "served", model)
    return Engine
