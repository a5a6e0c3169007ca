"""Two real processes of four devices each against one of eight: same responses, same losses, files once, a checkpoint
that one reads.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax.experimental import multihost_utils
from toys import COMPILED, toy_model, toy_params
from two_processes import start_process
from xla_flags import QUICKLY

import train
from sso_jax.config import OptimizerConfig
from sso_jax.config.machine import HostsConfig
from sso_jax.models.export import export_policy
from sso_jax.models.hf_weights import read_params
from sso_jax.models.transformer import abstract_params
from sso_jax.recipes.stages.update import abstract_state, build_optimizer
from sso_jax.runtime.errors import InputError
from sso_jax.runtime.hosts import broadcast_from_first, fetch_global, on_first_process, stop_now
from sso_jax.runtime.mesh import param_shardings
from sso_jax.runtime.server_process import free_port
from sso_jax.toy.pretraining import train_tokenizer
from sso_jax.training import checkpoints

ROOT = Path(__file__).resolve().parents[2]
MODEL = toy_model(vocab_size=1024, num_layers=1)


@pytest.fixture(scope="module")
def material(tmp_path_factory, one_device):
    """A folder for the runs, and the command line that they share."""
    folder = tmp_path_factory.mktemp("hosts")
    tokenizer = train_tokenizer()
    export_policy(
        toy_params(MODEL, one_device),
        MODEL.architecture,
        tokenizer,
        (tokenizer.eos_token_id,),
        folder / "model",
        "float32",
    )
    queries = folder / "queries.jsonl"
    queries.write_text(
        "".join(json.dumps({"query": f"Spell {word}."}) + "\n" for word in ("fox", "fig", "cat", "red", "ten", "oak"))
    )
    fields = {
        "model.path": folder / "model",
        "queries.path": queries,
        "queries.per_iteration": 6,
        "run.iterations": 1,
        "sampling.batch_size": 8,
        "sampling.max_new_tokens": 8,
        "train.batch_size": 2,
        "objective.base": "dpo",
        "optimizer.learning_rate": 1e-3,
        "mesh.data": 2,
        "mesh.fsdp": 2,
        "mesh.tensor": 2,
        "run.compilation_cache": COMPILED,
        "model.remat": "false",
        "logging.tensorboard": "false",
    }
    return folder, [str(part) for name, value in fields.items() for part in (f"--{name}", value)]


@pytest.fixture(scope="module")
def runs(material):
    """(directory of one process, directory of two, what the two printed)."""
    folder, arguments = material
    port, logs = free_port(), [folder / f"process_{i}.log" for i in range(2)]
    apart = ["--sampling.mesh", '{"data": 2, "fsdp": 4}', "--run.directory", str(folder / "two")]
    processes = [start_process([*arguments, *apart], port, i, log) for i, log in enumerate(logs)]
    assert train.main([*arguments, "--run.directory", str(folder / "one")]) == 0
    for process, log in zip(processes, logs, strict=True):
        assert process.wait(timeout=600) == 0, log.read_text()[-3000:]
    return folder / "one", folder / "two", [log.read_text() for log in logs]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_processes_sample_the_same_tokens_as_one(runs):
    one, two, _ = runs
    ids = [[row["response_ids"] for row in rows(run / "iteration_1" / "responses.jsonl")] for run in (one, two)]
    assert ids[0] == ids[1] and len(ids[0]) == 6


def test_two_processes_have_the_losses_and_log_probs_of_one(runs):
    one, two, _ = runs
    lines = [rows(run / "metrics.jsonl") for run in (one, two)]
    for field in ("loss", "chosen_log_prob", "rejected_log_prob", "margin", "grad_norm"):
        count = (
            1 if field == "grad_norm" else 3
        )  # later ones differ where Adam divided a gradient near 0 by its own size
        values = [[line[field] for line in of_run][:count] for of_run in lines]
        assert len(values[0]) == count
        np.testing.assert_allclose(values[1], values[0], rtol=1e-5, atol=1e-5, err_msg=field)
    pairs = [
        [list(row["log_probs"]["plain"].values()) for row in rows(run / "iteration_1" / "pairs.jsonl")]
        for run in (one, two)
    ]
    np.testing.assert_allclose(pairs[1], pairs[0], rtol=1e-5)


def test_what_is_written_once_is_written_by_the_first(runs):
    _, two, printed = runs
    assert ["tokens a second" in text for text in printed] == [True, False]  # the table of a round
    updates = [(row["iteration"], row["step"]) for row in rows(two / "metrics.jsonl")]
    assert updates == sorted(set(updates))  # each line once
    assert not list(two.rglob("*.partial"))


def test_a_checkpoint_of_two_processes_is_restored_by_one_on_another_mesh(runs, one_device):
    _, two, _ = runs
    shardings = param_shardings(abstract_params(MODEL), one_device)
    optimizer = build_optimizer(OptimizerConfig())
    with checkpoints.open_checkpoints(two / "iteration_1" / "checkpoints", 1) as manager:
        state = checkpoints.restore(
            manager, *abstract_state(nn.unbox(abstract_params(MODEL)), shardings, optimizer, one_device)
        )
    exported = read_params(two / "iteration_1" / "policy", MODEL, one_device)
    jax.tree.map(np.testing.assert_array_equal, state.params, exported)
    assert int(state.step) == 3


def test_where_one_process_is_lost_the_other_ends_within_a_minute_and_says_so(material):
    folder, arguments = material
    port, logs, lost = free_port(), [folder / f"lost_{i}.log" for i in range(2)], folder / "lost"
    first, second = (
        start_process([*arguments, "--run.directory", str(lost)], port, i, log) for i, log in enumerate(logs)
    )
    while not (lost / "iteration_1" / "done" / "queries.json").exists() and first.poll() is None:
        time.sleep(0.05)
    second.kill()
    try:
        status = first.wait(timeout=60)
    finally:
        first.kill()
    told = [
        line
        for line in logs[0].read_text().splitlines()
        if line.startswith("train.py: hosts: another process of the run was lost")
    ]
    assert status != 0 and len(told) == 1, logs[0].read_text()[-3000:]


COMPARE = """
import sys
from sso_jax.runtime.errors import InputError
from sso_jax.runtime.hosts import join_hosts, require_same
port, number = sys.argv[1], int(sys.argv[2])
join_hosts(coordinator=f"127.0.0.1:{port}", num_processes=2, process_id=number)
require_same(["fox", "fig"], "queries")
try:
    require_same(["fox", "fig"][: 2 - number], "queries")
