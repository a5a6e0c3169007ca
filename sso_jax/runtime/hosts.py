"""Communication between the processes of a multi-host run; with a single process every function is nearly free."""

import hashlib
import itertools
import json
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from sso_jax.runtime.errors import InputError, RunError
from sso_jax.runtime.files import leave_writing_to_another
from sso_jax.runtime.signals import start_limit, stop_requested, stop_with_others

Item = TypeVar("Item")
Made = TypeVar("Made")
Value = TypeVar("Value")
_SAFE_POINTS = itertools.count()
_LAST_POINTS: deque[float] = deque(maxlen=2)
"""When this process passed its last two safe points, in seconds of `time.monotonic`."""
_PASSED_ON: list[bool] = []
"""Not empty once this process has passed a stop request on to the others."""
PASSED_AT_ONCE = 4096
"""Items that processes pass to each other together, where they need not be all."""
HEARTBEAT_SECONDS = 30
"""The other processes exit when one has sent no heartbeat for this long."""
SHUTDOWN_SECONDS = 10
"""How long a process that exits waits for the others to exit too."""
FIRST_LEAVES_SECONDS = 1.0
"""How much longer than the others the first process takes to leave an unfinished stop: they end with it."""


def join_hosts(
    initialize: bool = False,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Connects the processes of a run; call it before anything queries JAX for devices.

    Args:
      initialize: whether JAX detects the cluster itself (TPU pod, SLURM, Open MPI, Kubernetes).
      coordinator: HOST:PORT of the first process, where JAX cannot detect the cluster; requires the next two.
      num_processes: number of processes in the run.
      process_id: index of this process, from 0.

    Raises:
      InputError: if the cluster cannot be found or joined.
    """
    if not initialize and coordinator is None:
        return
    # only used on CPU devices, as in tests
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # type: ignore[no-untyped-call]  # untyped
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
            f"hosts: cannot connect the processes ({reason}); start one on each host, or set hosts.coordinator to "
            "HOST:PORT, hosts.num_processes and hosts.process_id"
        ) from error
    stop_with_others()
    if not is_first():
        leave_writing_to_another()


@contextmanager
def report_lost_process() -> Iterator[None]:
    """Turns JAX's error about a lost process of the run into a `RunError`; has no effect with a single process."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        reason = " ".join(str(error).split())[:200]
        raise RunError(
            f"hosts: another process of the run was lost ({reason}); restart all of them to resume where they stopped"
        ) from error


def is_first() -> bool:
    """Returns whether this process is the first one, which writes the files that all share."""
    return jax.process_index() == 0


def broadcast_from_first(value: Value) -> Value:
    """Returns the first process's `value`, which must be JSON-serializable, in every process.

    All processes must call it, in the same order.
    """
    if jax.process_count() == 1:
        return value
    own = _to_bytes(value) if is_first() else np.zeros((0,), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(own.size)))
    received: Value = _from_bytes(multihost_utils.broadcast_one_to_all(_padded(own, size)), size)
    return received


def _to_bytes(value: object) -> np.ndarray:
    """Encodes a value as JSON in a byte array, which collectives can exchange."""
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def _padded(content: np.ndarray, size: int) -> np.ndarray:
    padded = np.zeros((size,), np.uint8)
    padded[: content.size] = content
    return padded


def _from_bytes(content: Any, size: int) -> Any:
    return json.loads(np.asarray(content)[:size].astype(np.uint8).tobytes())


def on_first_process(make: Callable[[], Value]) -> Value:
    """Calls `make` on the first process only and returns its JSON-serializable result in every process.

    Raises:
      InputError: in every process, if `make` raises one; a `RunError` likewise.
    """
    if jax.process_count() == 1:
        return make()
    made: Value = _result(broadcast_from_first(_attempt(make) if is_first() else {}))
    return made


def each_from_first(make: Callable[[], Iterable[Item]]) -> Iterator[Item]:
    """Yields the first process's JSON-serializable items in every process, which receives some at a time.

    All processes must read all of them.
    """
    if jax.process_count() == 1:
        yield from make()
        return
    items = iter(make()) if is_first() else iter(())
    while some := on_first_process(lambda: list(itertools.islice(items, PASSED_AT_ONCE))):
        yield from some


