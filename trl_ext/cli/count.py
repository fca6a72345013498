"""Count an n-gram or naive Bayes expert from a corpus, to multiply with a language model.

Naive Bayes says something in every context. An n-gram expert has no back-off: behind tokens that it
has not counted in that order it gives every token the same probability.

examples:
  trl_ext count pydoc --naive-bayes --tokenizer bundled:smollm2-135m-instruct --output docs
  trl_ext count speeches.txt --tokenizer HuggingFaceTB/SmolLM2-360M --output style --order 3
  trl_ext count news.jsonl --column body --tokenizer ./model --output news --naive-bayes
"""

import argparse
import os
import time
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from trl_ext.cli.generate_inputs import BASE, PRODUCT
from trl_ext.cli.numbers import count, positive
from trl_ext.errors import ConfigError
from trl_ext.poe.counted_files import check_no_model, check_pseudo_count

if TYPE_CHECKING:
    from trl_ext.poe.counted import CountedExpert

ORDER, WINDOW, PSEUDO_COUNT = 2, 2, 0.001


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.usage = "%(prog)s CORPUS --tokenizer MODEL --output DIR [options]"
    parser.add_argument(
        "corpus",
        metavar="CORPUS",
        help="a text file or pipe (one text a line), a .jsonl, .json, .parquet or .csv file, the "
        "folder of a dataset, or pydoc: the prose of Python's own language reference",
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="MODEL",
        help="the language model that it will be multiplied with: hub id, folder, bundled: name",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="where the expert goes")
    parser.add_argument(
        "--force", action="store_true", help="replace the expert in DIR; other files stay"
    )
    parser.add_argument(
        "--naive-bayes",
        action="store_true",
        help="features are the single tokens of a window, not their sequence",
    )
    parser.add_argument(
        "--order",
        type=count,
        metavar="N",
        help=f"of n-grams: N − 1 tokens predict the next one (default: {ORDER}; a larger one needs "
        "a large corpus, since what was not counted says nothing)",
    )
    parser.add_argument(
        "--window",
        type=count,
        metavar="N",
        help=f"of naive Bayes: the N last tokens are features (default: {WINDOW})",
    )
    parser.add_argument(
        "--pseudo-count",
        type=positive,
        default=PSEUDO_COUNT,
        metavar="A",
        help=f"added to every count (default: {PSEUDO_COUNT}; times the size of the vocabulary it "
        "is how much weight the unseen has in a context)",
    )
    parser.add_argument("--column", metavar="NAME", help="of a dataset (default: text)")
    parser.add_argument(
        "--add-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="count the end of each text (default: yes), so that the expert can end one",
    )


def run(args: argparse.Namespace) -> int:
    """Count, save, and say what to do with it."""
    size = _size(args)
    folder = Path(args.output)
    _check_folder(folder, args.force)
    check_pseudo_count(args.pseudo_count)
    from trl_ext.poe.corpora import corpus_texts

    texts = corpus_texts(args.corpus, args.column)
    from trl_ext.poe.counted import NaiveBayesExpert, NGramExpert

    kind = NaiveBayesExpert if args.naive_bayes else NGramExpert
    tokenizer = _tokenizer(args.tokenizer)
    begin = time.perf_counter()
    expert = kind.fit(
        texts,
        **size,
        pseudo_count=args.pseudo_count,
        tokenizer=tokenizer,
        add_eos=args.add_eos,
        progress=False,
    )
    seconds = time.perf_counter() - begin
    _save(expert, folder)
    print(_said(args, folder, len(texts), expert, seconds))
    return 0


def _size(args: argparse.Namespace) -> dict[str, Any]:
    """The argument of `fit` that one of the two kinds takes."""
    if args.naive_bayes:
        if args.order is not None:
            raise ConfigError(
                f"count: --order {args.order} is of n-grams, and --naive-bayes has a window. Give "
                "--window, or leave --naive-bayes out."
            )
        return {"window": WINDOW if args.window is None else args.window}
    if args.window is not None:
        raise ConfigError(
            f"count: --window {args.window} is of naive Bayes, and an n-gram expert has an order. "
            "Give --order, or add --naive-bayes."
        )
    return {"order": ORDER if args.order is None else args.order}


def _check_folder(folder: Path, force: bool) -> None:
    if os.path.isdir(folder):
        check_no_model(folder)
        if not force and any(folder.iterdir()):
            raise ConfigError(
                f"--output {folder}: there is something in it already, which is left alone. Give "
                "another folder, or --force."
            )
    elif os.path.lexists(folder):
        raise ConfigError(f"--output {folder}: this is a file. Give a folder, which is made.")


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    from trl_ext.bundled import resolve_model

    try:
        return AutoTokenizer.from_pretrained(resolve_model(name))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"--tokenizer {name}: there is no tokenizer: {reason} Give the hub id, the folder or "
            "the bundled: name of the language model."
        ) from error


def _save(expert: "CountedExpert", folder: Path) -> None:
    try:
        expert.save(folder)
    except OSError as error:
        raise ConfigError(
            f"--output {folder}: cannot be written: {error.strerror}. Give another folder."
        ) from error


def _said(
    args: argparse.Namespace, folder: Path, texts: int, expert: "CountedExpert", seconds: float
) -> str:
    length = expert.context_length
    what = f"pairs at distance {length}" if args.naive_bayes else f"{length + 1}-grams"
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    name = "".join(c if c.isalnum() else "_" for c in folder.resolve().name) or "counted"
    if name in (BASE, PRODUCT):  # those are taken
        name = f"{name}_counted"
    # Where an n-gram expert says nothing, a share taken from the model would flatten it.
    weights = "" if args.naive_bayes else f"--weight base=1 --weight {name}=0.3 "
    return (
        f"Counted {expert.num_tokens:,} tokens of {texts:,} texts in {seconds:.1f} s: "
        f"{expert.num_distinct:,} distinct {what}.\n"
        f"{folder}: {size / 1e6:.1f} MB.\n"
        "\n"
        "Multiply it with the language model:\n"
        f"  trl_ext generate {quote(args.tokenizer)} --expert {quote(f'{name}={folder}')} \\\n"
        f'    {weights}--prompt "What is a class?"'
    )
