"""Command line and YAML in, one frozen `Config` out. Every field of every section is declared here and nowhere else."""

import dataclasses
import difflib
import re
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

import jsonargparse
import yaml

from sso_jax.errors import InputError

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

KEY_REMEDY = "set the key in the environment (endpoint.key_variable names the variable) and nowhere else"
_KEY_FIELD = re.compile(r"(?:^|[._-])(?:key|token|secret|password|authorization|bearer)$|apikey$", re.IGNORECASE)
"""Names under which people put a key into a config."""


def require(condition: bool, name: str, value, remedy: str) -> None:
    """Raises `InputError("name: value is ...; remedy")` unless `condition` holds."""
    if not condition:
        raise InputError(f"{name}: {value!r} is out of range; give {remedy}")


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

    def __post_init__(self):
        require(0 <= self.seed < 2**31, "run.seed", self.seed, "an integer from 0 to 2147483647")
        require(self.iterations >= 1, "run.iterations", self.iterations, "1 or more")
        require(self.directory != "", "run.directory", self.directory, "a folder")


@dataclass(frozen=True)
class ModelConfig:
    path: str = "toy"
    """A Hugging Face folder, a hub id, or `toy` for the embedded toy world."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights that the optimizer updates."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the arithmetic in the decoder; log-prob sums are float32 whatever this is."""
    export_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the tensors in the exported `policy/` folders."""
    reference_path: Optional[str] = None
    """Hugging Face folder of another reference than the policy at the start of the round."""
    remat: bool = True
    """Recompute each layer in the backward pass instead of keeping its activations."""
    attention: Literal["auto", "plain", "cudnn", "splash"] = "auto"
    """Attention of whole sequences: `plain` runs anywhere, `cudnn` is for NVIDIA, `splash` for TPU; `auto` takes the platform's."""
    matmul_precision: Optional[Literal["default", "high", "highest"]] = None
    """Exactness of matrix products; null is `highest` for float32 arithmetic and the platform's own for bfloat16."""


@dataclass(frozen=True)
class ToyConfig:
    """The supervised start of `model.path toy`; smaller ones are for trials of the machinery, their policies know nothing."""

    fact_updates: int = 700
    """Updates on bare right answers: what the policy knows."""
    style_updates: int = 600
    """Updates on answers of every quality, with and without principles: what the policy does with it."""
    width: int = 64
    """Width of the decoder."""
    num_layers: int = 3
    """Layers of the decoder."""

    def __post_init__(self):
        for name in ("fact_updates", "style_updates", "width", "num_layers"):
            require(getattr(self, name) >= 1, f"toy.{name}", getattr(self, name), "1 or more")
        require(self.width % 16 == 0, "toy.width", self.width, "a multiple of 16")


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
class QueriesConfig:
    path: Optional[str] = None
    """JSON, JSON Lines, Parquet or a hub data set; the toy world brings its own queries."""
    per_iteration: int = 512
    """Queries of one round; rounds do not overlap."""
    split: str = "train"
    """Split of a hub data set."""

    def __post_init__(self):
        require(self.per_iteration >= 1, "queries.per_iteration", self.per_iteration, "1 or more")


@dataclass(frozen=True)
class PrinciplesConfig:
    source: Literal["predefined", "self", "file", "endpoint"] = "predefined"
    """Where principles come from: the project's own table, the policy itself, a file, or an OpenAI-compatible server."""
    path: Optional[str] = None
    """Principles made elsewhere, for source `file`: by query id, `features` with both lists of principles, or both system messages."""
    features_per_query: int = 2
    """Features that the policy names for a query; missing ones are drawn at random."""
    concision_probability: float = 0.2
    """Probability that Concision joins the features of a query."""

    def __post_init__(self):
        count = self.features_per_query
        require(1 <= count <= 7, "principles.features_per_query", count, "1 to 7, the features of the table")
        share = self.concision_probability
        require(0 <= share <= 1, "principles.concision_probability", share, "a probability in [0, 1]")
        if (self.source == "file") != (self.path is not None):
            raise InputError(
                f"principles.path: {self.path!r} with principles.source {self.source!r}; path and source `file` need each other"
            )


