"""Compares reward models trained on PBAA's pairs with those trained on SSO's.

    python -m benchmarks.reward_pairs

Runs PBAA (form `pairwise`) and SSO (form `online`) on the toy world from one supervised start. Trains a reward model
from that start on the pairs of each round, with `configs/tiny_reward.yaml`, and evaluates all of them on the same
held-out pairs: answers of the start policy to held-out queries, ordered by the judge. Finished runs are not repeated.
"""

import argparse
import json
import random
import shutil
from pathlib import Path

import numpy as np

import evaluate
import sample
import train
from sso_jax.runtime.json_lines import read_json_lines, write_records
from sso_jax.toy import world
from sso_jax.toy.judge import judge

METHODS = {"PBAA": ["--objective.form", "pairwise"], "SSO": ["--objective.form", "online"]}
NUM_HELD_OUT = 300


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reward_pairs", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--directory", type=Path, default=Path("runs/reward_pairs"), help="directory of the runs (default: %(default)s)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2], help="seeds (default: 1 2)")
    parser.add_argument("--queries", type=int, default=256, help="queries per round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds per run (default: %(default)s)")
    return parser.parse_args()


def run(main, *parts) -> None:
    """Runs the `main` of a script; raises SystemExit if it fails."""
    if main([str(part) for part in parts]) != 0:
        raise SystemExit(f"failed: {parts}")


def align(root: Path, seed: int, method: str, options: argparse.Namespace) -> Path:
    """Runs the method from the supervised start that all runs share, and returns the run directory.

    The first run trains that start.
    """
    directory, start = root / f"seed{seed}" / method, root / "start"
    if start.is_dir() and not directory.is_dir():
        shutil.copytree(start, directory / "iteration_0")
    sizes = ["--queries.per_iteration", options.queries, "--run.iterations", options.rounds]
    run(
        train.main,
        "--config",
        "configs/tiny.yaml",
        "--run.directory",
        directory,
        "--run.seed",
        seed,
        *sizes,
        *METHODS[method],
    )
    if not start.is_dir():
        for part in ("start", "done/supervised_start.json"):
            source, target = directory / "iteration_0" / part, start / part
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    return directory


def held_out_pairs(root: Path) -> Path:
    """Returns the file of held-out pairs, after creating it if it is missing.

    The pairs are answers of the start policy to held-out queries under good and bad principles, ordered by the judge;
    ties are dropped.
    """
    path = root / "held_out.jsonl"
    if not path.is_file():
        queries = random.Random("held out").sample(world.queries("evaluation"), NUM_HELD_OUT)
        write_records(queries, root / "held_out_queries.jsonl")
        places = ["--queries.path", root / "held_out_queries.jsonl", "--out", root / "held_out_triples.jsonl"]
        run(
            sample.main,
            "--model.path",
            root / "start" / "start",
            *places,
            "--steered",
            "true",
            "--sampling.max_new_tokens",
            48,
        )
        rows = []
        for row in read_json_lines(root / "held_out_triples.jsonl"):
            scores = [judge(row["query"], row[side]).score for side in ("chosen", "rejected")]
            sides = (row["chosen"], row["rejected"]) if scores[0] > scores[1] else (row["rejected"], row["chosen"])
            if scores[0] != scores[1]:
                rows.append({"id": row["id"], "prompt": row["query"], "chosen": sides[0], "rejected": sides[1]})
        write_records(rows, path)
    return path


def accuracy(root: Path, aligned: Path, iteration: int, seed: int, held_out: Path) -> float:
    """Trains a reward model on the pairs of a round and returns its accuracy on the held-out pairs."""
    directory, pairs = aligned / f"reward_{iteration}", aligned / f"iteration_{iteration}" / "pairs.jsonl"
    common = [
        "--config",
        "configs/tiny_reward.yaml",
        "--run.directory",
        directory,
        "--run.seed",
        seed,
        "--reward.held_out",
        0,
    ]
    run(train.main, *common, "--model.path", root / "start" / "start", "--pairs.path", pairs)
    run(evaluate.main, "--model.path", directory, "--pairs.path", held_out, "--out", directory / "held_out.json")
    return json.loads((directory / "held_out.json").read_text())["accuracy"]


def main() -> None:
    """Runs all unfinished runs and prints the table."""
    options = arguments()
    root = options.directory
    numbers: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for seed in options.seeds:
        for method in METHODS:
            aligned = align(root, seed, method, options)
            held_out = held_out_pairs(root)
            summary = json.loads((aligned / "summary.json").read_text())
            for iteration in range(1, options.rounds + 1):
                measured = accuracy(root, aligned, iteration, seed, held_out)
                numbers.setdefault((method, iteration), []).append((summary[iteration]["pair_accuracy"], measured))
    print(
        f"{len(read_json_lines(held_out))} held-out pairs ordered by the judge; {len(options.seeds)} seeds, mean +- "
        "standard deviation"
    )
    print("| round | pairs | pair accuracy by the judge | reward model on held-out pairs |\n|---|---|---|---|")
    for iteration in range(1, options.rounds + 1):
        for method in METHODS:
            values = np.array(numbers[method, iteration])
            columns = [
                f"{mean:.3f} +- {spread:.3f}" for mean, spread in zip(values.mean(0), values.std(0), strict=True)
            ]
            print(f"| {iteration} | {method} | {columns[0]} | {columns[1]} |")


if __name__ == "__main__":
    main()
