"""Settings for every test: CPU with eight faked devices, no silent rank promotion, no network, no shared compilation cache."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import jax
import pytest

from sso_jax.mesh import make_mesh

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def one_device():
    """A mesh of one device."""
    return make_mesh(1, 1, 1, jax.devices()[:1])


@pytest.fixture(scope="session")
def eight_devices():
    """A mesh of eight devices that uses all three axes."""
    return make_mesh(2, 2, 2)
