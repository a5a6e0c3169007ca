"""What one process of a run has in, what all of them have out. With a single process every function here does next to
nothing.
"""

import hashlib
import itertools
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from sso_jax.runtime.errors import InputError, RunError
from sso_jax.runtime.files import leave_writing_to_another
from sso_jax.runtime.signals import stop_requested

Item, Made = TypeVar("Item"), TypeVar("Made")
_SAFE_POINTS = itertools.count()
_PASSED_ON: list[bool] = []
"""Not empty once this process told the others of a SIGINT."""
HEARTBEAT_SECONDS = 30
"""After this long without a sign of life of one process the others end."""
SHUTDOWN_SECONDS = 10
"""How long a process that ends waits for the others to end too."""


def join_hosts(
    initialize: bool = False,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins the processes of a run; call it before anything else asks JAX for a device.

    Args:
      initialize: whether JAX finds the cluster itself (TPU pod, SLURM, Open MPI, Kubernetes).
      coordinator: HOST:PORT of the first process, where JAX cannot find the cluster; the next two go with it.
      num_processes: number of processes in the run.
      process_id: number of this process, from 0.

    Raises:
      InputError: if the cluster cannot be found or joined.
    """
    if not initialize and coordinator is None:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # used where the devices are CPUs, as in tests
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"hosts: the processes cannot be joined ({reason}); start one on each host, or give hosts.coordinator "
            "HOST:PORT, "
            "hosts.num_processes and hosts.process_id"
        ) from error
    if not is_first():
        leave_writing_to_another()


@contextmanager
def report_lost_process() -> Iterator[None]:
    """Within it what JAX raises where another process of the run is gone becomes a `RunError`; with one process nothing
    changes.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        reason = " ".join(str(error).split())[:200]
        raise RunError(
            f"hosts: another process of the run was lost ({reason}); start all of them again, they go on where they "
            "stopped"
        ) from error


def is_first() -> bool:
    """Whether this process is the one that writes what is written once."""
    return jax.process_index() == 0


def broadcast_from_first(value):
    """The first process's `value`, anything that JSON holds, in every process. All of them must call it, in the same
    order.
    """
    if jax.process_count() == 1:
        return value
    own = _to_bytes(value) if is_first() else np.zeros((0,), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(own.size)))
    return _from_bytes(multihost_utils.broadcast_one_to_all(_padded(own, size)), size)


def _to_bytes(value) -> np.ndarray:
    """JSON of a value as bytes, which collectives can exchange."""
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def _padded(content: np.ndarray, size: int) -> np.ndarray:
    padded = np.zeros((size,), np.uint8)
    padded[: content.size] = content
    return padded


def _from_bytes(content, size: int):
    return json.loads(np.asarray(content)[:size].astype(np.uint8).tobytes())


def on_first_process(make: Callable[[], object]):
    """What `make` returns (anything that JSON holds), called by the first process alone and shared, or the `InputError`
    that it raises.
    """
    if jax.process_count() == 1:
        return make()
    return _result(broadcast_from_first(_attempt(make) if is_first() else None))


def _attempt(make: Callable[[], object]) -> dict:
    """What `make` returns, or the `InputError` that it raises, as other processes can be told."""
    try:
        return {"value": make()}
    except InputError as error:
        return {"error": str(error)}


def _result(outcome: dict):
    """What an `_attempt` came to, in any process."""
    if "error" in outcome:
        raise InputError(outcome["error"])
    return outcome["value"]


def map_across_processes(function: Callable[[Item], Made], items: list[Item]) -> list[Made]:
    """`function` of every item of a list that all processes have, each of which works out its own share alone; what it
    makes JSON holds.

    All processes must call it, in the same order. An `InputError` in one is raised in all.
    """
    num_processes = jax.process_count()
    if num_processes == 1:
        return [function(item) for item in items]
    outcomes = _gather(_attempt(lambda: [function(item) for item in own_share(items)]))
    made = [_result(outcome) for outcome in outcomes]
    return [made[i % num_processes][i // num_processes] for i in range(len(items))]


def _gather(value) -> list:
    """Each process's own `value`, anything that JSON holds, in the order of the processes."""
    own = _to_bytes(value)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(own.size))).reshape(-1)
    gathered = np.asarray(multihost_utils.process_allgather(_padded(own, sizes.max()))).reshape(sizes.size, -1)
    return [_from_bytes(content, size) for content, size in zip(gathered, sizes, strict=True)]


def require_same(value, what: str) -> None:
    """Raises `InputError` in every process if one of them has another `value` (compared by its `repr`) than the first.

    What each process reads for itself is checked by this: on a difference they would wait for each other for ever, or
    train on nonsense.
    """
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.blake2b(repr(value).encode(), digest_size=16).digest(), np.int32)
    of_all = np.asarray(multihost_utils.process_allgather(digest)).reshape(jax.process_count(), -1)
    others = [str(number) for number, own in enumerate(of_all) if (own != of_all[0]).any()]
    if others:
        raise InputError(
            f"hosts: process {', '.join(others)} has other {what} than process 0; start all with one command on files "
            "that all of them see"
        )


def stop_now() -> bool:
    """Whether all processes stop at this point, because one of them got a signal or a notice of pre-emption.

    All of them must call it at the same points; where they were joined the cluster's service finds the point that all
    will reach. It takes SIGTERM, by which a notice of pre-emption comes, for itself, in a single process too (no
    handler of Python's sees it any more), and knows nothing of SIGINT, which is therefore passed on to it.
    """
    if not jax.distributed.is_initialized():
        return stop_requested()
    if stop_requested() and not _PASSED_ON:
        _PASSED_ON.append(True)
        signal.raise_signal(signal.SIGTERM)
    return multihost_utils.reached_preemption_sync_point(next(_SAFE_POINTS))


def own_share(items: list) -> list:
    """The share of a list, the same on all processes, that falls to this one: what it reads or writes where each has
    its own.
    """
    return items[jax.process_index() :: jax.process_count()]


def fetch_global(array: jax.Array) -> np.ndarray:
    """An array that lies over all hosts, on each of them. All processes must call it, in the same order."""
    if not array.is_fully_addressable and not array.is_fully_replicated:
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(jax.device_get(array))
