"""Measures this machine: operations per second of a large matrix product, and bytes per second read and copied."""

import time

import jax
import jax.numpy as jnp

DATASHEET_FLOPS = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}
"""Operations per second of dense bfloat16 products in NVIDIA's datasheets (SXM), by a part of the device's name."""


def require(device: str) -> None:
    """Exits if JAX does not run on this kind of device, "cpu" or "gpu"."""
    found = jax.default_backend()
    if found != device:
        raise SystemExit(
            f"--device {device}: JAX computes on {found} here; install jax[cuda13] for a GPU, or give another --device"
        )


def device_peak_bytes() -> int:
    """Returns the peak memory of this process on its first device; 0 on a CPU, which does not report it."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def _best(work, repeats: int) -> float:
    """Returns the seconds of the fastest call, which other load on the machine affects least.

    On an accelerator several calls are dispatched at a time, which excludes the host's share of a call.
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
    """Measures operations and bytes per second.

    `flops` is for [N, N] @ [N, N], `read_bytes` for 16 vectors times a matrix (as decoding reads weights), and
    `copy_bytes` for a copy.
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
    tall = tall.astype(jnp.float32)  # XLA copies two-byte entries more slowly
    copied = 2 * tall.nbytes / _best(lambda: copy(tall), repeats)
    kind = jax.devices()[0].device_kind
    datasheet = next((peak for name, peak in DATASHEET_FLOPS.items() if name in kind and dtype == "bfloat16"), None)
    return {"device": kind, "flops": flops, "read_bytes": read, "copy_bytes": copied, "datasheet_flops": datasheet}
