"""Process-wide JAX settings."""

from pathlib import Path

import jax


def set_matmul_precision(precision: str | None, compute_dtype: str) -> None:
    """Sets how exactly matrices are multiplied: float32 products are exact to float32 unless `precision` says
    otherwise.

    By default a TPU multiplies float32 in one bfloat16 pass and recent NVIDIA GPUs use TF32, which is wrong in the
    third digit.

    Args:
      precision: "default", "high" or "highest"; None is "highest" for float32 arithmetic and the platform's own
        otherwise.
      compute_dtype: type of the decoder's arithmetic.
    """
    exact = "highest" if compute_dtype == "float32" else None
    jax.config.update("jax_default_matmul_precision", precision or exact)


def prepare_jax(compilation_cache: str = "") -> None:
    """Applies settings that must be in place before anything asks JAX for a device.

    On a CPU computations run in the calling thread. With asynchronous dispatch a call's results are ready before its
    working memory is freed, and the next call allocates as much again.

    Args:
      compilation_cache: folder that keeps compiled programs between runs; empty for none.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(Path(compilation_cache).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
