"""How well the Gibbs score of a policy judges what its reference writes, on held-out questions.

    trl_ext train rwr/quickstart
    python benchmarks/prm_accuracy.py outputs/quickstart [--samples 16] [--output prm_accuracy.json]

For every held-out prompt of the run's dataset the reference writes some completions, which the
run's reward judges; `trl_ext score` and `trl_ext rank` do the rest: how often a right completion
scores higher than a wrong one, and the accuracy of the best of n beside majority voting, weighted
voting and chance, with 95% intervals over the prompts. The same for completions of the policy.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from trl_ext.cli import main as trl_ext
from trl_ext.environment import environment
from trl_ext.gibbs_prm import GenerateSampler, GibbsScorer
from trl_ext.recipe.recipe import read_recipe
from trl_ext.rewards.build import build_rewards
from trl_ext.tasks import load_splits

RESULTS = Path(__file__).parent / "results"


def rows_of(run: str, writer: str, samples: int, stop: str, seed: int) -> list[dict[str, Any]]:
    """The held-out prompts with completions, whether each is right, and its answer."""
    recipe = read_recipe(f"{run}/recipe.yaml")
    _, held_out = load_splits(recipe.values)
    assert held_out is not None, "the run's dataset has no held-out split"
    scorer = GibbsScorer(run, dtype="bfloat16")
    model = scorer.policy if writer == "policy" else scorer.reference
    tokenizer = scorer.tokenizer
    stops = [i for i in range(len(tokenizer)) if stop in tokenizer.decode([i])]
    sampler = GenerateSampler(
        model,
        tokenizer,
        max_completion_length=recipe.values["max_completion_length"],
        stop_token_ids=stops,
        batch_size=64,
    )
    ids = [tokenizer(prompt)["input_ids"] for prompt in held_out["prompt"]]
    drawn = sampler.sample(ids, samples, seed=seed)
    [reward] = build_rewards(recipe.values["reward_funcs"])
    rows = []
    for row, completions in zip(held_out, drawn, strict=True):
        texts = [tokenizer.decode(each, skip_special_tokens=True) for each in completions]
        columns = {name: [value] * samples for name, value in row.items() if name != "prompt"}
        rewards = reward(prompts=[row["prompt"]] * samples, completions=texts, **columns)
        rows.append(
            {
                "prompt": row["prompt"],
                "completions": texts,
                "label": [value >= 1 for value in rewards],
                "answer": [text.strip() for text in texts],
            }
        )
    return rows


def judged(run: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What `score` and `rank` say of them."""
    with tempfile.TemporaryDirectory() as folder:
        completions, scored, numbers = (f"{folder}/{n}" for n in ("c.jsonl", "s.jsonl", "n.json"))
        Path(completions).write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert trl_ext(["score", run, completions, "--output", scored, "--dtype", "bfloat16"]) == 0
        assert trl_ext(["rank", scored, "--json", numbers]) == 0
        return json.loads(Path(numbers).read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="output_dir of a run on texts, with a held-out split")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--stop", default="\n", help="a completion ends with a token that has it")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", default="prm_accuracy.json", help="file in benchmarks/results")
    options = parser.parse_args()
    found = {}
    for writer in ("reference", "policy"):
        print(f"\ncompletions of the {writer}:")
        rows = rows_of(options.run, writer, options.samples, options.stop, options.seed)
        found[writer] = judged(options.run, rows)
    record = {"options": vars(options), "environment": environment(), **found}
    path = RESULTS / options.output
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
