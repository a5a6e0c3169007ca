"""Counts the floating-point operations of a traced program before compilation: those of its matrix products.

XLA's own `cost_analysis` counts the body of a loop once. Here a scan counts its length, and a while loop the number of
iterations given by the caller.
"""

import math
import re
from collections.abc import Iterator, Sequence
from itertools import repeat

from jax import core
from jax.extend.core import ClosedJaxpr, Jaxpr

from sso_jax.models.grouped_product import SCOPE
from sso_jax.runtime.mesh import num_expert_shards

BLOCK_LOOP = re.compile(SCOPE.format(r"(\d+)", r"(\d+)"))
"""Scope of a loop over blocks of rows, of which one knows only when it runs how often that is."""


def count_flops(program: ClosedJaxpr, while_trips: int | Sequence[int] = 1) -> int:
    """Returns the operations of the matrix products of `program` (`jax.make_jaxpr(f)(*shapes)`), two per multiply-add.

    Example: a scan over 10 layers of [4, 8] @ [8, 16] counts 10 * 2 * 4*8*16 = 10,240.

    Args:
      program: the traced program.
      while_trips: iterations of every while loop, or of each in the order of the program, which does not specify them.
    """
    return _count(program.jaxpr, repeat(while_trips) if isinstance(while_trips, int) else iter(while_trips))


def _count(jaxpr: Jaxpr, while_trips: Iterator[int], expert_shards: int = 1) -> int:
    return sum(_of_equation(equation, while_trips, expert_shards) for equation in jaxpr.eqns)


def _of_equation(equation, while_trips: Iterator[int], expert_shards: int = 1) -> int:
    """Counts an operation; of the rows for experts, each of `expert_shards` devices has its own share to compute."""
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _of_product(equation)
    if name == "ragged_dot_general":  # rows and the matrix of their group, or the gradient of that matrix
        return 2 * math.prod(equation.invars[0].aval.shape) * equation.outvars[0].aval.shape[-1] // expert_shards
    if name.startswith("dot_product_attention_"):
        return _of_cudnn(equation, 2 if "fwd" in name else 5)
    if name == "cond":
        return max(_count(branch.jaxpr, while_trips, expert_shards) for branch in params["branches"])
    if name == "while" and (blocks := BLOCK_LOOP.search(str(equation.source_info.name_stack))):
        num_rows, block = map(int, blocks.groups())
        return num_rows * _count(_open(params["body_jaxpr"]), while_trips) // (block * expert_shards)
    repeats = _repeats(name, params, while_trips)
    if name == "shard_map":
        expert_shards = num_expert_shards(params["mesh"])
    inner = [_open(value) for value in params.values() if isinstance(value, ClosedJaxpr | Jaxpr)]
    return repeats * sum(_count(program, while_trips, expert_shards) for program in inner)


def _repeats(name: str, params: dict, while_trips: Iterator[int]) -> int:
    """Returns how often an operation runs its inner program: per loop step, block, or device."""
    if name == "scan":
        return params["length"]
    if name == "while":
        return next(while_trips)
    if name == "pallas_call":
        return math.prod(size for size in params["grid_mapping"].grid if isinstance(size, int))
    if name == "shard_map":
        return params["mesh"].size
    return 1


def _open(program: ClosedJaxpr | Jaxpr) -> Jaxpr:
    return program.jaxpr if isinstance(program, ClosedJaxpr) else program


def _of_cudnn(equation, num_products: int) -> int:
    """Counts cuDNN's attention, which skips the half of each product above the diagonal.

    Queries are [B, T, N, H], keys [B, S, K, H].
    """
    (batch, length, num_heads, head_size), (_, num_keys, _, _) = (operand.aval.shape for operand in equation.invars[:2])
    return num_products * batch * num_heads * length * num_keys * head_size


def _of_product(equation) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left: core.ShapedArray = equation.invars[0].aval
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left.shape[axis] for axis in contracted)