except InputError as error:
    print(error)
"""


def test_processes_that_read_different_things_are_refused_in_all_of_them():
    port, environment = free_port(), {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICKLY}
    command = [sys.executable, "-c", COMPARE, str(port)]
    both = [
        subprocess.Popen([*command, str(i)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    for process in both:
        told, _ = process.communicate(timeout=120)
        line = told.splitlines()[-1]  # Gloo greets before it
        assert process.returncode == 0 and line.startswith(
            "hosts: process 1 has different queries than process 0; start all processes with the same command"
        )


SHARING = """
import sys
from sso_jax.runtime.errors import InputError, RunError
from sso_jax.runtime import hosts
from sso_jax.runtime.hosts import each_across_processes, each_from_first, map_across_processes, on_first_process
from sso_jax.runtime.hosts import join_hosts
port, number = sys.argv[1], int(sys.argv[2])
join_hosts(coordinator=f"127.0.0.1:{port}", num_processes=2, process_id=number)
own = []
lengths = map_across_processes(lambda text: own.append(text) or len(text), ["fox", "stork", "lynx"])
assert lengths == [3, 5, 4] and map_across_processes(len, []) == [] and map_across_processes(len, ["one"]) == [3]

def refuse(text):
    if text == "stork":
        raise InputError("a stork")
try:
    map_across_processes(refuse, ["fox", "stork", "lynx"])
except InputError as error:
    refused = error

hosts.PASSED_AT_ONCE = 2
for count in range(6):  # whole parts, and not
    numbers = list(range(count))
    assert list(each_across_processes(lambda n: n * n, numbers)) == [n * n for n in numbers]
    assert list(each_from_first(lambda: zip(numbers, "abcdef") if number == 0 else 1 / 0)) == [
        [n, "abcdef"[n]] for n in numbers
    ]

def broken():
    yield from range(3)
    raise InputError("a broken journal")
for make in (lambda: each_from_first(broken), lambda: each_across_processes(refuse, ["a", "b", "c", "stork"])):
    seen = []
    try:
        seen.extend(make())
    except InputError as error:
        assert str(error) in ("a broken journal", "a stork")
    else:
        raise AssertionError(seen)

def fail():
    raise RunError("a lost server")
try:
    on_first_process(fail)
except RunError as error:
    print(own, refused, error)
