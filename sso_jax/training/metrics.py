"""Writes the metrics of each update to `metrics.jsonl`, TensorBoard and, if configured, Weights & Biases."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from sso_jax.config import LoggingConfig
from sso_jax.runtime.errors import InputError
from sso_jax.runtime.files import append_lines, is_remote
from sso_jax.runtime.json_lines import read_json_lines, write_records

LINE_FIELDS = (
    "iteration",
    "step",
    "loss",
    "base_loss",
    "positive_loss",
    "negative_loss",
    "weight",
    "chosen_log_prob",
    "rejected_log_prob",
    "original_log_prob",
    "margin",
    "accuracy",
    "sum_margin",
    "grad_norm",
    "learning_rate",
    "tokens_per_second",
)
"""Fields of every line; null for those that the objective does not have."""


REMOTE_SECONDS = 60.0
"""Seconds between two writes of `metrics.jsonl` in an object store, which takes it only as a whole."""


@dataclass
class MetricsLog:
    """The open destinations of the metrics.

    In an object store a line may wait for `REMOTE_SECONDS`, but no checkpoint has its update before `flush` was called:
    what a kill loses is written again by the updates that it repeats.
    """

    path: Path
    tensorboard: Any | None
    wandb: Any | None
    waiting: list[str] = field(default_factory=list)
    """Lines that are not written yet."""
    written_at: float = float("-inf")
    """When lines were last written, on the monotonic clock; the first one does not wait."""

    def rewind(self, iteration: int, step: int) -> None:
        """Removes the lines of `iteration` from update `step` on, which a resumed run writes again."""
        self.flush()
        if self.path.is_file():
            kept = [row for row in read_json_lines(self.path) if row["iteration"] != iteration or row["step"] < step]
            write_records(kept, self.path)

    def write(self, line: dict, updates_before: int) -> None:
        """Appends a line; `updates_before` counts the updates of earlier rounds, for curves over the whole run."""
        line = {**{field: line.get(field) for field in LINE_FIELDS}, **line}
        self.waiting.append(json.dumps(line))
        if not is_remote(self.path) or monotonic() - self.written_at >= REMOTE_SECONDS:
            self.flush()
        scalars = {name: value for name, value in line.items() if isinstance(value, float)}
        step = updates_before + line["step"]
        if self.tensorboard is not None:
            for name, value in scalars.items():
                self.tensorboard.add_scalar(f"train/{name}", value, step)
        if self.wandb is not None:
            self.wandb.log({f"train/{name}": value for name, value in scalars.items()}, step=step)

    def flush(self) -> None:
        """Writes the lines that wait; to be called before a checkpoint has their updates."""
        if self.waiting:
            append_lines(self.waiting, self.path)
            self.waiting, self.written_at = [], monotonic()

    def write_samples(self, samples: list[dict[str, str]], iteration: int) -> None:
        """Shows a few pairs of a round: as text in TensorBoard, at the step of the round, and as a table in W&B.

        TensorBoard's are on disk afterwards, whatever happens to the process. Written twice, they are shown twice in
        TensorBoard, and once in W&B, where the table has the same name and step.

        Args:
          samples: texts by name; all have the same names.
          iteration: number of the round.
        """
        if not samples:
            return
        if self.tensorboard is not None:
            parts = ["\n\n".join(f"**{name}**\n\n{_quoted(text)}" for name, text in row.items()) for row in samples]
            self.tensorboard.add_text("samples", "\n\n---\n\n".join(parts), iteration)
            self.tensorboard.close()  # waits for what is queued, which flush() does not
            self.tensorboard = _open_tensorboard(self.path.parent, f".after_{iteration}")
        if self.wandb is not None:
            import wandb

            table = wandb.Table(columns=list(samples[0]), data=[list(row.values()) for row in samples])
            num_updates = len(list(read_json_lines(self.path))) if self.path.is_file() else 0
            self.wandb.log({f"samples/iteration_{iteration}": table}, step=max(num_updates - 1, 0))

    def close(self) -> None:
        """Flushes buffered metrics."""
        self.flush()
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def _quoted(text: str) -> str:
    """Returns a text as a block of Markdown that shows it as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines()) or "    "


def check_logging(config: LoggingConfig) -> None:
    """Raises `InputError` if Weights & Biases is configured but not installed."""
    if config.wandb_project is not None:
        try:
            import wandb  # noqa: F401
        except ImportError as error:
            raise InputError(
                f"logging.wandb_project: {config.wandb_project!r} needs the wandb package; run pip install wandb, or "
                "remove the field"
            ) from error


def _open_tensorboard(directory: Path, suffix: str = "") -> Any:
    """Opens a new file of events; its name has the second, so that two of one second need a suffix of their own."""
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(directory / "tensorboard"), filename_suffix=suffix)


def open_metrics(directory: Path, config: LoggingConfig, run_config: dict, writes: bool) -> MetricsLog:
    """Opens the configured destinations, or only sets the path if another process `writes`."""
    tensorboard = wandb_run = None
    if not writes:
        return MetricsLog(directory / "metrics.jsonl", None, None)
    if config.tensorboard:
        tensorboard = _open_tensorboard(directory)
    if config.wandb_project is not None:
        import wandb

        wandb_run = wandb.init(project=config.wandb_project, dir=str(directory), config=run_config, resume="allow")
    return MetricsLog(directory / "metrics.jsonl", tensorboard, wandb_run)
