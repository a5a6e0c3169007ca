"""Settings for every test: CPU with eight faked devices, no silent rank promotion, no network, no shared compilation
cache.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import jax
import pytest
from toys import toy_model, toy_params

from sso_jax.models.export import export_policy
from sso_jax.runtime.mesh import make_mesh
from sso_jax.toy.pretraining import train_tokenizer

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def one_device():
    """A mesh of one device."""
    return make_mesh(1, 1, 1, jax.devices()[:1])


@pytest.fixture(scope="session")
def eight_devices():
    """A mesh of eight devices that uses all three axes."""
    return make_mesh(2, 2, 2)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, one_device):
    """A random policy of one layer with a real tokenizer and 512 positions."""
    tokenizer = train_tokenizer()
    model = toy_model(vocab_size=1024, num_layers=1, max_positions=512)
    folder = tmp_path_factory.mktemp("model") / "policy"
    export_policy(
        toy_params(model, one_device), model.architecture, tokenizer, (tokenizer.eos_token_id,), folder, "float32"
    )
    return folder
