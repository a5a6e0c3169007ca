"""Builds tables of means and deviations over seeds, answers side by side, and a figure, from finished cells."""

from pathlib import Path

import matplotlib
import numpy as np

from benchmarks.real_model.cells import answers_of, rows_of
from benchmarks.real_model.methods import ITERATIONS, METHODS, Cell
from benchmarks.steering.tables import markdown, spread, value

matplotlib.use("Agg")
from matplotlib import pyplot as plt

MEASURES = {
    "tokens": ("held_out_answers.mean_tokens", 1),
    "tokens, 90th percentile": ("held_out_answers.p90_tokens", 1),
    "cut at the limit": ("held_out_answers.cut", 3),
    "repeated 4-grams": ("held_out_answers.repeated_4grams", 3),
    "compressed size": ("held_out_answers.compressed", 3),
    "empty": ("held_out_answers.empty", 3),
    "refused": ("held_out_answers.refused", 3),
    "relevance": ("held_out_answers.relevance", 3),
    "instructions, strict": ("held_out_answers.instructions.instruction_strict", 3),
    "instructions, loose": ("held_out_answers.instructions.instruction_loose", 3),
    "prompts, strict": ("held_out_answers.instructions.prompt_strict", 3),
    "prompts, loose": ("held_out_answers.instructions.prompt_loose", 3),
    "log p(start) - log p": ("held_out_answers.start_log_ratio", 2),
    "steerability, y+": ("held_out_answers.steerability.chosen", 4),
    "steerability, y-": ("held_out_answers.steerability.rejected", 4),
    "p(chosen)": ("chosen_probability", 3),
    "p(rejected)": ("rejected_probability", 3),
    "held-out pairs, accuracy": ("held_out.accuracy", 3),
    "held-out pairs, loss": ("held_out.loss", 4),
}
"""Numbers by title: their path in a row of summary.json, and digits."""
FIGURE = ("tokens", "repeated 4-grams", "relevance", "instructions, strict", "log p(start) - log p", "steerability, y+")
BASELINE = "pbaa"
NUM_ANSWERS, SHOWN_CHARACTERS = 5, 400


def finished(root: Path, cells: list[Cell]) -> dict[str, dict[int, list[dict]]]:
    """Returns the rows of the finished cells, the start first, by method and seed."""
    runs: dict[str, dict[int, list[dict]]] = {}
    for cell in cells:
        rows = rows_of(root, cell)
        if rows is not None:
            runs.setdefault(cell.method, {})[cell.seed] = rows
    return runs


def page(root: Path, choices: list[Cell], rates: dict[str, float], cells: list[Cell]) -> str:
    """Returns all tables: the choice of rates, each measure by iteration, differences, and answers side by side."""
    runs = finished(root, cells)
    missing = [cell.name for cell in cells if cell.seed not in runs.get(cell.method, {})]
    parts = ["## Learning rates", rates_table(root, choices, rates)]
    if missing or not cells:
        parts.append(
            f"PARTIAL: {len(cells) - len(missing)} of {len(cells)} cells are done; missing: {', '.join(missing)}."
        )
    if runs:
        parts += ["## Every measure, by iteration", measures_table(runs)]
        parts += ["## Less PBAA after the last iteration, seed by seed", differences_table(runs)]
        parts += ["## Answers before and after", answers(root, cells, runs)]
    return "\n\n".join(parts) + "\n"


def rates_table(root: Path, choices: list[Cell], rates: dict[str, float]) -> str:
    """Returns the table of the cells that chose the rates, after one iteration."""
    shown = (
        "held-out pairs, loss",
        "held-out pairs, accuracy",
        "log p(start) - log p",
        "repeated 4-grams",
        "relevance",
    )
    rows = []
    for cell in choices:
        found = rows_of(root, cell)
        numbers = ["-"] * (len(shown) + 1)
        if found:
            numbers = [spread([value(found[-1], MEASURES[name][0])], MEASURES[name][1]) for name in shown]
            numbers.append(f"{found[-1]['seconds']['training']:.0f}")
        chosen = "yes" if cell.weights == "adapters" and rates.get(cell.method) == cell.rate else ""
        rows.append([cell.method, cell.weights, f"{cell.rate:g}", *numbers, chosen])
    return markdown(["base loss", "trained", "rate", *shown, "seconds of updates", "chosen"], rows)


