"""XLA flags of all tests; imports nothing of JAX, which reads its environment when it is imported."""

from importlib.metadata import version

HAS_PLAIN_EMITTERS = version("jaxlib").split(".")[:2] == ["0", "10"]
"""Whether XLA can do without MLIR's fusion emitters; later releases have no other, and refuse the flag."""
QUICKLY = " ".join(
    [
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",
        *(["--xla_cpu_use_fusion_emitters=false"] if HAS_PLAIN_EMITTERS else []),  # half the time of a compilation
    ]
)
"""Programs compile faster, and only rounding changes."""
