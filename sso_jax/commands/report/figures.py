"""Curves of a run as SVG figures, one for each panel."""

import base64
import io
import math
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

INK, MUTED = "#1f2933", "#616e7c"
STYLE = {
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.formatter.useoffset": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "svg.fonttype": "none",
    "svg.hashsalt": "sso_jax",
}
"""Style of every figure; with the fixed salt, equal runs write equal files."""
COLORS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#db2777", "#65a30d", "#78350f", "#475569")
Range = tuple[float, float]


class Curve(NamedTuple):
    """The points of one line."""

    name: str
    xs: list
    ys: list


class Panel(NamedTuple):
    """One chart: its curves over `x_range`, all iterations or updates of a run, with points there or not."""

    title: str
    x_label: str
    x_range: Range
    curves: list[Curve]


def x_limits(x_range: Range) -> Range:
    """Returns the limits of a horizontal axis: 5% on both sides, half a step around a single iteration or update."""
    low, high = x_range
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def y_limits(values: list[float]) -> Range:
    """Returns the limits of a vertical axis: 5% on both sides of the values.

    One value, or values that differ by rounding only, are in the middle: 0.6 from 0.3 to 0.9, 0 from -0.5 to 0.5.
    """
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    margin = 0.05 * (high - low) if high - low > 1e-6 * size else size / 2 or 0.5
    return low - margin, high + margin


def figure_uri(panel: Panel) -> str:
    """Draws a panel as an SVG without its title; returns it as a data URI."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(3.5, 2.3), layout="constrained")
        _draw(axis, panel)
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
        plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()


def _draw(axis: Axes, panel: Panel) -> None:
    """Draws the curves and their axes; a single point is labelled with its value."""
    for color, (name, xs, ys) in zip(COLORS, panel.curves, strict=False):
        axis.plot(xs, ys, color=color, label=name, linewidth=1.6, marker="o" if len(xs) < 30 else None, markersize=3)
        if len(xs) == 1:
            side, shift = ("right", -4) if xs[0] > sum(panel.x_range) / 2 else ("left", 4)
            axis.annotate(f"{ys[0]:.4g}", (xs[0], ys[0]), (shift, 4), textcoords="offset points", color=color, ha=side)
    axis.set_xlim(*x_limits(panel.x_range))
    axis.set_ylim(*y_limits([y for curve in panel.curves for y in curve.ys]))
    axis.set_xlabel(panel.x_label)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#cbd2d9")
    axis.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
    if len(panel.curves) > 1:
        axis.legend(frameon=False, fontsize=8)


def _curve(rows: list[dict], name: str, field: str, x: str | None = None) -> Curve:
    """Returns the finite values of a field, without rows that lack it; x is a field, or None for the row index."""
    found = [(i if x is None else row[x], row.get(field)) for i, row in enumerate(rows)]
    points = [(at, value) for at, value in found if value is not None and math.isfinite(value)]
    return Curve(name, [at for at, _ in points], [value for _, value in points])


def _panels(x_label: str, x_range: Range, curves: dict[str, list[Curve]]) -> list[Panel]:
    """Returns the panels by title; curves and panels without data are left out."""
    kept = {title: [curve for curve in own if curve.xs] for title, own in curves.items()}
    return [Panel(title, x_label, x_range, own) for title, own in kept.items() if own]


def panels_of_rounds(summary: list[dict]) -> list[Panel]:
    """Returns the panels of a run's rounds, from the rows of summary.json."""
    parts = [{"iteration": row["iteration"], **(row.get("quality_parts") or {})} for row in summary]
    names = list(dict.fromkeys(name for part in parts for name in part if name != "iteration"))
    rewards = [{"iteration": row["iteration"], **(row.get("reward") or {})} for row in summary]

    def curves(**fields: str) -> list[Curve]:
        return [_curve(summary, name.replace("_", " "), field, "iteration") for name, field in fields.items()]

    probabilities = [_curve(summary, f"p({n})", f"{n}_probability", "iteration") for n in ("chosen", "rejected")]
    titled = {
        "Policy quality, unsteered, held out": curves(quality="policy_quality"),
        "Parts of the quality": [_curve(parts, name, name, "iteration") for name in names],
        "Held-out accuracy of the reward model": [
            _curve(rewards, "held-out accuracy", "held_out_accuracy", "iteration")
        ],
        "Pair accuracy and ties": curves(accuracy="pair_accuracy", ties="pair_ties"),
        "Probability of the pairs": probabilities,
        "Tokens of a response": curves(sampled="response_tokens", held_out="held_out_tokens"),
        "Pairs kept": curves(pairs="num_pairs"),
    }
    iterations = [row["iteration"] for row in summary]
    return _panels("iteration", (min(iterations), max(iterations)), titled)


def panels_of_updates(metrics: list[dict]) -> list[Panel]:
    """Returns the panels of a run's updates, from the lines of metrics.jsonl."""
    losses = [("loss", "loss"), ("base", "base_loss"), ("L+", "positive_loss"), ("L-", "negative_loss")]
    losses += [("held out", "held_out_loss")]
    titled = {
        "Loss": [_curve(metrics, name, field) for name, field in losses],
        "Margin of the pair": [
            _curve(metrics, "margin", "margin"),
            _curve(metrics, "held out", "held_out_margin"),
        ],
        "Accuracy of the pair": [
            _curve(metrics, "of the batch", "accuracy"),
            _curve(metrics, "held out", "held_out_accuracy"),
        ],
        "Rewards": [_curve(metrics, name, f"{name}_reward") for name in ("chosen", "rejected")],
        "Sums of log-probs, nats": [_curve(metrics, n, f"{n}_log_prob") for n in ("chosen", "rejected", "original")],
        "Weight of the steering terms": [_curve(metrics, "W", "weight")],
        "Gradient norm": [_curve(metrics, "norm", "grad_norm")],
    }
    return _panels("update", (0, max(0, len(metrics) - 1)), titled)
