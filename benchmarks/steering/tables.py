"""Builds tables of means and deviations over seeds, and a figure, from finished cells.

The tables of an unfinished study begin with a list of missing cells. Numbers of a round's pairs (accuracy, ties,
probabilities, steerability, tokens) describe the policy at the start of the round; quality is measured after it.
"""

from functools import reduce
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np

from benchmarks.steering.cells import rounds_of
from benchmarks.steering.methods import FAMILIES, METHODS, RATES, STUDIES, Cell

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PARTS = ("truth", "completeness", "politeness", "concision")
PAIR_FIELDS = (
    "pair_accuracy",
    "pair_ties",
    "chosen_probability",
    "rejected_probability",
    "steerability",
    "response_tokens",
)
TITLES = ("pair accuracy", "ties", "P(chosen)", "P(rejected)", "steerability", "tokens sampled")
BY_ITERATION = tuple(
    (field, title, 1 if field == "response_tokens" else 2) for field, title in zip(PAIR_FIELDS, TITLES, strict=True)
)
BY_ITERATION += tuple((f"quality_parts.{part}", part, 2) for part in PARTS) + (
    ("held_out_tokens", "tokens, unsteered", 1),
)
"""Numbers shown for every iteration besides quality: field, title, digits."""
MATCHED_QUALITY = 0.65
BASELINES = {"pbaa_ipo": "pbaa_ipo", "v1_ipo": "pbaa_ipo", "pbaa_ipo_1": "pbaa_ipo_1", "v1_ipo_1": "pbaa_ipo_1"}
"""Method that a method is compared with, seed by seed; PBAA with DPO if it is not listed."""

FULL_OBJECTIVES = {part: "v1_g_1" for part in ("v1_positive", "v1_negative", "v1_naive")}
FULL_OBJECTIVES |= {part: "v2" for part in ("v2_positive", "v2_negative", "v2_naive")}
"""Full objective of each ablation of G."""

Runs = dict[tuple[str, int], dict[int, list[dict]]]
"""(method, queries) -> seed -> rows, the start first."""


EVERY_GROUP = ("all", "descriptions", "others")
LENGTH_TABLES = (
    ("Tokens of the chosen responses that a round trains on", "pair_tokens.{}.chosen", EVERY_GROUP, 1),
    ("Tokens of the rejected ones", "pair_tokens.{}.rejected", EVERY_GROUP, 1),
    ("Tokens of held-out answers, unsteered, after the iteration", "held_out_groups.{}.tokens", EVERY_GROUP, 1),
    ("Quality of these answers", "held_out_groups.{}.quality", EVERY_GROUP, 3),
    ("Share of these answers that ran to the limit of tokens", "held_out_groups.{}.at_limit", EVERY_GROUP, 3),
    ("How long descriptions look to the judge", "quality_parts.length", ("descriptions",), 3),
    (
        "Share of a description's sentences that are true and not repeated",
        "quality_parts.substance",
        ("descriptions",),
        3,
    ),
)
"""Tables of study length: title, path of the number in a row, groups of queries, digits."""


def value(row: dict, path: str) -> float | None:
    """Returns the number at a dotted path in a row, or None if it is missing."""
    return reduce(lambda part, name: (part or {}).get(name), path.split("."), row)


def spread(values: list[float], digits: int = 3) -> str:
    """Formats `mean ± sample standard deviation`; only the mean for one value, `-` for none."""
    if not values or any(v is None for v in values):
        return "-"
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Formats a Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row):
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"

    return "\n".join([line(header), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)])


def finished_runs(root: Path, cells: list[Cell]) -> Runs:
    """Returns the rows of every finished cell."""
    runs: Runs = {}
    for cell in cells:
        rows = rounds_of(root, cell)
        if rows is not None:
            runs.setdefault((cell.method, cell.queries), {})[cell.seed] = rows
    return runs


def rates_table(root: Path, cells: list[Cell], rates: dict[str, float]) -> str:
    """Returns the table of final quality by family and rate, with the chosen rates."""
    rows = []
    for family in FAMILIES:
        found = {cell.rate: rounds_of(root, cell) for cell in cells if cell.method == family}
        scores = [f"{found[rate][-1]['policy_quality']:.3f}" if found.get(rate) else "-" for rate in RATES]
        rows.append([family, *scores, f"{rates[family]:g}" if family in rates else "none yet"])
    return "\n".join(
        [
            "## Learning rates, chosen on seed 0",
            "",
            markdown(["family", *(f"{r:g}" for r in RATES), "chosen"], rows),
            "",
        ]
    )


