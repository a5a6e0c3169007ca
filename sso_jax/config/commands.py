"""All fields of each command: `Config` of train.py, `SampleConfig` of sample.py, `EvaluateConfig` of evaluate.py."""

from dataclasses import dataclass
from typing import Literal, Optional

from sso_jax.config.inputs import (
    DemonstrationsConfig,
    EndpointConfig,
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
    recipe: Literal["online", "generator", "offline", "sft", "reward"] = "online"
    """`online`, the paper's version 1: sample, pair, train, repeat; `generator`, its version 2: train a generator, then
    the policy on its pairs; `offline` trains on given pairs; `sft` on demonstrations; `reward` trains a reward
    model."""
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
