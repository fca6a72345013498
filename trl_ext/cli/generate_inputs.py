"""What `trl_ext generate` is asked for: checked before a model is loaded."""

import argparse
import difflib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from trl_ext.errors import ConfigError, DataError

if TYPE_CHECKING:
    from trl_ext.poe.corpora import Prompt
    from trl_ext.poe.drawing import Sampling

BASE, PRODUCT = "base", "product"
_NAME = re.compile(r"[\w.-]+")


def expert_paths(args: argparse.Namespace) -> dict[str, str]:
    """Name -> path, MODEL first.

    Raises:
        ConfigError: if there is none, or one is named wrongly or twice.
    """
    experts = {} if args.model is None else {BASE: args.model}
    for text in args.expert:
        name, path = pair(text, "--expert", "NAME=PATH, such as style=./adapter")
        if name in experts:
            why = f"{BASE} is MODEL, {args.model}" if name == BASE else f"it is {experts[name]}"
            raise ConfigError(
                f"--expert {text}: there is an expert {name!r} already: {why}. Name "
                "this one differently."
            )
        if name == PRODUCT or not _NAME.fullmatch(name):
            raise ConfigError(
                f"--expert {text}: an expert cannot be called {name!r}. Take letters, digits, "
                f"'_', '-' and '.', and another name than {PRODUCT!r}."
            )
        experts[name] = path
    if not experts:
        raise ConfigError(
            "generate: no model is given. Name one, for example trl_ext generate "
            'bundled:smollm2-135m-instruct --prompt "What is rain?", or experts with --expert '
            "NAME=PATH."
        )
    return experts


def pair(text: str, option: str, allowed: str) -> tuple[str, str]:
    """The two sides of name=value.

    Raises:
        ConfigError: if one is missing.
    """
    name, equals, value = text.partition("=")
    if not (name.strip() and equals and value.strip()):
        raise ConfigError(f"{option} {text}: it must be {allowed}.")
    return name.strip(), value.strip()


def known(name: str, names: Sequence[str], option: str) -> str:
    """The name, if it is an expert's.

    Raises:
        ConfigError: if not.
    """
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(
            f"{option}: there is no expert {name!r}.{hint} The experts: {', '.join(names)}. Add "
            f"one with --expert {name}=PATH."
        )
    return name


def weights_of(args: argparse.Namespace, names: Sequence[str]) -> dict[str, float]:
    """Name -> weight. Those left out share what is missing from 1: Equation E14 for two.

    Raises:
        ConfigError: if one is no number, given twice, or of no expert.
    """
    given: dict[str, float] = {}
    for text in args.weight:
        name, value = pair(text, "--weight", "NAME=NUMBER, such as style=0.3")
        if known(name, names, f"--weight {text}") in given:
            raise ConfigError(
                f"--weight {text}: {name!r} has the weight {given[name]:g} already. Give it once."
            )
        try:
            given[name] = float(value)
        except ValueError:
            raise ConfigError(
                f"--weight {text}: {value!r} is no number. Give one, such as {name}=0.3."
            ) from None
    left = [name for name in names if name not in given]
    each = round((1 - sum(given.values())) / len(left), 12) if left else 0.0
    return {name: given.get(name, each) for name in names}


def check_weights(weights: Mapping[str, float], plausibility: float | None) -> None:
    """As the product would, and before its experts are loaded.

    Raises:
        ConfigError: if they are not finite, or sum to nothing.
    """
    from trl_ext.poe.weights import WeightRule

    WeightRule(list(weights), weights, [0.0] * len(weights), plausibility is not None)


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that would do nothing.

    Raises:
        ConfigError: with what to leave out.
    """
    if args.greedy or args.num_beams > 1:
        how = "--greedy" if args.greedy else f"--num-beams {args.num_beams}"
        if (args.temperature, args.top_p) != (1.0, 1.0):
            raise ConfigError(
                f"generate: {how} samples nothing, so that --temperature and --top-p do nothing. "
                f"Leave them out, or {how}."
            )
        if args.num_samples > args.num_beams:
            raise ConfigError(
                f"generate: {how} has at most {args.num_beams} answers to a prompt, and "
                f"--num-samples asks for {args.num_samples}. Leave {how} out to sample."
            )
    only = {"--metric": args.metric, "--plot": args.plot}
    for option, value in only.items():
        if value is not None and args.sweep is None:
            raise ConfigError(
                f"generate: {option} {value} is of a sweep. Add --sweep NAME=0:1:0.25, or leave it "
                "out."
            )


def sampling_of(args: argparse.Namespace) -> "Sampling":
    """How answers are drawn."""
    from trl_ext.poe.drawing import Sampling

    return Sampling(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        greedy=args.greedy,
        num_beams=args.num_beams,
        num_samples=args.num_samples,
        seed=args.seed,
    )


def prompts_of(args: argparse.Namespace) -> "list[Prompt] | None":
    """From the command line, a file or a pipe; None where a person will type them.

    Raises:
        ConfigError, DataError: if there is none, or one cannot be used.
    """
    from trl_ext.poe.corpora import check_prompt, read_prompts

    empty = next((text for text in args.prompt if not text.strip()), None)
    if empty is not None:
        raise DataError(f"--prompt {empty!r} is empty. Give a text.")
    prompts: list[Prompt] = [*args.prompt, *(read_prompts(args.prompts) if args.prompts else [])]
    if not prompts and sys.stdin.isatty():
        return None
    if not prompts:
        prompts = list(_piped())
    if not prompts:
        raise DataError(
            "generate: there is no prompt: standard input is empty. Give --prompt TEXT, --prompts "
            "FILE, or a line for each on standard input."
        )
    for number, prompt in enumerate(prompts):
        check_prompt(prompt, f"generate: prompt {number}")
    if args.chat is False and not all(isinstance(prompt, str) for prompt in prompts):
        raise ConfigError(
            f"--no-chat: {args.prompts} has prompts that are chat messages, which need the chat "
            "template. Leave --no-chat out, or write texts."
        )
    return prompts


def _piped() -> Iterator[str]:
    try:
        yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
    except UnicodeDecodeError as error:
        raise not_utf8(error) from error


def not_utf8(error: UnicodeDecodeError) -> DataError:
    """The error for what is piped or typed in another encoding."""
    return DataError(
        f"generate: standard input is not text in UTF-8: {error.reason} at byte {error.start}. "
        "Convert it, for example with iconv."
    )