def study_tables(root: Path, study: str, cells: list[Cell]) -> str:
    """Returns all tables of a study."""
    runs = finished_runs(root, cells)
    done = sum(len(of_seeds) for of_seeds in runs.values())
    lines = [f"## Study {study}: {STUDIES[study]}", ""]
    if done < len(cells):
        missing = [
            f"{cell.method}/{cell.queries}/{cell.seed}"
            for cell in cells
            if cell.seed not in runs.get((cell.method, cell.queries), {})
        ]
        lines += [
            f"PARTIAL: {done} of {len(cells)} cells are done; missing (method/queries/seed): {', '.join(missing)}.",
            "",
        ]
    if not runs:
        return "\n".join([*lines, "Nothing to show yet.", ""])
    several = len({queries for _, queries in runs}) > 1

    def name(key):
        return METHODS[key[0]].title + (f", {key[1]} queries" if several else "")

    lines += ["### Quality after each iteration", "", _quality_table(runs, name), ""]
    lines += [
        "### The last round's pairs (of the policy at its start), and the final policy's length",
        "",
        _pairs_table(runs, name),
        "",
    ]
    lines += ["### Pairs and policy, iteration by iteration", "", _by_iteration_table(runs, name), ""]
    lines += ["### Less PBAA with the same base loss, seed by seed", "", _differences_table(runs, name), ""]
    if any(_difference(runs, key, baselines=FULL_OBJECTIVES) != "-" for key in runs):
        lines += [
            "### Parts of G less the whole, seed by seed",
            "",
            _differences_table(runs, name, FULL_OBJECTIVES),
            "",
        ]
    if study == "length":
        lines += _length_tables(runs, name)
    lines += [
        f"### At matched quality: what the pairs are where the policy that samples them reaches {MATCHED_QUALITY}",
        "",
    ]
    return "\n".join([*lines, _matched_table(runs, name), ""])


def _iterations(runs: Runs) -> list[int]:
    """Returns up to five iterations to show, including the last."""
    num = max(len(rows) - 1 for of_seeds in runs.values() for rows in of_seeds.values())
    return sorted({round(k) for k in np.linspace(1, num, min(num, 5))})


def _quality_table(runs: Runs, name) -> str:
    shown = _iterations(runs)
    rows = []
    for key, of_seeds in runs.items():
        qualities = [spread([rows[k]["policy_quality"] for rows in of_seeds.values()]) for k in (0, *shown)]
        parts = [spread([rows[-1]["quality_parts"][part] for rows in of_seeds.values()], 2) for part in PARTS]
        rows.append([name(key), str(len(of_seeds)), *qualities, _difference(runs, key), *parts])
    return markdown(
        ["method", "seeds", "start", *(f"iteration {k}" for k in shown), "less PBAA, by seed", *PARTS], rows
    )


def _difference(
    runs: Runs, key: tuple[str, int], field: str = "policy_quality", baselines: dict[str, str] | None = None
) -> str:
    """Formats the differences from the baseline in the last round: mean, deviation, and number of seeds above it."""
    baseline_method = BASELINES.get(key[0], "pbaa_dpo") if baselines is None else baselines.get(key[0])
    baseline = runs.get((baseline_method, key[1]), {})
    common = sorted(runs[key].keys() & baseline.keys())
    if not common or runs[key] is baseline:
        return "-"
    gaps = [runs[key][seed][-1][field] - baseline[seed][-1][field] for seed in common]
    return f"{spread(gaps)} ({sum(gap > 0 for gap in gaps)} of {len(gaps)} above)"


def _differences_table(runs: Runs, name, baselines: dict[str, str] | None = None) -> str:
    fields = (
        "policy_quality",
        "pair_accuracy",
        "pair_ties",
        "chosen_probability",
        "rejected_probability",
        "steerability",
    )
    compared = [key for key in runs if _difference(runs, key, baselines=baselines) != "-"]
    rows = [[name(key), *(_difference(runs, key, field, baselines) for field in fields)] for key in compared]
    return markdown(["method", "quality", *TITLES[:5]], rows)


def _over_iterations(of_seeds: dict[int, list[dict]], path: str, shown: tuple[int, ...], digits: int) -> list[str]:
    """Formats the number at a path for each of the iterations, over the seeds."""
    return [spread([value(rows[k], path) for rows in of_seeds.values()], digits) for k in shown]


def _by_iteration_table(runs: Runs, name) -> str:
    """Returns a table with a row per method and number, and a column per iteration.

    Numbers of pairs are from the iteration in which they are made; those of the policy are from after it.
    """
    shown, table = (0, *_iterations(runs)), []
    for key, of_seeds in runs.items():
        for field, title, digits in BY_ITERATION:
            table.append([name(key), title, *_over_iterations(of_seeds, field, shown, digits)])
    return markdown(["method", "number", "start", *(f"iteration {k}" for k in shown[1:])], table)