@dataclass(frozen=True)
class EndpointConfig:
    url: Optional[str] = None
    """Base address of an OpenAI-compatible server, such as http://localhost:8000/v1 (vLLM)."""
    model: Optional[str] = None
    """Name of the model there; null takes the one that the server lists, if it lists one only."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key, if the server wants one; the key itself never stands in a config."""
    timeout_seconds: float = 120.0
    """Longest wait for the server to answer or to go on with its answer."""
    retries: int = 5
    """Further tries of a question after a failure that may pass: no connection, no answer, 429, 5xx, an answer without a text."""
    requests_per_minute: Optional[float] = None
    """Most requests a minute; null sends as fast as `concurrency` allows."""
    concurrency: int = 8
    """Requests under way at once."""
    temperature: float = 0.7
    """Temperature for principles; judgments are asked for at 0."""

    def __post_init__(self):
        if self.url is not None:
            parts = urllib.parse.urlsplit(self.url)
            require(parts.scheme in ("http", "https") and bool(parts.hostname), "endpoint.url", self.url, "http(s)://HOST[:PORT]/v1")
            if parts.username or parts.password or parts.query:
                raise InputError(f"endpoint.url: holds more than an address ({parts.hostname}); {KEY_REMEDY}")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_variable):
            raise InputError(f"endpoint.key_variable: not the name of an environment variable; {KEY_REMEDY}")
        require(self.timeout_seconds > 0, "endpoint.timeout_seconds", self.timeout_seconds, "a number above 0")
        require(self.retries >= 0, "endpoint.retries", self.retries, "0 or more")
        rate = self.requests_per_minute
        require(rate is None or rate > 0, "endpoint.requests_per_minute", rate, "a number above 0, or null")
        require(self.concurrency >= 1, "endpoint.concurrency", self.concurrency, "1 or more")
        require(self.temperature >= 0, "endpoint.temperature", self.temperature, "0 or more")


@dataclass(frozen=True)
class JudgingConfig:
    pairs: int = 0
    """Pairs of each round that the endpoint is asked to judge, twice each with positions swapped; it measures, nothing trains on it."""

    def __post_init__(self):
        require(self.pairs >= 0, "judging.pairs", self.pairs, "0 or more")


@dataclass(frozen=True)
class SamplingConfig:
    temperature: float = 0.7
    """Logits are divided by it; 0 is greedy."""
    top_p: float = 0.8
    """Smallest set of likeliest tokens with at least this mass is kept; 1 keeps all."""
    top_k: Optional[int] = None
    """At most this many likeliest tokens are kept; none keeps all."""
    max_new_tokens: int = 2048
    """Longest response, end of turn included."""
    batch_size: int = 64
    """Responses sampled together; the last batch of a stage is padded to it."""
    mesh: Optional[MeshConfig] = None
    """Another mesh to sample on, for a second copy of the weights meanwhile; with `data` the number of hosts, hosts decode apart."""
    policies: int = 1
    """Policies that y+ and y- are drawn from: the present one and so many less one of earlier rounds (TSO's model matrix)."""

    def __post_init__(self):
        require(self.temperature >= 0, "sampling.temperature", self.temperature, "0 (greedy) or more")
        require(0 < self.top_p <= 1, "sampling.top_p", self.top_p, "a mass in (0, 1]")
        require(self.top_k is None or self.top_k >= 1, "sampling.top_k", self.top_k, "1 or more, or null")
        require(self.max_new_tokens >= 1, "sampling.max_new_tokens", self.max_new_tokens, "1 or more")
        require(self.batch_size >= 1, "sampling.batch_size", self.batch_size, "1 or more")
        require(self.policies >= 1, "sampling.policies", self.policies, "1 (the present one) or more")


