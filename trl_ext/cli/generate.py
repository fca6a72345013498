"""Answer prompts with a product of experts, beside each expert alone.

The next token has the probability Π p(expert)^weight / Z. MODEL is the expert called base. An
expert's path is a language model, a LoRA adapter or a counted expert (`trl_ext count`). Without
--prompt and --prompts, prompts are read from standard input, one a line.

--sweep takes two experts from the one to the other: at each α the weights are 1 − α and α.

examples:
  trl_ext generate bundled:smollm2-135m-instruct --prompt "What is rain?"
  trl_ext generate MODEL --expert style=./adapter --weight style=0.3 --prompts prompts.txt
  trl_ext generate MODEL --expert docs=./docs --weight base=1 --weight docs=0.3
  trl_ext generate MODEL --expert style=./adapter --prompts prompts.jsonl --num-samples 4 \\
    --sweep style=0:1:0.25 --metric sentiment --plot sweep.png --output sweep.json
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from trl_ext.cli.generate_answers import print_likelihoods, print_rows, print_speeds
from trl_ext.cli.generate_experts import advise, check_device, load
from trl_ext.cli.generate_inputs import (
    BASE,
    check_options,
    check_weights,
    expert_paths,
    not_utf8,
    prompts_of,
    sampling_of,
    weights_of,
)
from trl_ext.cli.generate_output import RowFile, check_file
from trl_ext.cli.generate_sweep import run_sweep
from trl_ext.cli.numbers import count, share, temperature

if TYPE_CHECKING:
    from rich.console import Console

    from trl_ext.poe.corpora import Prompt
    from trl_ext.poe.side_by_side import SideBySide

DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.usage = "%(prog)s [MODEL] [--expert NAME=PATH ...] [--weight NAME=NUMBER ...] [options]"
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help=f"the expert {BASE}: a hub id, a folder or a bundled: name",
    )
    experts = parser.add_argument_group("experts")
    experts.add_argument(
        "--expert", action="append", default=[], metavar="NAME=PATH", help="repeatable"
    )
    experts.add_argument(
        "--weight",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="experts without one share what is left to 1",
    )
    experts.add_argument(
        "--plausibility",
        type=share,
        metavar="C",
        help="drop tokens with less than C times the probability of the likeliest, as the expert "
        "of the largest weight sees them",
    )
    experts.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="default: float32")
    experts.add_argument("--device", help="default: cuda if there is one, else cpu")
    _add_prompts(parser)
    _add_sampling(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--own-answers",
        action=argparse.BooleanOptionalAction,
        help="show what each expert answers alone (default: yes)",
    )
    output.add_argument("--output", metavar="FILE", help="write rows as .jsonl, a sweep as .json")
    output.add_argument("--force", action="store_true", help="replace files that exist")
    sweep = parser.add_argument_group("sweep")
    sweep.add_argument("--sweep", metavar="NAME=START:STOP:STEP", help="or NAME=0,0.3,1")
    sweep.add_argument(
        "--metric",
        metavar="NAME",
        help="sentiment, words, or MODULE:FUNCTION of texts that returns one number a text",
    )
    sweep.add_argument("--plot", metavar="FILE.png", help="draw the sweep")


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="repeatable")
    prompts.add_argument(
        "--prompts",
        metavar="FILE",
        help="text, one prompt a line; or .jsonl, .parquet, … with `prompt`: a text or messages; "
        "or the task openings",
    )
    prompts.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="a text is a user's message in the chat template (default: if there is one)",
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--max-new-tokens", type=count, default=64, metavar="N", help="default: 64"
    )
    sampling.add_argument(
        "--temperature", type=temperature, default=1.0, metavar="T", help="default: 1"
    )
    sampling.add_argument("--top-p", type=share, default=1.0, metavar="P", help="default: 1")
    sampling.add_argument("--greedy", action="store_true", help="take the likeliest token")
    sampling.add_argument(
        "--num-beams", type=count, default=1, metavar="N", help="beam search if more than 1"
    )
    sampling.add_argument(
        "--num-samples", type=count, default=1, metavar="N", help="answers a prompt (default: 1)"
    )
    sampling.add_argument(
        "--batch-size", type=count, default=8, metavar="N", help="prompts at a time (default: 8)"
    )
    sampling.add_argument("--seed", type=int, default=0, help="same seed, same text (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Check everything that needs no model; then answer, or sweep."""
    experts = expert_paths(args)
    check_options(args)
    if args.sweep is not None:
        return run_sweep(args, experts)
    weights = weights_of(args, list(experts))
    prompts = prompts_of(args)
    check_file(args.output, "--output", args.force)
    check_weights(weights, args.plausibility)
    check_device(args.device)
    product = load(args, experts, weights)
    from rich.console import Console

    from trl_ext.poe.side_by_side import SideBySide

    own = args.own_answers is not False
    side = SideBySide(product, weights, sampling_of(args), own_answers=own)
    console = Console(highlight=False)
    console.print(f"weights: {', '.join(f'{n} {w:g}' for n, w in weights.items())}", markup=False)
    advise(product, weights)
    with RowFile(args.output) as file:
        if prompts is None:
            _talk(args, side, console, file)
        else:
            _answer(args, side, prompts, console, file)
    print_speeds(args, side, console)
    return 0


def _answer(
    args: argparse.Namespace,
    side: "SideBySide",
    prompts: "Sequence[Prompt]",
    console: "Console",
    file: RowFile,
) -> None:
    from trl_ext.poe.drawing import check_lengths, encode

    ids = encode(prompts, side.tokenizer, args.chat)
    check_lengths(side.product, prompts, ids, args.max_new_tokens)
    for begin in range(0, len(prompts), args.batch_size):
        batch = slice(begin, begin + args.batch_size)
        rows = side.answer(prompts[batch], ids[batch])
        file.write(rows)
        for start in range(0, len(rows), args.num_samples):
            print_rows(console, rows[start : start + args.num_samples], side.names)


def _talk(args: argparse.Namespace, side: "SideBySide", console: "Console", file: RowFile) -> None:
    """A prompt typed, an answer streamed, until the end of input."""
    from trl_ext.poe.drawing import check_lengths, encode

    def announce(name: str) -> None:
        if len(side.names) > 1:
            console.print(name, style="bold")

    console.print("Type a prompt; Ctrl-D ends.", style="dim")
    for prompt in _typed():
        (ids,) = encode([prompt], side.tokenizer, args.chat)
        check_lengths(side.product, [prompt], [ids], args.max_new_tokens)
        if args.num_beams > 1:  # nothing is settled before the end
            rows = side.answer([prompt], [ids])
            print_rows(console, rows, side.names)
        else:
            rows = side.stream(prompt, ids, announce)
            print_likelihoods(console, rows)
        file.write(rows)


def _typed() -> Iterator[str]:
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print()
            return
        except UnicodeDecodeError as error:
            raise not_utf8(error) from error
        if prompt.strip():
            yield prompt