def _length_tables(runs: Runs, name) -> list[str]:
    """Returns the tables that show length drift: a row per method and query group, and a column per iteration."""
    shown, lines = (0, *_iterations(runs)), []
    for title, path, groups, digits in LENGTH_TABLES:
        rows = [
            [name(key), group, *_over_iterations(of_seeds, path.format(group), shown, digits)]
            for key, of_seeds in runs.items()
            for group in groups
        ]
        lines += [
            f"### {title}",
            "",
            markdown(["method", "queries", "start", *(f"iteration {k}" for k in shown[1:])], rows),
            "",
        ]
    return lines


def _pairs_table(runs: Runs, name) -> str:
    rows = []
    for key, of_seeds in runs.items():
        last = [rows[-1] for rows in of_seeds.values()]
        values = [
            spread([row.get(field) for row in last], 1 if field == "response_tokens" else 2) for field in PAIR_FIELDS
        ]
        kept = spread([row["num_pairs"] for row in last], 0)
        rows.append([name(key), kept, *values, spread([row["held_out_tokens"] for row in last], 1)])
    return markdown(["method", "pairs", *TITLES, "tokens, final"], rows)


def _matched_table(runs: Runs, name) -> str:
    """Returns the table at matched quality, without seeds in which no sampling policy reaches that quality."""
    rows = []
    for key, of_seeds in runs.items():
        reached = {field: [] for field in PAIR_FIELDS}
        for of_rounds in of_seeds.values():
            for field in PAIR_FIELDS:
                value = _at_quality(of_rounds, field)
                reached[field] += [] if value is None else [value]
        rows.append(
            [
                name(key),
                str(len(reached[PAIR_FIELDS[0]])),
                *(spread(reached[f], 1 if f == "response_tokens" else 2) for f in PAIR_FIELDS),
            ]
        )
    return markdown(["method", "seeds", *TITLES], rows)


def _at_quality(of_rounds: list[dict], field: str) -> float | None:
    """Interpolates a number of the pairs to where the sampling policy's quality first crosses MATCHED_QUALITY.

    Returns None if it never does.
    """
    points = [(before["policy_quality"], after[field]) for before, after in pairwise(of_rounds)]
    for (low, first), (high, second) in pairwise(points):
        if low < MATCHED_QUALITY <= high:
            return first + (second - first) * (MATCHED_QUALITY - low) / (high - low)
    return None


PANELS = (
    ("policy_quality", "Quality, unsteered, held out"),
    ("pair_accuracy", "Pair accuracy"),
    ("pair_ties", "Ties"),
    ("chosen_probability", "P(chosen), plain prompt"),
    ("rejected_probability", "P(rejected), plain prompt"),
    ("steerability", "Steerability at the round's start"),
    ("response_tokens", "Tokens sampled"),
    ("held_out_tokens", "Tokens, unsteered"),
)

LENGTH_PANELS = (
    ("held_out_groups.descriptions.tokens", "Tokens of descriptions, unsteered"),
    ("held_out_groups.others.tokens", "Tokens of the others"),
    ("pair_tokens.descriptions.chosen", "Descriptions: tokens, chosen"),
    ("pair_tokens.descriptions.rejected", "... and rejected"),
    ("held_out_groups.descriptions.quality", "Quality of descriptions"),
    ("held_out_groups.others.quality", "Quality of the others"),
    ("quality_parts.substance", "Substance of descriptions"),
    ("held_out_groups.all.at_limit", "Ran to the limit"),
)


def write_figure(root: Path, study: str, cells: list[Cell]) -> None:
    """Writes curves over iterations to `STUDY.svg`: mean and range over the seeds of each method."""
    runs = finished_runs(root, cells)
    if not runs:
        return
    shown = [key for key in runs if study != "main" or key[0] in (*FAMILIES, "random", "judge")]
    figure, axes = plt.subplots(2, 4, figsize=(15, 6.5), layout="constrained")
    for axis, (field, title) in zip(axes.flat, LENGTH_PANELS if study == "length" else PANELS, strict=True):
        for color, key in zip(plt.cm.tab10(np.linspace(0, 1, 10)), shown, strict=False):
            values = np.array(
                [[value(row, field) for row in rows] for rows in runs[key].values()], float
            )  # None becomes NaN
            label = METHODS[key[0]].title + (f", {key[1]}" if study == "data" else "")
            axis.plot(
                np.arange(values.shape[1]), values.mean(axis=0), color=color, label=label, marker="o", markersize=3
            )
            axis.fill_between(
                np.arange(values.shape[1]), values.min(axis=0), values.max(axis=0), color=color, alpha=0.12
            )
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("iteration")
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(root / f"{study}.svg", metadata={"Date": None})
    plt.close(figure)
