"""What a compiled TPU program sends from slice to slice, read from its text.

XLA compiles a program of several slices for one of them. Where devices of other slices are needed, it has a `send` to
the runtime that joins them (Megascale), which names the collective.
"""

import math
import re
from typing import NamedTuple

import jax

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_BODY = re.compile(r" while\(.*body=%?([\w.\-]+)")
_SEND = re.compile(r"= \((\w+)\[([\d,]*)\].* send\(.*_xla_megascale_transfer_type=\"(\w+)\"")


class Transfers(NamedTuple):
    """Collectives of one kind between slices, in one place of a program."""

    kind: str
    """As XLA names it: ALL_REDUCE, ALL_GATHER, ..."""
    depth: int
    """Number of loops around them: 1 in an update's loop over device steps, 2 in the loop over layers within."""
    count: int
    num_bytes: int
    """Bytes that a chip gives to them each time."""


def between_slices(program: str) -> list[Transfers]:
    """Returns the collectives between slices in the text of a compiled program, by kind and depth.

    Example: a line `%s = (f32[2,3], u32[], token[]) send(...)` of type ALL_REDUCE in the body of a loop is
    `Transfers("ALL_REDUCE", 1, 1, 24)`.
    """
    inside: dict[str, str] = {}
    sends: list[tuple[str, str, int]] = []
    computation = ""
    for line in program.splitlines():
        if head := _HEAD.match(line):
            computation = head[2]
        elif loop := _BODY.search(line):
            inside[loop[1]] = computation
        elif send := _SEND.search(line):
            numbers = math.prod(int(size) for size in send[2].split(",") if size)
            sends.append((computation, send[3], numbers * BYTES[send[1]]))
    found: dict[tuple[str, int], list[int]] = {}
    for computation, kind, num_bytes in sends:
        found.setdefault((kind, _depth(computation, inside)), []).append(num_bytes)
    return [Transfers(*key, len(sizes), sum(sizes)) for key, sizes in sorted(found.items())]


def transfers_of(executable: jax.stages.Compiled, mesh: jax.sharding.Mesh) -> list[Transfers] | None:
    """Returns `between_slices` of a program; None on a single slice, and where XLA cannot print the program.

    libtpu 0.0.52 fails to print some large programs (`RET_CHECK failure`).
    """
    if len({getattr(device, "slice_index", 0) for device in mesh.devices.flat}) == 1:
        return None
    try:
        return between_slices(executable.as_text() or "")
    except jax.errors.JaxRuntimeError:
        return None


def _depth(computation: str, inside: dict[str, str]) -> int:
    return 1 + _depth(inside[computation], inside) if computation in inside else 0