@dataclass(frozen=True)
class FilterConfig:
    enabled: bool = False
    """Keep only the pairs that the log-probability filter lets through."""
    min_score_gap: Optional[float] = None
    """Keep only pairs whose chosen response was scored at least this much above the rejected one, by the file or the reward model."""
    reward_path: Optional[str] = None
    """Folder of a reward model that scores the pairs; alone it drops those whose rejected response it prefers."""
    reward_share: float = 1.0
    """Share of the pairs that is kept after that: those whose chosen response leads by most."""

    def __post_init__(self):
        require(0 < self.reward_share <= 1, "filter.reward_share", self.reward_share, "a share in (0, 1]")
        if self.reward_share < 1 and self.reward_path is None:
            raise InputError(f"filter.reward_share: {self.reward_share} needs a reward model; give filter.reward_path, or leave it out")


@dataclass(frozen=True)
class ObjectiveConfig:
    base: str = "ipo"
    """Loss that the objective is built from: dpo, ipo, cdpo, robust, hinge, simpo, orpo, exo, nca, sppo, apo_zero, apo_down, discopop,
    aps, clipped in every context; rpo, selm, opo, reward_conditioned, spo on the plain prompt."""
    beta: Optional[float] = None
    """Strength of the base loss; null takes the base's own default."""
    label_smoothing: Optional[float] = None
    """Share of labels taken to be wrong, for the bases that have it."""
    tau: Optional[float] = None
    """Temperature of the bases that have one."""
    eta: Optional[float] = None
    """Weight of the supervised part of the bases that have one."""
    margin: Optional[float] = None
    """Target margin of the bases that have one."""
    alpha: Optional[float] = None
    """Weight of the exploration term of base `selm`."""
    rho: Optional[float] = None
    """Base `aps`: how far the entropy of a pair's preference is kept below ln 2, in nats."""
    t_min: Optional[float] = None
    """Base `aps`: least scale of a pair."""
    t_max: Optional[float] = None
    """Base `aps`: largest scale of a pair."""
    clip: Optional[float] = None
    """Base `clipped`: reward beyond which nothing more is earned."""
    degree_weight: Optional[float] = None
    """gamma of base `spo`: weight of the cross-entropy of its degree head."""
    degree_removal: Literal["keywords", "random"] = "keywords"
    """What the variants of base `spo` lack: key phrases, or as many words drawn at random (a control)."""
    form: Literal["online", "generator", "pairwise"] = "online"
    """`online`: base + W*g*G (version 1); `generator`: L+ + L- (version 2); `pairwise`: the plain pair alone (PBAA)."""
    steering_weight: float = 0.1
    """g, the weight of the self-steering terms in form `online`."""
    weight_alpha: float = 0.66
    """a, the share of the chosen response in W."""
    use_weight: bool = True
    """Whether W multiplies the steering terms (the base loss where there are none)."""
    use_steering: bool = True
    """Whether G = L+ + L- is added to the base loss in form `online`."""
    detach_weight: bool = False
    """Stop the gradient through W, as WPO does; the authors' code lets it flow."""
    positive_weight: float = 1.0
    """Factor of L+; 0 drops it."""
    negative_weight: float = 1.0
    """Factor of L-; 0 drops it."""
    negative_winner: Literal["original", "rejected"] = "original"
    """Winner of L- over y+: y_o as in the paper, or y-, the naive form of its ablation."""
    sft_weight: Optional[float] = None
    """gamma, the weight of the supervised terms; null is 0 in form `online` and 0.1 in form `generator`."""

    def __post_init__(self):
        require(self.beta is None or self.beta > 0, "objective.beta", self.beta, "a number above 0")
        smoothing = self.label_smoothing
        require(smoothing is None or 0 <= smoothing < 0.5, "objective.label_smoothing", smoothing, "a share in [0, 0.5)")
        require(self.tau is None or self.tau > 0, "objective.tau", self.tau, "a number above 0")
        alpha = self.weight_alpha
        require(0 <= alpha <= 1, "objective.weight_alpha", alpha, "a share in [0, 1]")
        require(self.rho is None or 0 < self.rho < 0.693, "objective.rho", self.rho, "a number of nats in (0, ln 2)")
        for name in ("t_min", "t_max", "clip"):
            value = getattr(self, name)
            require(value is None or value > 0, f"objective.{name}", value, "a number above 0")
        for name in ("steering_weight", "positive_weight", "negative_weight", "sft_weight", "eta", "alpha", "degree_weight"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"objective.{name}", value, "0 or more")


@dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float = 5e-7
    """Peak of the schedule."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """What follows the warm-up: a cosine to 0, or the peak kept."""
    warmup_ratio: float = 0.1
    """Share of the updates over which the rate rises from 0."""
    b1: float = 0.9
    """Decay of AdamW's first moment."""
    b2: float = 0.95
    """Decay of AdamW's second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decay of matrices; norms and biases have none."""
    clip_norm: float = 1.0
    """Largest global norm of a gradient; 0 is none."""

    def __post_init__(self):
        require(self.learning_rate >= 0, "optimizer.learning_rate", self.learning_rate, "0 or more")
        require(0 <= self.warmup_ratio < 1, "optimizer.warmup_ratio", self.warmup_ratio, "a share in [0, 1)")
        for name in ("b1", "b2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name}", value, "a decay in [0, 1)")
        require(self.eps > 0, "optimizer.eps", self.eps, "a number above 0")
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        require(self.clip_norm >= 0, "optimizer.clip_norm", self.clip_norm, "0 (no clipping) or more")


@dataclass(frozen=True)
class TrainConfig:
    batch_size: int = 64
    """Examples an update."""
    microbatch_size: Optional[int] = None
    """Examples a device step; gradients of an update are summed over its steps. Null takes the whole batch."""
    epochs: int = 1
    """Passes over the pairs of a round."""
    max_tokens: int = 2048
    """Limit of prompt plus response; longer examples are dropped and counted."""
    shuffle: bool = True
    """Draw the order of the examples anew each epoch, by the seed."""
    log_original: bool = True
    """Run y_o under the plain prompt too, so that metrics.jsonl shows the log-probs of chosen, rejected and other responses apart."""

    def __post_init__(self):
        require(self.batch_size >= 1, "train.batch_size", self.batch_size, "1 or more")
        require(self.epochs >= 1, "train.epochs", self.epochs, "1 or more")
        require(self.max_tokens >= 2, "train.max_tokens", self.max_tokens, "2 or more")
        micro = self.microbatch_size
        divides = micro is None or (micro >= 1 and self.batch_size % micro == 0)
        require(divides, "train.microbatch_size", micro, f"a divisor of train.batch_size {self.batch_size}")


@dataclass(frozen=True)
class GeneratorConfig:
    queries: Optional[int] = None
    """Queries of a round whose triples train the generator of recipe `generator`; null takes all."""
    batch_size: Optional[int] = None
    """Examples an update of the generator; null is train.batch_size."""
    epochs: Optional[int] = None
    """Passes over the generator's pairs; null is train.epochs."""
    learning_rate: Optional[float] = None
    """Peak of the generator's schedule; null is optimizer.learning_rate."""

    def __post_init__(self):
        for name in ("queries", "batch_size", "epochs"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"generator.{name}", value, "1 or more, or null")
        rate = self.learning_rate
        require(rate is None or rate >= 0, "generator.learning_rate", rate, "0 or more, or null")


@dataclass(frozen=True)
class PairsConfig:
    path: Optional[str] = None
    """Pairs of recipes `offline` and `reward`: JSON, JSON Lines, Parquet or a hub data set; steered or plain preferences."""
    split: str = "train"
    """Split of a hub data set."""
    control: Literal["none", "random_order", "judge_order"] = "none"
    """Controls: chosen and rejected swapped by a coin, or (toy only) put in the judge's order."""


