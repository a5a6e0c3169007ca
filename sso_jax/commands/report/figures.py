"""Curves of a run as SVG figures."""

import base64
import io

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

INK, MUTED = "#1f2933", "#7b8794"
STYLE = {
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "svg.hashsalt": "sso_jax",
}
"""Style of every figure; with the fixed salt, equal runs write equal files."""
COLORS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed")


def figure_uri(panels: list[tuple[str, str, list[tuple[str, list, list]]]], columns: int) -> str:
    """Draws panels (title, x label, curves as (name, xs, ys)) as an SVG; returns it as a data URI."""
    rows = -(-len(panels) // columns)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows, columns, figsize=(3.5 * columns, 2.5 * rows), squeeze=False, layout="constrained"
        )
        for axis in axes.flat[len(panels) :]:
            axis.axis("off")
        for axis, (title, label, curves) in zip(axes.flat, panels, strict=False):
            for color, (name, xs, ys) in zip(COLORS, curves, strict=False):
                axis.plot(
                    xs, ys, color=color, label=name, linewidth=1.6, marker="o" if len(xs) < 30 else None, markersize=3
                )
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
    """Returns (name, xs, ys) of a field, without rows that lack it; x is a field, or None for the row index."""
    points = [(i if x is None else row[x], row[field]) for i, row in enumerate(rows) if row.get(field) is not None]
    return name, [p[0] for p in points], [p[1] for p in points]


def panels_of_rounds(summary: list[dict]) -> list:
    """Returns the panels of a run's rounds, from the rows of summary.json; panels without data are left out."""
    parts = [{"iteration": row["iteration"], **(row["quality_parts"] or {})} for row in summary]
    names = [name for name in parts[0] if name != "iteration"]
    panels = [
        ("Policy quality, unsteered, held out", [_curve(summary, "quality", "policy_quality", "iteration")]),
        ("Its parts", [_curve(parts, name, name, "iteration") for name in names]),
        (
            "Pair accuracy and ties",
            [_curve(summary, n, f, "iteration") for n, f in (("accuracy", "pair_accuracy"), ("ties", "pair_ties"))],
        ),
        (
            "On-policy probability",
            [_curve(summary, n, f"{n}_probability", "iteration") for n in ("chosen", "rejected")],
        ),
        (
            "Tokens a response",
            [
                _curve(summary, n, f, "iteration")
                for n, f in (("sampled", "response_tokens"), ("held out", "held_out_tokens"))
            ],
        ),
        ("Pairs kept", [_curve(summary, "pairs", "num_pairs", "iteration")]),
    ]
    return [(title, "iteration", curves) for title, curves in panels if any(xs for _, xs, _ in curves)]


def panels_of_updates(metrics: list[dict]) -> list:
    """Returns the panels of a run's updates, from the lines of metrics.jsonl; curves without data are left out."""
    losses = [("loss", "loss"), ("base", "base_loss"), ("L+", "positive_loss"), ("L-", "negative_loss")]
    panels = [
        ("Loss", [_curve(metrics, name, field) for name, field in losses]),
        ("Margin of the plain pair", [_curve(metrics, "margin", "margin")]),
        (
            "Accuracy of the pair",
            [_curve(metrics, "of the batch", "accuracy"), _curve(metrics, "held out", "held_out_accuracy")],
        ),
        ("Rewards", [_curve(metrics, name, f"{name}_reward") for name in ("chosen", "rejected")]),
        ("Log-prob sums, nats", [_curve(metrics, n, f"{n}_log_prob") for n in ("chosen", "rejected", "original")]),
        ("Weight W", [_curve(metrics, "W", "weight")]),
        ("Gradient norm", [_curve(metrics, "norm", "grad_norm")]),
    ]
    panels = [(title, [curve for curve in curves if curve[1]]) for title, curves in panels]
    return [(title, "update", curves) for title, curves in panels if curves]
