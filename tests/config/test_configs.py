"""Every file of configs/: it parses, says in its header how to run it, and names a model that the dry run knows or that
a run makes.
"""

from pathlib import Path

import pytest

from sso_jax.config import Config, ObjectiveConfig, parse
from sso_jax.models.presets import PRESETS
from sso_jax.recipes.objective import build_objective
from sso_jax.runtime.errors import InputError

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_parses_and_its_header_names_it(path):
    config = parse(Config, ["--config", str(path)], "train.py", "")
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"--config configs/{path.name}" in line for line in header)
    known = config.model.path in PRESETS or config.model.path == "toy"
    assert known or config.model.path.startswith("runs/") or "--model.path" in " ".join(header)
    if config.recipe in ("online", "generator", "offline"):
        build_objective(config.objective)


@pytest.mark.parametrize("name", ["qwen2_7b_instruct", "llama3.1_8b_instruct", "qwen2_7b_from_sft"])
def test_version_1_has_the_values_of_the_paper(name):
    config = parse(Config, ["--config", str(next(path for path in CONFIGS if path.stem == name))], "train.py", "")
    objective, sampling, optimizer = config.objective, config.sampling, config.optimizer
    assert (objective.base, objective.beta, objective.weight_alpha, objective.steering_weight) == (
        "ipo",
        0.2,
        0.66,
        0.1,
    )
    assert (objective.form, objective.use_weight, objective.detach_weight, config.run.iterations) == (
        "online",
        True,
        False,
        3,
    )
    assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens) == (0.7, 0.8, 2048)
    assert (optimizer.b1, optimizer.b2, optimizer.weight_decay, optimizer.warmup_ratio, optimizer.schedule) == (
        0.9,
        0.95,
        0.1,
        0.1,
        "cosine",
    )
    assert (config.train.max_tokens, config.train.epochs, config.model.compute_dtype) == (2048, 1, "bfloat16")


def test_version_2_has_the_values_of_the_paper():
    config = parse(
        Config, ["--config", str(next(path for path in CONFIGS if path.stem == "qwen2_7b_v2"))], "train.py", ""
    )
    assert (config.recipe, config.generator.queries, config.generator.batch_size) == ("generator", 8000, 32)
    assert (config.objective.base, config.objective.beta, config.objective.sft_weight) == ("dpo", 0.1, 0.1)
    assert (config.queries.per_iteration, config.train.batch_size, config.optimizer.learning_rate) == (60000, 256, 5e-7)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--objective.base", "nca"], True),
        (["--objective.base=nca"], True),
        (["--objective.base", "ipo"], False),
        (["--objective.base", "nca", "--objective.beta", "0.01"], False),
        (["--objective.base", "nca", "--objective.beta", "null"], False),
        ([], False),
    ],
)
def test_a_beta_that_a_file_has_for_another_base_is_named(argv, said, caplog):
    config = parse(Config, ["--config", "configs/offline.yaml", *argv], "train.py", "")
    named = "configs/offline.yaml: objective.beta 0.2 was set there for base 'ipo' and is kept for 'nca'"
    assert (named in caplog.text) is said
    assert config.objective.beta == (0.2 if said or "nca" not in argv else 0.01 if "0.01" in argv else None)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--optimizer.decay_ratio", "0.2"], r"optimizer.decay_ratio: 0.2 is not used by schedule 'cosine'; set"),
        (
            ["--optimizer.schedule", "wsd", "--optimizer.decay_ratio", "0.95"],
            r"decay_ratio: 0.95.*\(0, 0.9\]",
        ),
        (["--objective.token_contrast", "1.5"], r"objective.token_contrast: 1.5.*\[0, 1\]"),
        (["--objective.base", "fdpo_alpha", "--objective.alpha", "0"], r"objective.alpha: 0.0.*\(0, 1\]"),
    ],
)
def test_settings_out_of_range_are_named(argv, message):
    with pytest.raises(InputError, match=message):
        parse(Config, argv, "train.py", "")


@pytest.mark.parametrize("changes", [dict(form="generator"), dict(base="selm")])
def test_token_weights_need_a_pairwise_loss_of_the_plain_pair(changes):
    with pytest.raises(InputError, match=r"objective.token_contrast: 0.5 .* does not have; set it to 0"):
        build_objective(ObjectiveConfig(token_contrast=0.5, **changes))