@dataclass(frozen=True)
class RewardConfig:
    label_smoothing: float = 0.0
    """Share of pairs taken to be in the wrong order."""
    margin: float = 0.0
    """Lead of the chosen response that the loss asks for."""
    centring: float = 0.0
    """Weight of the squared sum of a pair's rewards, which keeps them near 0; 0.01 is usual."""
    held_out: float = 0.1
    """Share of the pairs, by query, that is not trained on: accuracy is measured on them at every checkpoint."""
    annotated_path: Optional[str] = None
    """Annotated pairs that are mixed in: any file or data set that pairs.path takes."""
    annotated_split: str = "train"
    """Split of a hub data set."""
    annotated_share: Optional[float] = None
    """Share of the training pairs that is annotated; what is too many of either is left out. Null takes all of both."""

    def __post_init__(self):
        require(0 <= self.label_smoothing < 0.5, "reward.label_smoothing", self.label_smoothing, "a share in [0, 0.5)")
        require(self.margin >= 0, "reward.margin", self.margin, "0 or more")
        require(self.centring >= 0, "reward.centring", self.centring, "0 or more")
        require(0 <= self.held_out < 1, "reward.held_out", self.held_out, "a share in [0, 1)")
        share = self.annotated_share
        require(share is None or 0 < share < 1, "reward.annotated_share", share, "a share in (0, 1), or null")
        if share is not None and self.annotated_path is None:
            raise InputError(f"reward.annotated_share: {share} of no annotated pairs; give reward.annotated_path, or leave it out")


@dataclass(frozen=True)
class DemonstrationsConfig:
    path: Optional[str] = None
    """Prompts with responses for recipe `sft`: JSON, JSON Lines, Parquet or a hub data set."""
    split: str = "train"
    """Split of a hub data set."""


@dataclass(frozen=True)
class LoraConfig:
    rank: int = 0
    """Rank of the adapters that are trained in place of the weights; 0 trains the weights themselves."""
    alpha: float = 32.0
    """Adapters are multiplied by alpha/rank."""
    targets: tuple[Literal["query", "key", "value", "out", "gate", "up", "down"], ...] = (
        "query",
        "key",
        "value",
        "out",
        "gate",
        "up",
        "down",
    )
    """Projections that get adapters."""

    def __post_init__(self):
        require(self.rank >= 0, "lora.rank", self.rank, "0 (none) or more")
        require(self.alpha > 0, "lora.alpha", self.alpha, "a number above 0")
        require(self.rank == 0 or len(self.targets) > 0, "lora.targets", self.targets, "at least one projection")


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = 100
    """Updates between checkpoints; the end of a round is always one."""
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


@dataclass(frozen=True)
class Config:
    recipe: Literal["online", "generator", "offline", "sft", "reward"] = "online"
    """`online`, the paper's version 1: sample, pair, train, repeat; `generator`, its version 2: train a generator, then the policy on
    its pairs; `offline` trains on given pairs; `sft` on demonstrations; `reward` trains a reward model."""
    dry_run: Optional[str] = None
    """A TPU topology such as v5e:4x4: compile every program for it, print bytes and operations, and do nothing else."""
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    toy: ToyConfig = ToyConfig()
    mesh: MeshConfig = MeshConfig()
    hosts: HostsConfig = HostsConfig()
    queries: QueriesConfig = QueriesConfig()
    principles: PrinciplesConfig = PrinciplesConfig()
    endpoint: EndpointConfig = EndpointConfig()
    judging: JudgingConfig = JudgingConfig()
    sampling: SamplingConfig = SamplingConfig()
    filter: FilterConfig = FilterConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    generator: GeneratorConfig = GeneratorConfig()
    pairs: PairsConfig = PairsConfig()
    demonstrations: DemonstrationsConfig = DemonstrationsConfig()
    lora: LoraConfig = LoraConfig()
    reward: RewardConfig = RewardConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    watch: WatchConfig = WatchConfig()
    logging: LoggingConfig = LoggingConfig()