"""


def test_each_process_works_out_its_own_share_and_all_have_the_whole():
    port, environment = free_port(), {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICKLY}
    command = [sys.executable, "-c", SHARING, str(port)]
    both = [
        subprocess.Popen([*command, str(i)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    told = [process.communicate(timeout=120)[0].splitlines()[-1] for process in both]
    assert told == ["['fox', 'lynx'] a stork a lost server", "['stork'] a stork a lost server"]


def test_a_signal_to_one_process_stops_both_with_75_and_the_same_commands_end_alike(material, runs):
    folder, arguments = material
    directory, logs = folder / "stopped", [folder / f"stopped_{i}.log" for i in range(2)]
    apart = ["--sampling.mesh", '{"data": 2, "fsdp": 4}', "--run.directory", str(directory)]

    def start() -> list[subprocess.Popen]:
        port = free_port()
        return [start_process([*arguments, *apart], port, i, log) for i, log in enumerate(logs)]

    processes = start()
    while not (directory / "iteration_1" / "done" / "queries.json").exists() and processes[0].poll() is None:
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    for process, log in zip(processes, logs, strict=True):
        assert process.wait(timeout=300) == 75, log.read_text()[-3000:]
        assert "run the same command again" in log.read_text()
    rounds = [row["iteration"] for row in json.loads((directory / "summary.json").read_text())]
    assert (
        rounds == [0] and not (directory / "iteration_1" / "done" / "export.json").exists()
    )  # stopped within the round
    for process, log in zip(start(), logs, strict=True):
        assert process.wait(timeout=300) == 0, log.read_text()[-3000:]
    for name in ("responses.jsonl", "pairs.jsonl", "policy/model.safetensors"):
        assert (directory / "iteration_1" / name).read_bytes() == (runs[1] / "iteration_1" / name).read_bytes(), name


STOPPING = """
import os, signal, sys, time
from sso_jax.runtime.hosts import join_hosts, stop_now
from sso_jax.runtime.signals import limit_stops, stop_at_safe_points, unsaved_work
port, count, number, notice = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
with stop_at_safe_points():
    limit_stops(0.5 if sys.argv[5:] else None)
    join_hosts(coordinator=f"127.0.0.1:{port}", num_processes=count, process_id=number)
    assert not stop_now()
    if notice:
        os.kill(os.getpid(), signal.Signals[notice])
    points, end = 1, time.monotonic() + 60
    while not stop_now():
        points += 1
        assert time.monotonic() < end
        time.sleep(0.05)
    print("stopped at", points, flush=True)
    if sys.argv[5:]:
        with unsaved_work():
            time.sleep(60)
"""


def joined(*arguments: str) -> list[subprocess.Popen]:
    """Processes of STOPPING, one for each argument, which says what signal it sends itself."""
    port, environment = free_port(), {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICKLY}
    command = [sys.executable, "-c", STOPPING, str(port), str(len(arguments))]
    return [
        subprocess.Popen(
            [*command, str(i), *own.split(",")], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        )
        for i, own in enumerate(arguments)
    ]


@pytest.mark.parametrize("notices", [["SIGTERM"], ["", "SIGINT"]])
def test_a_notice_of_preemption_stops_all_joined_processes_at_one_point(notices):
    """JAX takes SIGTERM, by which the notice comes, from Python once processes are joined, even a single one; SIGINT is
    passed on.
    """
    processes = joined(*notices)
    told = {process.communicate(timeout=120)[0].splitlines()[-1] for process in processes}
    assert len(told) == 1 and told.pop().startswith("stopped at ") and not any(p.returncode for p in processes)


def test_the_limit_of_a_stop_ends_joined_processes_that_have_unsaved_work():
    processes = joined("SIGTERM,limited", ",limited")
    assert all(process.communicate(timeout=50)[0].startswith("stopped at ") for process in processes)
    assert [process.returncode for process in processes] == [75, 75]


def test_a_stop_is_asked_of_the_cluster_where_processes_are_joined(monkeypatch):
    """What JAX provides, simulated: the cluster says at which point all stop; the points are counted on."""
    asked = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(
        multihost_utils, "reached_preemption_sync_point", lambda point: asked.append(point) or len(asked) == 3
    )
    assert [stop_now() for _ in range(3)] == [False, False, True]
    assert asked == list(range(asked[0], asked[0] + 3))


def test_one_process_agrees_with_itself(one_device):
    assert broadcast_from_first({"a": [1, None]}) == {"a": [1, None]} and on_first_process(lambda: 3) == 3
    np.testing.assert_array_equal(fetch_global(jax.numpy.arange(3)), [0, 1, 2])
    with pytest.raises(InputError, match="mine"):
        on_first_process(lambda: (_ for _ in ()).throw(InputError("mine")))


def test_half_given_processes_are_refused():
    with pytest.raises(InputError, match=r"hosts: .*give coordinator, num_processes and process_id together"):
        HostsConfig(coordinator="127.0.0.1:1")
