"""Print versions and devices, for a bug report."""

import argparse
import json

from trl_ext.environment import environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    """Print what is installed here."""
    facts = environment()
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        width = max(map(len, facts))
        print("\n".join(f"{name:<{width}}  {fact or 'none'}" for name, fact in facts.items()))
    return 0