def _attempt(make: Callable[[], object]) -> dict[str, Any]:
    """Returns the result, the `InputError` or the `RunError` of `make` as a dictionary for other processes."""
    try:
        return {"value": make()}
    except InputError as error:
        return {"error": str(error)}
    except RunError as error:
        return {"run_error": str(error)}


def _result(outcome: dict[str, Any]) -> Any:
    """Returns the value of an `_attempt`, or raises its error."""
    if "error" in outcome:
        raise InputError(outcome["error"])
    if "run_error" in outcome:
        raise RunError(outcome["run_error"])
    return outcome["value"]


def map_across_processes(function: Callable[[Item], Made], items: list[Item]) -> list[Made]:
    """Applies `function` to every item of a list that all processes have, each process computing its own share.

    All processes must call it, in the same order. Results must be JSON-serializable.

    Raises:
      InputError: in every process, if `function` raises one in any.
    """
    num_processes = jax.process_count()
    if num_processes == 1:
        return [function(item) for item in items]
    outcomes = _gather(_attempt(lambda: [function(item) for item in own_share(items)]))
    made = [_result(outcome) for outcome in outcomes]
    return [made[i % num_processes][i // num_processes] for i in range(len(items))]


def each_across_processes(function: Callable[[Item], Made], items: Sequence[Item]) -> Iterator[Made]:
    """Like `map_across_processes`, but computes and yields some results at a time, and holds no others.

    All processes must read all of them.
    """
    for start in range(0, len(items), PASSED_AT_ONCE):
        yield from map_across_processes(function, list(items[start : start + PASSED_AT_ONCE]))


def _gather(value: object) -> list[Any]:
    """Returns the JSON-serializable `value` of every process, in process order."""
    own = _to_bytes(value)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(own.size))).reshape(-1)
    gathered = np.asarray(multihost_utils.process_allgather(_padded(own, sizes.max()))).reshape(sizes.size, -1)
    return [_from_bytes(content, size) for content, size in zip(gathered, sizes, strict=True)]


def require_same(value: object, what: str) -> None:
    """Raises `InputError` in every process if `value` (compared by its `repr`) is not the same in all of them.

    Checks what each process reads for itself: if it differed, the processes would wait for each other forever, or train
    on inconsistent data.
    """
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.blake2b(repr(value).encode(), digest_size=16).digest(), np.int32)
    of_all = np.asarray(multihost_utils.process_allgather(digest)).reshape(jax.process_count(), -1)
    others = [str(number) for number, own in enumerate(of_all) if (own != of_all[0]).any()]
    if others:
        raise InputError(
            f"hosts: process {', '.join(others)} has different {what} than process 0; start all processes with the "
            "same command, on files that all of them can read"
        )


def stop_now() -> bool:
    """Returns whether all processes stop at this point, because one received a signal or a pre-emption notice.

    All processes must call it at the same points; once they are connected, JAX's coordination service picks a point
    that all of them will reach. The service takes over SIGTERM, which announces a pre-emption, even with a single
    process (Python's handlers no longer see it). It does not handle SIGINT, which is therefore passed on to it.

    The point is at most the second one after the request, so the limit of a stop (`limit_stops`) counts from the last
    but one before it.
    """
    if not jax.distributed.is_initialized():
        return stop_requested()
    if stop_requested() and not _PASSED_ON:
        _PASSED_ON.append(True)
        signal.raise_signal(signal.SIGTERM)
    stops = multihost_utils.reached_preemption_sync_point(next(_SAFE_POINTS))
    if stops:
        start_limit(_LAST_POINTS[0] if _LAST_POINTS else time.monotonic(), FIRST_LEAVES_SECONDS if is_first() else 0.0)
    _LAST_POINTS.append(time.monotonic())
    return stops


def stop_alone() -> bool:
    """Returns whether this process stops at a point that other processes do not reach, as is fine where none joined."""
    return stop_requested() and not jax.distributed.is_initialized()


def own_share(items: list[Item]) -> list[Item]:
    """Returns this process's share of a list that is the same on all processes."""
    return items[jax.process_index() :: jax.process_count()]


def fetch_global(array: jax.Array) -> np.ndarray:
    """Gathers an array that is sharded over all hosts onto each; all processes must call it, in the same order."""
    if not array.is_fully_addressable and not array.is_fully_replicated:
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(jax.device_get(array))
