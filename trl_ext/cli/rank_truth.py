"""What is known of completions says of their scores: labels, first errors, another scoring."""

import argparse
from typing import TYPE_CHECKING, Any

from trl_ext.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.console import Console

    from trl_ext.gibbs_prm.scored_row import ScoredRow


# An interval by bootstrap over fewer prompts is too narrow.
_FEW = 30


def rows_in(name: str) -> "list[ScoredRow]":
    """The rows of a scored file."""
    from trl_ext.gibbs_prm.scored_file import read_scored

    return list(read_scored(name))


def _correct(row: "ScoredRow") -> bool:
    return row.label is not None and row.label >= 1


def of_labels(console: "Console", rows: "list[ScoredRow]") -> dict[str, Any] | None:
    """How often a right completion scores higher than a wrong one; None without labels."""
    from trl_ext.gibbs_prm.separating import separation

    labelled = [row for row in rows if row.label is not None]
    if not labelled:
        return None
    try:
        found = separation(
            [row.scores.score for row in labelled],
            [_correct(row) for row in labelled],
            [repr(row.scores.prompt) for row in labelled],
        )
    except DataError as error:
        console.print(f"labels: {error}", markup=False)
        return None
    console.print(
        f"a right completion scores higher than a wrong one of its prompt in "
        f"{found.probability:.1%} of pairs{_interval(found.interval)}; {found.num_pairs} pairs of "
        f"{found.num_prompts} prompts"
    )
    return vars(found)


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" (95%: {interval[0]:.1%} to {interval[1]:.1%})"


def of_draws(
    console: "Console", args: argparse.Namespace, prompts: "dict[str, list[ScoredRow]]"
) -> list[dict[str, Any]] | None:
    """How often the best of n is right, beside votes and chance; None without labels."""
    from dataclasses import asdict

    from trl_ext.gibbs_prm.curves import accuracy_curve

    groups = _labelled(prompts)
    fewest = min(map(len, groups), default=0)
    if fewest < 2:
        if args.n is not None:
            raise ConfigError(
                "--n: the best of n needs labels and several completions of each prompt, and "
                f"{args.file} has {'no labels' if not groups else 'prompts with one completion'}."
            )
        return None
    ns = args.n or [2**k for k in range(fewest.bit_length())]
    if max(ns) > fewest:
        raise ConfigError(
            f"--n: {max(ns)} is more than the {fewest} completions that a prompt has."
        )
    widest = max(map(len, groups))

    def table(of: Any, empty: Any) -> list[list[Any]]:
        return [[of(row) for row in g] + [empty] * (widest - len(g)) for g in groups]

    curve = accuracy_curve(
        table(lambda row: row.scores.score, float("nan")),
        table(_correct, False),
        table(lambda row: row.answer, None),
        table(lambda row: len(row.scores.tokens), 0),
        ns,
        beta=groups[0][0].scores.beta,
    )
    has_answers = any(row.answer is not None for g in groups for row in g)
    _print_curve(console, curve, len(groups), has_answers)
    unknown = () if has_answers else ("majority", "weighted_majority", "best_minus_")
    return [
        {key: value for key, value in asdict(row).items() if not key.startswith(unknown)}
        for row in curve
    ]


def _print_curve(console: "Console", curve: Any, prompts: int, has_answers: bool) -> None:
    from rich.table import Table

    ways = {"best of n": "best", "chance": "random", "any right": "pass_at_n"}
    if has_answers:
        voting = {"majority": "majority", "weighted": "weighted_majority"}
        ways = {"best of n": "best", **voting, "chance": "random", "any right": "pass_at_n"}
    table = Table(
        "n", "tokens", *ways, title=f"right answers of {prompts} prompts in % (95% interval)"
    )
    for row in curve:
        cells = [_percent(getattr(row, name)) for name in ways.values()]
        table.add_row(str(row.n), f"{row.tokens:.0f}", *cells)
    console.print(table)
    if has_answers:
        gain = curve[-1].best_minus_majority
        console.print(f"best of {curve[-1].n} minus majority: {_percent(gain)} points")


def _percent(estimate: Any) -> str:
    if estimate.interval is None:
        return f"{100 * estimate.mean:.1f}"
    low, high = (100 * end for end in estimate.interval)
    return f"{100 * estimate.mean:.1f} ({low:.0f} to {high:.0f})"


