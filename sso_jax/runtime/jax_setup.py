"""Process-wide JAX settings."""

import os
from pathlib import Path

import jax

from sso_jax.runtime.errors import InputError


def set_matmul_precision(precision: str | None, compute_dtype: str) -> None:
    """Sets the precision of matrix products; float32 products have full float32 precision unless `precision` is given.

    By default a TPU multiplies float32 in a single bfloat16 pass and recent NVIDIA GPUs use TF32, which is off in the
    third digit.

    Args:
      precision: "default", "high" or "highest"; None means "highest" for float32 arithmetic and the platform's default
        otherwise.
      compute_dtype: type of the decoder's arithmetic.
    """
    exact = "highest" if compute_dtype == "float32" else None
    jax.config.update("jax_default_matmul_precision", precision or exact)  # type: ignore[no-untyped-call]  # untyped


def require_devices() -> None:
    """Raises `InputError` if JAX finds no device, for example because JAX_PLATFORMS names one that is not there.

    Several hosts must be joined before.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or ["no such device"])[0]
        raise InputError(
            f"JAX_PLATFORMS: {os.environ.get('JAX_PLATFORMS', '')!r} gives no device ({reason}); unset it, or install "
            'jax for the device: "jax[cuda13]" or "jax[tpu]"'
        ) from error


def prepare_jax(compilation_cache: str = "") -> None:
    """Applies settings that must be in place before anything queries JAX for devices.

    Args:
      compilation_cache: folder that keeps compiled programs between runs; empty for none.
    """
    if compilation_cache:
        folder = str(Path(compilation_cache).expanduser())
        jax.config.update("jax_compilation_cache_dir", folder)  # type: ignore[no-untyped-call]  # untyped
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)  # type: ignore[no-untyped-call]  # untyped
