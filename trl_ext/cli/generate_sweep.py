"""`trl_ext generate --sweep`: a table, a picture and JSON, a row an α."""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_ext.cli.generate_experts import check_device, load
from trl_ext.cli.generate_inputs import (
    BASE,
    known,
    pair,
    prompts_of,
    sampling_of,
)
from trl_ext.cli.generate_output import (
    check_file,
    check_two_files,
    not_written,
    write_json,
)
from trl_ext.errors import ConfigError

if TYPE_CHECKING:
    from trl_ext.poe.sweep import Mean, Point


def run_sweep(args: argparse.Namespace, experts: Mapping[str, str]) -> int:
    """Check, sample at each α, and print, write and draw what is found."""
    from trl_ext.poe.sweep import as_mapping, check_alphas, load_metric, parse_alphas, sweep

    name, text = _swept(args, list(experts))
    alphas = parse_alphas(text)
    prompts = prompts_of(args)
    if prompts is None:
        raise ConfigError(
            "generate: a sweep wants its prompts beforehand. Give --prompt TEXT, --prompts FILE, "
            "or pipe them in."
        )
    check_file(args.output, "--output", args.force)
    check_file(args.plot, "--plot", args.force, ".png")
    check_two_files(args.output, args.plot)
    metric = (args.metric, load_metric(args.metric)) if args.metric else None
    check_alphas(list(experts), name, alphas, args.plausibility)
    check_device(args.device)
    reference = BASE if BASE in experts else next(other for other in experts if other != name)
    product = load(args, experts, dict.fromkeys(experts, 0.5))
    from trl_ext.poe.drawing import check_lengths, encode

    ids = encode(prompts, product.tokenizer, args.chat)
    check_lengths(product, prompts, ids, args.max_new_tokens)
    options: dict[str, Any] = {"batch_size": args.batch_size, "metric": metric}
    points: list[Point] = []
    facts = {"swept": name, "experts": experts, "reference": reference, "prompts": prompts}
    sampling = sampling_of(args)
    metric_name = (args.metric or "").rpartition(":")[2]
    try:
        # After each α the JSON is whole, so that Ctrl-C leaves what is done.
        for point in sweep(product, name, alphas, ids, sampling, reference=reference, **options):
            points.append(point)
            if sys.stderr.isatty():
                print(f"α = {point.alpha:g}: {point.tokens} tokens", file=sys.stderr, flush=True)
            if args.output:
                write_json(args.output, as_mapping(points, **facts, metric=args.metric))
    finally:  # what was sampled is shown, whatever came then
        if points:
            print(_sweep_table(points, name, reference, metric_name), flush=True)
    if args.plot:
        _plot(args.plot, points, name, reference, metric_name)
    return 0


def _plot(file: str, points: "Sequence[Point]", name: str, reference: str, metric: str) -> None:
    from trl_ext.poe.sweep_picture import plot

    try:
        plot(points, name, reference, Path(file), metric)
    except OSError as error:
        raise not_written("--plot", file, error) from error
    print(f"\n{file}")


def _swept(args: argparse.Namespace, names: Sequence[str]) -> tuple[str, str]:
    name, text = pair(args.sweep, "--sweep", "NAME=START:STOP:STEP or NAME=0,0.3,1")
    known(name, names, f"--sweep {args.sweep}")
    if len(names) != 2:
        raise ConfigError(
            f"--sweep {args.sweep}: a sweep is between two experts, with weights 1 − α and α; here "
            f"{'is one' if len(names) == 1 else f'are {len(names)}'}: {', '.join(names)}. Give "
            "MODEL and one --expert, or two --expert."
        )
    if args.weight:
        raise ConfigError(
            f"--weight {args.weight[0]}: a sweep sets the weights. Leave --weight out, or --sweep."
        )
    if args.own_answers is not None:
        raise ConfigError(
            "--own-answers: a sweep has no answers beside each other; at α 0 and 1 it is one "
            "expert alone. Leave it out."
        )
    return name, text


def _sweep_table(points: "Sequence[Point]", name: str, reference: str, metric: str) -> str:
    experts = list(points[0].log_likelihood)
    header = ["α", *(f"log p {expert}" for expert in experts), "log Z", f"ppl {reference}"]
    header += ["distinct-2", "tokens", *([metric] if metric else [])]
    rows = [
        [
            f"{point.alpha:g}",
            *(_mean(point.log_likelihood[expert]) for expert in experts),
            _mean(point.log_z),
            f"{point.perplexity:.4g}",
            f"{point.distinct_2:.2f}",
            str(point.tokens),
            *([_mean(point.metric)] if point.metric else []),
        ]
        for point in points
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in [header, *rows]
    ]
    prompts, samples = len(points[0].texts), len(points[0].texts[0])
    (other,) = [expert for expert in experts if expert != name]
    legend = (
        f"Samples of {other}^(1−α) · {name}^α / Z. log p and log Z are nats per token of them,\n"
        f"mean over {prompts} prompt{'s' if prompts > 1 else ''} of {samples} "
        f"sample{'s' if samples > 1 else ''} each ± standard error."
    )
    return "\n".join([legend, "", *lines])


def _mean(value: "Mean") -> str:
    if math.isnan(value.standard_error):
        return f"{value.mean:.2f}"
    return f"{value.mean:.2f} ± {value.standard_error:.2f}"
