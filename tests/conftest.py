"""Settings of every test: eight faked CPU devices, no silent rank promotion, no network, compiled programs shared."""

import gc
import os
import shutil
import tempfile
from pathlib import Path

from xla_flags import QUICKLY

CACHE = os.environ.get("SSO_JAX_TEST_CACHE") or tempfile.mkdtemp(prefix="sso_jax-tests-")
"""Compiled programs of this test run; its worker processes inherit the variable."""
os.environ["SSO_JAX_TEST_CACHE"] = os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICKLY} --xla_force_host_platform_device_count=8"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import jax
import pytest
from toys import toy_model, toy_params

from sso_jax.models.export import export_policy
from sso_jax.runtime.mesh import make_mesh
from sso_jax.toy.pretraining import train_tokenizer

jax.config.update("jax_numpy_rank_promotion", "raise")

TESTS = pytest.StashKey[int]()
"""Number of tests that a process has run."""
SLOW = {
    "test_adapter_runs",
    "test_attention",
    "test_bad_input",
    "test_check",
    "test_device_steps",
    "test_dockerfile",
    "test_dry_run",
    "test_end_to_end",
    "test_examples",
    "test_families",
    "test_family_runs",
    "test_fitting_slots",
    "test_frozen_bits",
    "test_gradients",
    "test_held_out",
    "test_held_out_answers",
    "test_held_out_recipes",
    "test_hf_weights",
    "test_hosts",
    "test_hub",
    "test_interruptions",
    "test_kept_samples",
    "test_layer_layout",
    "test_model_card",
    "test_notebook",
    "test_offline_steps",
    "test_package",
    "test_packing",
    "test_peft_adapters",
    "test_recipes",
    "test_rejected_sources",
    "test_reward_adapters",
    "test_reward_run",
    "test_rewards",
    "test_router_balance",
    "test_run_record",
    "test_safetensors_folder",
    "test_sampler",
    "test_sampling_params",
    "test_scripts",
    "test_served_sampling",
    "test_splash",
    "test_spo_head",
    "test_step_limits",
    "test_stops",
    "test_steering_benchmark",
    "test_tiny_reward",
    "test_update",
    "test_vllm",
    "test_vocabulary",
}
"""Files whose tests run a recipe or compile a whole model. Tests of all other files are marked `quick`."""


def pytest_collection_modifyitems(items):
    """Marks what belongs to the inner loop, and puts it last: a long file at the end would leave one worker idle."""
    items.sort(key=lambda item: item.path.stem not in SLOW)
    for item in items:
        if item.path.stem not in SLOW:
            item.add_marker(pytest.mark.quick)


def pytest_collection_finish():
    """Has the garbage collector leave alone what was imported, and look seldom: tracing makes many small objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_sessionfinish(session):
    """Deletes the compiled programs once all processes are done."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(CACHE, ignore_errors=True)


MAPPINGS = Path("/proc/self/maps")
MOST_MAPPINGS = 20_000
"""Linux allows a process 65,530, and a compiled program on a CPU takes several; the one too many is a crash."""


@pytest.fixture(autouse=True, scope="session")
def programs_in_one_folder():
    """Compiles something, which settles the folder of compiled programs: a run in this process would name its own."""
    jax.random.key(0)


@pytest.fixture(autouse=True, scope="module")
def programs_of_one_file():
    """Frees the compiled programs after each file; on disk all are kept, also behind a run, which keeps few."""
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True)
def few_mappings(request):
    """Frees the compiled programs within a file where there are too many; looks after every tenth test."""
    yield
    count = request.session.stash[TESTS] = request.session.stash.get(TESTS, 0) + 1
    if count % 10 == 0 and MAPPINGS.is_file() and MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


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
