"""What this machine can do: operations a second of a large matrix product, bytes a second read and copied; what its
maker says.
"""

import time

import jax
import jax.numpy as jnp

DATASHEET_FLOPS = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}
"""Operations a second of dense bfloat16 products by NVIDIA's datasheets (SXM), by a part of the device's name."""


def require(device: str) -> None:
    """Ends the program where JAX does not compute on this kind of device, "cpu" or "gpu"."""
    found = jax.default_backend()
    if found != device:
        raise SystemExit(
            f"--device {device}: JAX computes on {found} here; install jax[cuda13] for a GPU, or give another --device"
        )


def device_peak_bytes() -> int:
    """The most memory that this process has held on its first device so far; 0 on a CPU, which does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def _best(work, repeats: int) -> float:
    """Seconds of a call, the fastest of the repeats: what the machine can do, not what it did beside other work.

    An accelerator is given several at a time, so that the host's part of a call is not counted.
    """
    calls = 1 if jax.default_backend() == "cpu" else 4
    jax.block_until_ready(work())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            last = work()
        jax.block_until_ready(last)
        seconds.append((time.perf_counter() - start) / calls)
    return min(seconds)


def measure(dtype: str, repeats: int = 10) -> dict:
    """A second's `flops` of [N, N] @ [N, N], `read_bytes` of 16 vectors times a matrix (as decoding reads weights), and
    `copy_bytes`.
    """
    on_cpu = jax.default_backend() == "cpu"
    size = 2048 if on_cpu else 8192

    def random(number, shape):
        return jax.random.normal(jax.random.key(number), shape, dtype)

    square = random(0, (size, size))
    product = jax.jit(lambda a, b: a @ b)
    flops = 2.0 * size**3 / _best(lambda: product(square, square), repeats)
    rows = 16
    tall = random(1, (size, 32 * size if on_cpu else 16 * size))  # far larger than any cache
    few = random(2, (rows, size))
    read = tall.nbytes / _best(lambda: product(few, tall), repeats)
    copy = jax.jit(lambda a: a + 1)
    tall = tall.astype(jnp.float32)  # of two bytes an entry XLA copies more slowly
    copied = 2 * tall.nbytes / _best(lambda: copy(tall), repeats)
    kind = jax.devices()[0].device_kind
    datasheet = next((peak for name, peak in DATASHEET_FLOPS.items() if name in kind and dtype == "bfloat16"), None)
    return {"device": kind, "flops": flops, "read_bytes": read, "copy_bytes": copied, "datasheet_flops": datasheet}
