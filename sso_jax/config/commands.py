"""The config of each command: `Config` of train.py, `SampleConfig` of sample.py, `EvaluateConfig` of evaluate.py."""

from dataclasses import dataclass
from typing import Literal, Optional

from sso_jax.config.inputs import (
    ChatConfig,
    DataConfig,
    DemonstrationsConfig,
    EndpointConfig,
    EvaluationConfig,
    JudgingConfig,
    PairsConfig,
    PrinciplesConfig,
    QueriesConfig,
)
from sso_jax.config.machine import CheckpointConfig, HostsConfig, LoggingConfig, MeshConfig, RunConfig, WatchConfig
from sso_jax.config.models import LoraConfig, ModelConfig, ToyConfig
from sso_jax.config.sampling import FilterConfig, SamplingConfig
from sso_jax.config.training import GeneratorConfig, ObjectiveConfig, OptimizerConfig, RewardConfig, TrainConfig


@dataclass(frozen=True)
class Config:
    """Config of train.py: all fields of a training run, by section."""

    recipe: Literal["online", "generator", "offline", "sft", "reward"] = "online"
    """`online` (version 1 of the paper): sample, pair, train, repeat; `generator` (its version 2): train a generator,
    then the policy on its pairs; `offline` trains on given pairs; `sft` on demonstrations; `reward` trains a reward
    model."""
    dry_run: Optional[str] = None
    """TPU topology such as v5e:4x4: only compile every program for it and print its memory (bytes) and operations."""
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    toy: ToyConfig = ToyConfig()
    mesh: MeshConfig = MeshConfig()
    hosts: HostsConfig = HostsConfig()
    chat: ChatConfig = ChatConfig()
    data: DataConfig = DataConfig()
    queries: QueriesConfig = QueriesConfig()
    principles: PrinciplesConfig = PrinciplesConfig()
    endpoint: EndpointConfig = EndpointConfig()
    judging: JudgingConfig = JudgingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
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
    """Config of sample.py: answers to queries, or steered triples."""

    out: Optional[str] = None
    """JSON Lines file to write; required with queries.path."""
    steered: bool = False
    """Write steered triples (chosen, rejected, original) instead of plain answers."""
    form: Literal["records", "alpaca_eval", "mt_bench", "arena_hard"] = "records"
    """Format of the answers: this project's own `records`, or the format that the benchmark's tools read."""
    generator: Optional[str] = None
    """Name of the policy in a benchmark's file; null uses the last part of model.path."""
    query: Optional[str] = None
    """A single query to answer on standard output, instead of a file of queries."""
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    chat: ChatConfig = ChatConfig()
    data: DataConfig = DataConfig()
    queries: QueriesConfig = QueriesConfig()
    principles: PrinciplesConfig = PrinciplesConfig()
    endpoint: EndpointConfig = EndpointConfig()
    sampling: SamplingConfig = SamplingConfig()
    train: TrainConfig = TrainConfig()


@dataclass(frozen=True)
class EvaluateConfig:
    """Config of evaluate.py: accuracy of a reward model on pairs."""

    out: Optional[str] = None
    """JSON file to write."""
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    chat: ChatConfig = ChatConfig()
    data: DataConfig = DataConfig()
    pairs: PairsConfig = PairsConfig()