@dataclass(frozen=True)
class SampleConfig:
    out: Optional[str] = None
    """JSON Lines file to write; needed with queries.path."""
    steered: bool = False
    """Write steered triples (chosen, rejected, original) in place of plain answers."""
    form: Literal["records", "alpaca_eval", "mt_bench", "arena_hard"] = "records"
    """`records` is this project's own; the others are what the tools of that benchmark read."""
    generator: Optional[str] = None
    """Name of the policy in a benchmark's file; null takes the last part of model.path."""
    query: Optional[str] = None
    """One query to answer on standard output, in place of a file of queries."""
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    queries: QueriesConfig = QueriesConfig()
    principles: PrinciplesConfig = PrinciplesConfig()
    endpoint: EndpointConfig = EndpointConfig()
    sampling: SamplingConfig = SamplingConfig()
    train: TrainConfig = TrainConfig()


@dataclass(frozen=True)
class EvaluateConfig:
    out: Optional[str] = None
    """JSON file to write."""
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    pairs: PairsConfig = PairsConfig()


def _nearest(message: str, known: list[str]) -> str:
    """`; did you mean ...?` for the unknown field that an error message of the parser names, or nothing."""
    unknown = re.search(r"unrecognized arguments: --([\w.]+)|does not accept option '([\w.]+)'", message)
    if not unknown:
        return ""
    group = re.search(r"Group '([\w.]+)'", message)
    name = unknown.group(1) or ((group.group(1) + ".") if group else "") + unknown.group(2)
    near = difflib.get_close_matches(name, known, n=2)
    return f"; did you mean {' or '.join(near)}?" if near else "; --help lists every field"


def _fields_of_file(rows, prefix: str = "") -> list[str]:
    """Dotted names of all fields of a YAML file's contents."""
    if not isinstance(rows, dict):
        return [prefix.rstrip(".")]
    return [name for key, value in rows.items() for name in _fields_of_file(value, f"{prefix}{key}.")]


def _refuse_keys(argv: list[str]) -> None:
    """Raises `InputError` for a key on the command line or in a config file; its value is not repeated."""
    given = [(part.lstrip("-").split("=")[0], "the command line") for part in argv if part.startswith("--")]
    files = [
        part.partition("=")[2] or following
        for part, following in zip(argv, [*argv[1:], ""], strict=True)
        if part.split("=")[0] == "--config"
    ]
    for file in files:
        try:
            given += [(name, file) for name in _fields_of_file(yaml.safe_load(Path(file).read_text(encoding="utf-8")))]
        except (OSError, ValueError, yaml.YAMLError):
            continue  # the parser says what is wrong with it
    for name, place in given:
        if _KEY_FIELD.search(name):
            raise InputError(f"{name}: a key does not belong on the command line or in a config ({place}); {KEY_REMEDY}")


def parse(config_class: type, argv: list[str], program: str, description: str):
    """Parses `--config FILE` and dotted overrides into `config_class`.

    Raises:
      InputError: one line that names the field, the value and what it may be.
    """
    parser = jsonargparse.ArgumentParser(prog=program, description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file of fields; later arguments override it.")
    parser.add_class_arguments(config_class, as_group=False)
    known = [action.dest for action in parser._actions]
    _refuse_keys(argv)
    try:
        namespace = parser.instantiate(parser.parse_args(argv))
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        message = " ".join(str(error).split())
        raise InputError(message + _nearest(message, known)) from error
    fields = {field.name: getattr(namespace, field.name) for field in dataclasses.fields(config_class)}
    return config_class(**fields)


def to_dict(config) -> dict:
    """The config as plain nested dictionaries, for YAML and for comparison."""
    return dataclasses.asdict(config)
