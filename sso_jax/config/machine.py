"""Sections of a config that say where a run runs and what it leaves: run, mesh, hosts, checkpoint, watch, logging."""

from dataclasses import dataclass
from typing import Literal, Optional

from sso_jax.config.values import require


@dataclass(frozen=True)
class RunConfig:
    directory: str = "runs/sso"
    """Folder for everything that the run writes; the same folder continues an interrupted run."""
    seed: int = 0
    """The one seed of all randomness."""
    iterations: int = 3
    """Rounds of sampling and training."""
    compilation_cache: str = "~/.cache/sso_jax/xla"
    """Folder where compiled programs are kept between runs; an empty string keeps none."""
    on_changed_config: Literal["refuse", "take_new", "take_old"] = "refuse"
    """Where run.directory was started with other values: `refuse` names them, `take_new` goes on with the ones given
    now (what is done stays as it is), `take_old` with those it was started with."""

    def __post_init__(self):
        require(0 <= self.seed < 2**31, "run.seed", self.seed, "an integer from 0 to 2147483647")
        require(self.iterations >= 1, "run.iterations", self.iterations, "1 or more")
        require(self.directory != "", "run.directory", self.directory, "a folder")


@dataclass(frozen=True)
class MeshConfig:
    data: int = 1
    """Copies of the model that share a batch."""
    fsdp: int = -1
    """Parts into which weights, optimizer state and batch are cut; -1 takes the devices that are left."""
    tensor: int = 1
    """Parts into which heads, hidden units and vocabulary are cut."""

    def __post_init__(self):
        for name in ("data", "fsdp", "tensor"):
            value = getattr(self, name)
            require(value >= 1 or value == -1, f"mesh.{name}", value, "1 or more, or -1 for what is left")
        sizes = (self.data, self.fsdp, self.tensor)
        require(sizes.count(-1) <= 1, "mesh", sizes, "-1 to one axis at most")


@dataclass(frozen=True)
class HostsConfig:
    initialize: bool = False
    """Join the other processes of a TPU pod, SLURM, Open MPI or Kubernetes job; JAX finds them by itself."""
    coordinator: Optional[str] = None
    """HOST:PORT of the first process, where JAX cannot find it by itself."""
    num_processes: Optional[int] = None
    """Processes of the run, with hosts.coordinator."""
    process_id: Optional[int] = None
    """Number of this process from 0, with hosts.coordinator."""

    def __post_init__(self):
        given = (self.coordinator, self.num_processes, self.process_id)
        whole = all(value is None for value in given) or all(value is not None for value in given)
        require(whole, "hosts", given, "coordinator, num_processes and process_id together, or none of them")


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = 100
    """Most updates that a kill makes be done again: a checkpoint is begun every half as many, and written while
    training goes on."""
    keep: int = 1
    """Newest checkpoints kept in a round."""

    def __post_init__(self):
        require(self.every_steps >= 1, "checkpoint.every_steps", self.every_steps, "1 or more")
        require(self.keep >= 1, "checkpoint.keep", self.keep, "1 or more")


@dataclass(frozen=True)
class WatchConfig:
    """Signs of a collapse, each told in the log and in the report; none stops a run."""

    length_growth: float = 2.0
    """Responses that have grown to this many times those of the first round are told."""
    min_chosen_probability: float = 0.05
    """On-policy probability of the chosen responses (mean exp of mean log-prob) below which a round is told."""
    min_pairs_share: float = 0.1
    """Share of a round's queries that must end as pairs."""

    def __post_init__(self):
        require(self.length_growth > 1, "watch.length_growth", self.length_growth, "a factor above 1")
        for name in ("min_chosen_probability", "min_pairs_share"):
            require(0 <= getattr(self, name) <= 1, f"watch.{name}", getattr(self, name), "a share in [0, 1]")


@dataclass(frozen=True)
class LoggingConfig:
    tensorboard: bool = True
    """Write the scalars of metrics.jsonl for TensorBoard too, under `RUN/tensorboard`."""
    wandb_project: Optional[str] = None
    """Weights & Biases project that gets the same scalars; needs the `wandb` package."""
