"""What this machine can do: operations a second of a large matrix product, bytes a second read and copied."""

import time

import jax
import jax.numpy as jnp


def _best(work, repeats: int) -> float:
    """Seconds of the fastest call: what the machine can do, not what it did beside other work."""
    jax.block_until_ready(work())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(work())
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure(dtype: str, repeats: int = 10) -> dict:
    """A second's `flops` of [N, N] @ [N, N], `read_bytes` of 16 vectors times a matrix (as decoding reads weights), and `copy_bytes`."""
    on_cpu = jax.default_backend() == "cpu"
    size = 2048 if on_cpu else 8192
    square = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a, b: a @ b)
    flops = 2.0 * size**3 / _best(lambda: product(square, square), repeats)
    rows = 16
    tall = jnp.ones((size, 32 * size if on_cpu else 16 * size), dtype)  # far larger than any cache
    few = jnp.ones((rows, size), dtype)
    read = tall.nbytes / _best(lambda: product(few, tall), repeats)
    copy = jax.jit(lambda a: a + 1)
    copied = 2 * tall.nbytes / _best(lambda: copy(tall), repeats)
    return {"flops": flops, "read_bytes": read, "copy_bytes": copied}
