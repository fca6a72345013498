"""Print versions and devices, for a bug report.

Below them is what is right and wrong with this machine, and what to do about it: ok, note (nothing
is wrong), warning (some runs will fail or be slow), error (something is broken). The exit code is 1
if there is an error, else 0.
"""

import argparse
import dataclasses
import json
import shutil
import textwrap
from collections import Counter

from trl_ext.doctor import Finding, diagnose
from trl_ext.doctor.probe import Probed, probe
from trl_ext.environment import environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument("--hub", action="store_true", help="ask the hub whether it answers, too")
    parser.add_argument(
        "--output-dir", default="outputs", help="the folder that runs write to; default outputs"
    )


def run(args: argparse.Namespace) -> int:
    """Print what is installed here and what was found."""
    probed = probe()
    facts = environment(device=_device(probed))
    findings = diagnose(probed, output=args.output_dir, hub=args.hub)
    if args.json:
        rows = [dataclasses.asdict(finding) for finding in findings]
        print(json.dumps(facts | {"findings": rows}, indent=2))
    else:
        width = max(map(len, facts))
        print("\n".join(f"{name:<{width}}  {fact or 'none'}" for name, fact in facts.items()))
        print("\n" + "\n".join(map(_shown, findings)) + "\n\n" + _summary(findings))
    return int(any(finding.level == "error" for finding in findings))


def _device(probed: Probed) -> str:
    if "torch" in probed.errors:
        return "unknown: torch cannot be imported"
    return probed.torch.get("device", "unknown without torch")


def _shown(finding: Finding) -> str:
    """`level  name: what was found`, and the next step below it."""
    columns = max(shutil.get_terminal_size().columns, 40)
    indent = " " * 9
    lines = textwrap.wrap(
        f"{finding.level:<9}{finding.name}: {finding.says}",
        columns,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    if finding.do:
        lines += textwrap.wrap(
            finding.do,
            columns,
            initial_indent=f"{indent}→ ",
            subsequent_indent=f"{indent}  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def _summary(findings: list[Finding]) -> str:
    counts = Counter(finding.level for finding in findings)
    said = [
        f"{n} {name}{'s' if n > 1 else ''}" for name in ("error", "warning") if (n := counts[name])
    ]
    return f"{' and '.join(said)}." if said else "Nothing is wrong."
