"""Config sections for where a run executes and what it writes: run, mesh, hosts, checkpoint, watch, logging."""

from dataclasses import dataclass
from typing import Literal, Optional

from sso_jax.config.values import require


@dataclass(frozen=True)
class RunConfig:
    """Directory, seed and length of a run."""

    directory: str = "runs/sso"
    """Folder for everything that the run writes; giving the same folder again resumes an interrupted run."""
    seed: int = 0
    """Seed of all randomness."""
    iterations: int = 3
    """Rounds of sampling and training."""
    compilation_cache: str = "~/.cache/sso_jax/xla"
    """Folder that keeps compiled programs between runs; an empty string disables it."""
    on_changed_config: Literal["refuse", "take_new", "take_old"] = "refuse"
    """What to do if run.directory was started with other values: `refuse` fails and names them, `take_new` resumes with
    the present ones (finished stages stay as they are), `take_old` with the original ones."""
    push_to_hub: Optional[str] = None
    """Repository of the Hugging Face hub, OWNER/NAME, to which every round uploads its policy when it ends, as one
    commit; the token is that of HF_TOKEN or of `hf auth login`."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**31, "run.seed", self.seed, "an integer from 0 to 2147483647")
        require(self.iterations >= 1, "run.iterations", self.iterations, "1 or more")
        require(self.directory != "", "run.directory", self.directory, "a folder")


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the device mesh's axes; their product is the number of devices."""

    data: int = 1
    """Number of model replicas among which a batch is split."""
    fsdp: int = -1
    """Number of shards of weights, optimizer state and batch; -1 uses the remaining devices."""
    tensor: int = 1
    """Number of shards of attention heads, hidden units and vocabulary."""
    expert: int = 1
    """Number of shards of a model's experts, among which the batch is split as well."""
    slices: int = 1
    """Number of TPU slices, joined by the data-centre network: a multiple of them is mesh.data, and the other axes lie
    within a slice. On GPUs and CPUs a slice is an equal part of the hosts, or of the devices of a single host."""

    def __post_init__(self) -> None:
        require(self.slices >= 1, "mesh.slices", self.slices, "1 or more")
        for name in ("data", "fsdp", "tensor", "expert"):
            value = getattr(self, name)
            require(value >= 1 or value == -1, f"mesh.{name}", value, "1 or more, or -1 for the remaining devices")
        sizes = (self.data, self.fsdp, self.tensor, self.expert)
        require(sizes.count(-1) <= 1, "mesh", sizes, "-1 to one axis at most")


@dataclass(frozen=True)
class HostsConfig:
    """Processes of a multi-host run."""

    initialize: bool = False
    """Connect to the other processes of a TPU pod, SLURM, Open MPI or Kubernetes job, which JAX detects itself."""
    coordinator: Optional[str] = None
    """HOST:PORT of the first process, where JAX cannot detect it."""
    num_processes: Optional[int] = None
    """Number of processes of the run; required with hosts.coordinator."""
    process_id: Optional[int] = None
    """Index of this process, from 0; required with hosts.coordinator."""

    def __post_init__(self) -> None:
        given = (self.coordinator, self.num_processes, self.process_id)
        whole = all(value is None for value in given) or all(value is not None for value in given)
        require(whole, "hosts", given, "coordinator, num_processes and process_id together, or none of them")


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints during training."""

    every_steps: int = 100
    """Maximum number of updates repeated after a kill: a checkpoint starts every half as many updates and is written
    while training continues."""
    keep: int = 1
    """Number of checkpoints kept per round, newest first."""
    stop_seconds: Optional[float] = 30.0
    """Maximum seconds from SIGTERM, as a machine gets it that is pre-empted, to the end of the process. A save that is
    not written by then is given up: the updates since the last checkpoint are done again. null waits for the save, as
    Ctrl-C always does on a lone process."""

    def __post_init__(self) -> None:
        require(self.every_steps >= 1, "checkpoint.every_steps", self.every_steps, "1 or more")
        require(self.keep >= 1, "checkpoint.keep", self.keep, "1 or more")
        limit = self.stop_seconds
        require(limit is None or limit > 0, "checkpoint.stop_seconds", limit, "seconds above 0, or null")


@dataclass(frozen=True)
class WatchConfig:
    """Thresholds of collapse warnings, which appear in the log and in the report; none stops a run."""

    length_growth: float = 2.0
    """Warn if responses are this many times as long as in the first round."""
    min_chosen_probability: float = 0.05
    """Warn if the on-policy probability of the chosen responses (mean exp of mean log-prob) falls below this."""
    min_pairs_share: float = 0.1
    """Warn if less than this share of a round's queries yields pairs."""

    def __post_init__(self) -> None:
        require(self.length_growth > 1, "watch.length_growth", self.length_growth, "a factor above 1")
        for name in ("min_chosen_probability", "min_pairs_share"):
            require(0 <= getattr(self, name) <= 1, f"watch.{name}", getattr(self, name), "a share in [0, 1]")


@dataclass(frozen=True)
class LoggingConfig:
    """Where metrics are written besides `RUN/metrics.jsonl`."""

    tensorboard: bool = True
    """Also write the scalars of metrics.jsonl for TensorBoard, to `RUN/tensorboard`."""
    wandb_project: Optional[str] = None
    """Weights & Biases project that receives the same scalars; needs the `wandb` package."""
    samples: int = 4
    """Pairs of each round that TensorBoard shows as text and Weights & Biases as a table; 0 for none."""

    def __post_init__(self) -> None:
        require(self.samples >= 0, "logging.samples", self.samples, "0 or more")