def measures_table(runs: dict[str, dict[int, list[dict]]]) -> str:
    """Returns a row for each measure and method, and a column for each iteration; the start is that of all methods."""
    rows = []
    for title, (path, digits) in MEASURES.items():
        for method, of_seeds in runs.items():
            cells = [spread(_of_iteration(of_seeds, k, path), digits) for k in range(ITERATIONS + 1)]
            rows.append([title, METHODS[method].title, *cells])
    header = ["measure", "method", "start", *(f"iteration {k}" for k in range(1, ITERATIONS + 1))]
    return markdown(header, rows)


def _of_iteration(of_seeds: dict[int, list[dict]], iteration: int, path: str) -> list[float]:
    found = [value(rows[iteration], path) for rows in of_seeds.values()]
    return [] if None in found else found


def differences_table(runs: dict[str, dict[int, list[dict]]]) -> str:
    """Returns the differences from PBAA in the last iteration, and the least difference that these seeds can resolve.

    That is twice the standard error of the mean difference, the largest of all methods.
    """
    methods = [method for method in runs if method != BASELINE and BASELINE in runs]
    rows = []
    for title, (path, digits) in MEASURES.items():
        texts, errors = [], []
        for method in methods:
            common = sorted(runs[method].keys() & runs[BASELINE].keys())
            last = {name: [value(runs[name][seed][-1], path) for seed in common] for name in (method, BASELINE)}
            pairs = zip(last[method], last[BASELINE], strict=True)
            gaps = [a - b for a, b in pairs if None not in (a, b) and _comparable(path, method)]
            above = f" ({sum(gap > 0 for gap in gaps)} of {len(gaps)} above)" if gaps else ""
            texts.append(spread(gaps, digits) + above)
            errors += [2 * np.std(gaps, ddof=1) / len(gaps) ** 0.5] if len(gaps) > 1 else []
        rows.append([title, *texts, f"{max(errors):.{digits}f}" if errors else "-"])
    return markdown(["measure", *(METHODS[method].title for method in methods), "resolves"], rows)


def _comparable(path: str, method: str) -> bool:
    """Returns whether a number means the same under a method and under PBAA.

    Losses do with the same base loss and form alone: those of version 1 have steering terms besides.
    """
    own, base = METHODS[method], METHODS[BASELINE]
    same_form = own.fields["objective.form"] == base.fields["objective.form"]
    return path != "held_out.loss" or (own.family == base.family and same_form)


def answers(root: Path, cells: list[Cell], runs: dict[str, dict[int, list[dict]]]) -> str:
    """Returns the first answers of the held-out list of the first seed, at the start and after the last iteration."""
    seed = min(cell.seed for cell in cells)
    shown = [cell for cell in cells if cell.seed == seed and cell.seed in runs.get(cell.method, {})]
    if not shown:
        return ""
    columns = {"start": answers_of(root, shown[0], 0)}
    columns |= {METHODS[cell.method].title: answers_of(root, cell, ITERATIONS) for cell in shown}
    parts = []
    for i in range(min(NUM_ANSWERS, len(columns["start"]))):
        rows = [[title, _one_line(own[i]["response"])] for title, own in columns.items()]
        parts += [f"{i + 1}. {_one_line(columns['start'][i]['query'])}", markdown(["policy", "answer"], rows)]
    return "\n\n".join(parts)


def _one_line(text: str) -> str:
    """Returns the head of a text as one line of a Markdown table."""
    line = " / ".join(part.strip() for part in text.splitlines() if part.strip()).replace("|", "\\|")
    return line if len(line) <= SHOWN_CHARACTERS else line[:SHOWN_CHARACTERS] + " ..."


def write_figure(path: Path, root: Path, cells: list[Cell]) -> None:
    """Draws the main measures over the iterations: the mean over seeds, and each seed as a thin line."""
    runs = finished(root, cells)
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
    for axis, title in zip(axes.flat, FIGURE, strict=True):
        for number, (method, of_seeds) in enumerate(runs.items()):
            lines = [[value(row, MEASURES[title][0]) for row in rows] for rows in of_seeds.values()]
            if any(None in line for line in lines):
                continue
            for line in lines:
                axis.plot(range(len(line)), line, color=f"C{number}", linewidth=0.5, alpha=0.5)
            axis.plot(range(len(lines[0])), np.mean(lines, axis=0), color=f"C{number}", label=METHODS[method].title)
        axis.set(title=title, xlabel="iteration", xticks=range(ITERATIONS + 1))
    axes.flat[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
