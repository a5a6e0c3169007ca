"""Compiles a layer of Qwen3-30B-A3B's experts: what its devices send each other, and which grouped product is cheaper.

    python -m benchmarks.experts                              # bytes between 16 simulated devices
    JAX_PLATFORMS=cpu python -m benchmarks.experts --topology v5p:2x2x1

The first compares single tokens of 256 rows, as in decoding, with as many tokens in sequences, whose weights are
gathered; a CPU computes in float32, so that weights count twice what they do on a TPU. The second needs
requirements-dry-run.txt, but no TPU; its operations and bytes are the compiler's own account.
"""

import argparse
import os
import re
import sys
from collections import Counter

DEVICES, TOKENS = 16, 256
MESHES = ((16, 1), (4, 4), (2, 8), (1, 16))
"""Sizes of the axes fsdp and expert."""
SHAPES = ((128, 16384), (128, 2048), (16, 16384))
"""Numbers of experts on a device, and of rows."""
COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\(")
MIB = 2**20


def sent_bytes(program: str) -> Counter:
    """Returns the bytes of the results of a compiled program's collectives, by kind."""
    found: Counter = Counter()
    for result, kind, _ in COLLECTIVE.findall(program):
        for dtype, sizes in re.findall(r"(\w+?)\[([\d,]*)\]", result):
            entries = 1
            for size in filter(None, sizes.split(",")):
                entries *= int(size)
            found[kind] += entries * (2 if dtype == "bf16" else 4)
    return found


def print_exchange() -> None:
    """Prints the MiB of a layer's collectives by mesh, for single tokens and for sequences."""
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    from sso_jax.models.experts import ExpertsMLP
    from sso_jax.models.presets import PRESETS
    from sso_jax.runtime.mesh import batch_sharding, make_mesh, param_shardings

    architecture = PRESETS["Qwen/Qwen3-30B-A3B"]
    mlp = ExpertsMLP(architecture, "plain", jnp.bfloat16, jnp.bfloat16)
    zeros = jnp.zeros((1, 1, architecture.embed_dim), jnp.bfloat16)
    boxed = {"params": jax.eval_shape(lambda: mlp.init(jax.random.key(0), zeros))["params"]}
    print("| fsdp | expert | MiB of single tokens | MiB of sequences |\n|---|---|---|---|")
    for fsdp, expert in MESHES:
        mesh = make_mesh(1, fsdp, 1, expert=expert)
        params = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            nn.unbox(boxed),
            param_shardings(boxed, mesh),
        )
        sent = []
        for length in (1, TOKENS // DEVICES):
            shape = (TOKENS // length, length, architecture.embed_dim)
            x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=batch_sharding(mesh))
            with jax.set_mesh(mesh):
                sent.append(sent_bytes(jax.jit(mlp.apply).lower(params, x).compile().as_text()).total() / MIB)
        print(f"| {fsdp} | {expert} | {sent[0]:,.1f} | {sent[1]:,.1f} |", flush=True)


def print_products(topology: str) -> None:
    """Prints what XLA counts for `jax.lax.ragged_dot` and for megablox's `gmm` on a chip, forward and backward."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental.pallas.ops.tpu.megablox import gmm
    from jax.sharding import Mesh, SingleDeviceSharding

    from sso_jax.commands.dry_run import find_devices

    width, hidden = 2048, 768
    products = {
        "ragged_dot": jax.lax.ragged_dot,
        "gmm, tiles of 128": lambda x, w, n: gmm(x, w, n, jnp.bfloat16),
        "gmm, tiles of 512, 1024, 768": lambda x, w, n: gmm(x, w, n, jnp.bfloat16, (512, 1024, 768)),
    }
    chip = SingleDeviceSharding(Mesh(np.array(find_devices(topology)[:1]), "x").devices.flat[0])

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=chip)

    print("| experts | rows | product | pass | GFLOP | MiB accessed | MiB of temporaries |\n" + "|---" * 7 + "|")
    for experts, rows in SHAPES:
        args = shape(rows, width), shape(experts, width, hidden), shape(experts, dtype=jnp.int32)
        for name, product in products.items():
            gradient = jax.grad(lambda x, w, n, of=product: jnp.sum(of(x, w, n).astype(jnp.float32) ** 2), (0, 1))
            for title, function in (("forward", product), ("with backward", gradient)):
                program = jax.jit(function).lower(*args).compile()
                cost, memory = program.cost_analysis(), program.memory_analysis()
                numbers = f"{cost['flops'] / 1e9:,.0f} | {cost['bytes accessed'] / MIB:,.0f}"
                temporaries = memory.temp_size_in_bytes / MIB
                print(f"| {experts} | {rows} | {name} | {title} | {numbers} | {temporaries:.1f} |", flush=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", help="TPU topology to compile grouped products for; else bytes between devices")
    topology = parser.parse_args(argv).topology
    print_exchange() if topology is None else print_products(topology)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
