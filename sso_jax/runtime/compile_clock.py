"""Counts the seconds that this process has spent compiling programs."""

import jax

_EVENTS = ("/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration")
_SECONDS: list[float] = []


def _record(event: str, duration_secs: float, **_: str | int) -> None:
    if event in _EVENTS:
        _SECONDS.append(duration_secs)


jax.monitoring.register_event_duration_secs_listener(_record)


def compile_seconds() -> float:
    """Returns the seconds spent so far on lowering and compiling programs, or on loading them from the cache."""
    return sum(_SECONDS)
