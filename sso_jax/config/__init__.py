"""Declares every config field, by section, and parses command lines and YAML files into a frozen `Config`."""

from sso_jax.config.commands import Config, EvaluateConfig, SampleConfig
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
from sso_jax.config.parsing import parse, to_dict, to_json_dict, with_value
from sso_jax.config.sampling import FilterConfig, SamplingConfig
from sso_jax.config.training import GeneratorConfig, ObjectiveConfig, OptimizerConfig, RewardConfig, TrainConfig

__all__ = [
    "ChatConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DemonstrationsConfig",
    "EndpointConfig",
    "EvaluateConfig",
    "EvaluationConfig",
    "FilterConfig",
    "GeneratorConfig",
    "HostsConfig",
    "JudgingConfig",
    "LoggingConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PairsConfig",
    "PrinciplesConfig",
    "QueriesConfig",
    "RewardConfig",
    "RunConfig",
    "SampleConfig",
    "SamplingConfig",
    "ToyConfig",
    "TrainConfig",
    "WatchConfig",
    "parse",
    "to_dict",
    "to_json_dict",
    "with_value",
]
