"""A run directory in, `report.html` (one self-contained file) and the table of a round out."""

import base64
import io
import json
from importlib import resources
from pathlib import Path

import jinja2
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from sso_jax.records import read_json_lines, write_text
from sso_jax.report_triples import page_rows, script_json

INK, MUTED = "#1f2933", "#7b8794"
STYLE = {"font.size": 9, "text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED, "svg.hashsalt": "sso_jax"}
"""Of every figure; the salt makes equal runs write equal files."""
COLORS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed")


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _before(numbers: dict) -> str:
    """The pairs that came to the filters, for comparison with what they left."""
    accuracy = "" if numbers.get("pair_accuracy") is None else f", accuracy {numbers['pair_accuracy']:.3f}"
    probabilities = " / ".join(_number(numbers[f"{side}_probability"]) for side in ("chosen", "rejected"))
    return f"{numbers['num_pairs']} pairs{accuracy}, on-policy probability {probabilities}"


def table(row: dict) -> str:
    """The table of one round, for the terminal."""
    title = f"iteration {row['iteration']}" + (" (before any update)" if row["iteration"] == 0 else "")
    lines: list[tuple[str, str]] = []
    if row["num_queries"] is not None and row["num_pairs"] is None:
        lines.append(("demonstrations", str(row["num_queries"])))
    if row["num_pairs"] is not None:
        lines.append(("pairs kept", f"{row['num_pairs']} of {row['num_queries']} queries"))
        lines += [(f"  dropped: {reason}", str(count)) for reason, count in sorted(row["dropped"].items())]
        if row.get("before_filter") is not None:
            lines.append(("  before the filters", _before(row["before_filter"])))
        if row["pair_accuracy"] is not None:
            lines.append(("pair accuracy", f"{row['pair_accuracy']:.3f} (ties {row['pair_ties']:.3f}, as half)"))
        probabilities = f"{_number(row['chosen_probability'])} / {_number(row['rejected_probability'])}"
        lines.append(("on-policy probability, chosen / rejected", probabilities))
        lines.append(("tokens a response", _number(row["response_tokens"], 1)))
    lines += _judged_lines(row)
    if row["policy_quality"] is not None:
        parts = ", ".join(f"{name} {value:.2f}" for name, value in row["quality_parts"].items())
        lines.append(("policy quality, unsteered, held out", f"{row['policy_quality']:.3f} ({parts})"))
    for group, means in (row.get("held_out_groups") or {}).items():
        lines.append((f"  {group}", f"{means['quality']:.3f}, {means['tokens']:.1f} tokens, {means['at_limit']:.3f} cut at the limit"))
    if row.get("held_out_log_prob") is not None:
        lines.append(("log-prob a token of the first policy's answers", f"{row['held_out_log_prob']:.3f} (they are in no pair)"))
    if row["seconds"] is not None:
        lines.append(("seconds", ", ".join(f"{stage} {value:.1f}" for stage, value in row["seconds"].items())))
    if row["tokens_per_second"] is not None:
        rates = row["tokens_per_second"]
        lines.append(("tokens a second", ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items() if rate is not None)))
    width = max((len(name) for name, _ in lines), default=0)
    body = [f"  {name:<{width}}  {value}" for name, value in lines] or ["  nothing to measure without a judge"]
    return "\n".join([f"== {title} ".ljust(width + 30, "="), *body])


def _judged_lines(row: dict) -> list[tuple[str, str]]:
    """Lines of a round's endpoint judge and of its reward model, where it has them."""
    lines = []
    judged, reward = row.get("endpoint_judge"), row.get("reward")
    if judged:
        numbers = f"{_number(judged['accuracy'])} of {judged['num_judged']} (ties {_number(judged['ties'])}, as half)"
        lines.append(("pair accuracy by the endpoint", f"{numbers}; both orders agree {_number(judged['consistency'])}"))
    if reward:
        lines.append(("reward model, held-out accuracy", f"{_number(reward.get('held_out_accuracy'))} of {reward['num_held_out']} pairs"))
        if reward.get("judge_accuracy") is not None:
            lines.append(("reward model, in the judge's order", f"{_number(reward['judge_accuracy'])}"))
    return lines