def of_first_errors(
    console: "Console", args: argparse.Namespace, rows: "list[ScoredRow]"
) -> dict[str, Any] | None:
    """How well a threshold finds the first error; None where none is known."""
    from trl_ext.gibbs_prm.first_error import f1, predict, step_values, tune

    known = [row for row in rows if row.first_error is not None and row.scores.steps]
    if not known:
        if args.validation is not None:
            raise ConfigError(f"--validation: {args.file} has no first errors to be judged by.")
        return None
    if args.validation is not None:
        tuning = [
            r for r in rows_in(args.validation) if r.first_error is not None and r.scores.steps
        ]
        judged, where = known, args.validation
        if not tuning:
            raise ConfigError(f"--validation {where}: it has no first errors to tune by.")
    else:
        tuning, judged, where = known[::2], known[1::2], "every other solution"

    def values(of: "list[ScoredRow]") -> list[list[float]]:
        return step_values([row.scores for row in of], args.by)

    try:
        threshold = tune(values(tuning), [_label(row) for row in tuning])
    except DataError as error:
        console.print(f"first errors: {error}", markup=False)
        return None
    predicted = predict(values(judged), threshold.threshold)
    found = f1(predicted, [_label(row) for row in judged])
    console.print(
        f"first errors: F1 {found.f1:.1%} on {len(judged)} solutions (of the wrong ones "
        f"{found.accuracy_error:.1%} found, of the right ones {found.accuracy_correct:.1%} left "
        f"alone); a step is wrong where its {args.by} is below {threshold.threshold:.4g}, tuned on "
        f"{where} to an F1 of {threshold.f1:.1%}",
        markup=False,
    )
    return {"threshold": threshold.threshold, "tuned": threshold.f1, **vars(found)}


def _label(row: "ScoredRow") -> int:
    """The first error as a step of those scored: some of the file's may have become one."""
    merged, label = row.scores.merged_into, row.first_error
    assert label is not None
    return merged[label] if label >= 0 and merged else label


def of_another(
    console: "Console", args: argparse.Namespace, rows: "list[ScoredRow]"
) -> dict[str, Any] | None:
    """How alike another scoring orders the same; None if none was given."""
    from trl_ext.gibbs_prm.ranking import agreement

    if args.against is None:
        return None
    others = {(row.row, row.sample): row for row in rows_in(args.against)}
    missing = [row for row in rows if (row.row, row.sample) not in others]
    if missing:
        raise DataError(
            f"--against {args.against}: it has no completion {missing[0].sample} of row "
            f"{missing[0].row}. Score the same file twice."
        )
    found = agreement(
        [row.scores for row in rows], [others[row.row, row.sample].scores for row in rows]
    )
    console.print(
        f"agreement with {args.against}: Kendall's tau-b {found.kendall_tau_b:.3f}"
        f"{_plain(found.kendall_interval)}, Spearman's rho {found.spearman:.3f}"
        f"{_plain(found.spearman_interval)}; {found.num_prompts} prompts, {found.num_pairs} pairs",
        markup=False,
    )
    return vars(found)


def warn_of_few(
    console: "Console", found: dict[str, Any], prompts: "dict[str, list[ScoredRow]]"
) -> None:
    """What the intervals are worth where the prompts that they are of are few."""
    counts = {
        "separation": found["separation"] and found["separation"]["num_prompts"],
        "best of n": found["best_of_n"] and len(_labelled(prompts)),
        "agreement": found["agreement"] and found["agreement"]["num_prompts"],
    }
    few = [f"{what} {count}" for what, count in counts.items() if count and count < _FEW]
    if few:
        console.print(
            f"Fewer than {_FEW} prompts ({', '.join(few)}): the intervals are only a rough guide.",
            markup=False,
        )


def _labelled(prompts: "dict[str, list[ScoredRow]]") -> "list[list[ScoredRow]]":
    """Of each prompt whose completions all have a label, these."""
    return [g for g in prompts.values() if all(row.label is not None for row in g)]


def _plain(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" (95%: {interval[0]:.3f} to {interval[1]:.3f})"
