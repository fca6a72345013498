"""The `dataset_kwargs` of a reasoning-gym task: which are ours, and what a prompt looks like."""

import dataclasses
import difflib
from typing import Any

from trl_ext.errors import ConfigError

# reasoning-gym draws question i of seed s from Random(s + i) in most tasks: neighbouring seeds
# share all but a few questions, so the default seeds lie far apart.
SEED_STRIDE = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The `dataset_kwargs` that are ours; every other key is a setting of the task.

    Args:
        size: number of training questions.
        seed: of the training questions.
        eval_size: number of held-out questions; 0 for no test split.
        eval_seed: of the held-out questions.
        num_examples: worked examples before each question, from neither split.
        examples_seed: of the worked examples.
        format: "plain" text, or "chat" messages.
        template: a question's text, with `{question}` where the question goes. In plain text the
            answer follows it after a space. By default "Q: …\\nA:" in plain text, and the
            question alone in a chat.
    """

    size: int = 1000
    seed: int = 0
    eval_size: int = 0
    eval_seed: int = SEED_STRIDE
    num_examples: int = 0
    examples_seed: int = 2 * SEED_STRIDE
    format: str = "plain"
    template: str | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            is_integer = isinstance(value, int) and not isinstance(value, bool)
            least = int(field.name == "size")
            if field.type in (int, "int") and not (is_integer and value >= least):
                raise _wrong(field.name, value, f"a whole number from {least} on")
        if self.format not in ("plain", "chat"):
            raise _wrong("format", self.format, "plain or chat")
        if self.template is not None and "{question}" not in str(self.template):
            raise _wrong("template", self.template, "a text that contains {question}")

    def prompt(self, question: str, examples: list[dict[str, Any]]) -> str | list[dict[str, str]]:
        """A question with the worked examples before it, ending where its answer starts."""
        template = self.template or (
            "Q: {question}\nA:" if self.format == "plain" else "{question}"
        )

        # Not str.format: questions and templates may hold braces of their own.
        def ask(text: str) -> str:
            return template.replace("{question}", text)

        if self.format == "plain":
            shots = [f"{ask(example['question'])} {example['answer']}" for example in examples]
            return "\n\n".join([*shots, ask(question)])
        messages = []
        for example in examples:
            messages.append({"role": "user", "content": ask(example["question"])})
            messages.append({"role": "assistant", "content": example["answer"]})
        return [*messages, {"role": "user", "content": ask(question)}]


def read_options(task: str, config: type, kwargs: dict[str, Any]) -> tuple[Options, dict[str, Any]]:
    """Split `dataset_kwargs` into our options and the task's settings.

    Raises:
        ConfigError: if a key is neither, or one of ours has a value that is refused.
    """
    ours = {field.name for field in dataclasses.fields(Options)}
    theirs = {field.name for field in dataclasses.fields(config)} - ours
    unknown = [key for key in kwargs if key not in ours | theirs]
    if unknown:
        close = difflib.get_close_matches(str(unknown[0]), ours | theirs, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ConfigError(
            f"dataset_kwargs: reasoning_gym/{task} has no key {', '.join(map(repr, unknown))}."
            f"{hint} Its settings: {', '.join(sorted(theirs)) or 'none'}. "
            f"For every task: {', '.join(sorted(ours))}."
        )
    settings = {key: value for key, value in kwargs.items() if key in theirs}
    return Options(**{key: value for key, value in kwargs.items() if key in ours}), settings


def _wrong(key: str, value: Any, allowed: str) -> ConfigError:
    return ConfigError(f"dataset_kwargs: {key} is {value!r}; it must be {allowed}.")