def _figure(panels: list[tuple[str, str, list[tuple[str, list, list]]]], columns: int) -> str:
    """An SVG of panels (title, x label, curves as (name, xs, ys)), as a data URI."""
    rows = -(-len(panels) // columns)
    with plt.rc_context(
        {"svg.hashsalt": "sso_jax", "font.size": 9, "text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED}
    ):
        figure, axes = plt.subplots(rows, columns, figsize=(3.5 * columns, 2.5 * rows), squeeze=False, layout="constrained")
        for axis in axes.flat[len(panels) :]:
            axis.axis("off")
        for axis, (title, label, curves) in zip(axes.flat, panels, strict=False):
            for color, (name, xs, ys) in zip(COLORS, curves, strict=False):
                axis.plot(xs, ys, color=color, label=name, linewidth=1.6, marker="o" if len(xs) < 30 else None, markersize=3)
            axis.set_title(title, loc="left", fontsize=10, fontweight="bold")
            axis.set_xlabel(label)
            axis.spines[["top", "right"]].set_visible(False)
            axis.spines[["left", "bottom"]].set_color("#cbd2d9")
            axis.grid(axis="y", color="#e4e7eb", linewidth=0.8)
            axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True, nbins=6))
            if len(curves) > 1:
                axis.legend(frameon=False, fontsize=8)
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
        plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()


def _curve(rows: list[dict], name: str, field: str, x: str | None = None) -> tuple[str, list, list]:
    """(name, xs, ys) of a field, rows without it left out; x is a field, or the row's number."""
    points = [(i if x is None else row[x], row[field]) for i, row in enumerate(rows) if row.get(field) is not None]
    return name, [p[0] for p in points], [p[1] for p in points]


def _panels_of_rounds(summary: list[dict]) -> list:
    parts = [{"iteration": row["iteration"], **(row["quality_parts"] or {})} for row in summary]
    names = [name for name in parts[0] if name != "iteration"]
    panels = [
        ("Policy quality, unsteered, held out", [_curve(summary, "quality", "policy_quality", "iteration")]),
        ("Its parts", [_curve(parts, name, name, "iteration") for name in names]),
        ("Pair accuracy and ties", [_curve(summary, n, f, "iteration") for n, f in (("accuracy", "pair_accuracy"), ("ties", "pair_ties"))]),
        ("On-policy probability", [_curve(summary, n, f"{n}_probability", "iteration") for n in ("chosen", "rejected")]),
        (
            "Tokens a response",
            [_curve(summary, n, f, "iteration") for n, f in (("sampled", "response_tokens"), ("held out", "held_out_tokens"))],
        ),
        ("Pairs kept", [_curve(summary, "pairs", "num_pairs", "iteration")]),
    ]
    return [(title, "iteration", curves) for title, curves in panels if any(xs for _, xs, _ in curves)]


def _panels_of_updates(metrics: list[dict]) -> list:
    losses = [("loss", "loss"), ("base", "base_loss"), ("L+", "positive_loss"), ("L-", "negative_loss")]
    panels = [
        ("Loss", [_curve(metrics, name, field) for name, field in losses]),
        ("Margin of the plain pair", [_curve(metrics, "margin", "margin")]),
        ("Accuracy of the pair", [_curve(metrics, "of the batch", "accuracy"), _curve(metrics, "held out", "held_out_accuracy")]),
        ("Rewards", [_curve(metrics, name, f"{name}_reward") for name in ("chosen", "rejected")]),
        ("Log-prob sums, nats", [_curve(metrics, n, f"{n}_log_prob") for n in ("chosen", "rejected", "original")]),
        ("Weight W", [_curve(metrics, "W", "weight")]),
        ("Gradient norm", [_curve(metrics, "norm", "grad_norm")]),
    ]
    panels = [(title, [curve for curve in curves if curve[1]]) for title, curves in panels]
    return [(title, "update", curves) for title, curves in panels if curves]


def _resource(name: str) -> str:
    return resources.files("sso_jax").joinpath(name).read_text(encoding="utf-8")


def write(directory: Path) -> None:
    """Writes `report.html` from the run's summary, metrics and pairs."""
    summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    metrics_path = directory / "metrics.jsonl"
    metrics = read_json_lines(metrics_path) if metrics_path.is_file() else []
    figures = []
    rounds, updates = _panels_of_rounds(summary), _panels_of_updates(metrics)
    if rounds:
        figures.append(("Over iterations", _figure(rounds, columns=3)))
    if updates:
        figures.append(("Over updates", _figure(updates, columns=3)))
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = _number
    template = environment.from_string(_resource("report.html.jinja"))
    html = template.render(
        name=directory.name,
        config=(directory / "config.yaml").read_text(encoding="utf-8"),
        summary=summary,
        figures=figures,
        judged=[(row["iteration"], _judged_lines(row)) for row in summary],
        triples=script_json(page_rows(directory, [row["iteration"] for row in summary if row["iteration"]])),
        script=_resource("report.js"),
    )
    write_text(html, directory / "report.html")
