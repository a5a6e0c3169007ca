"""Finds the largest `sampling.batch_size` that fits the chips: from compiled sizes by arithmetic, then by compiling."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sso_jax.commands.programs import GIB, Plan, Program, sampling_shape
from sso_jax.data.records import RESPONSES
from sso_jax.runtime.mesh import num_batch_shards

PROGRAMS = ("prefill", "decode")
USED_SHARE = 0.95
"""Share of a chip's memory that slots are proposed for: the compiler keeps up to 4% of it for itself."""
MOST_COMPILED = 5
"""Most numbers of slots that are compiled, besides the configured one."""


class Tried(NamedTuple):
    """What compiling a number of slots gave."""

    num_slots: int
    num_pages: int
    programs: Sequence[Program]
    """Those of `PROGRAMS`, in that order."""

    def fits(self, device_bytes: int) -> bool:
        """Returns whether both programs fit the share of a chip's memory that is to be used."""
        return all(p.fits and p.total_bytes <= USED_SHARE * device_bytes for p in self.programs)


class FittingSlots(NamedTuple):
    """The largest number of slots that was compiled and fits; None if none was."""

    best: Tried | None
    num_responses: int
    """Responses of a round: with as many slots none is filled again, so that no more are proposed."""


def with_slots(plan: Plan, num_slots: int) -> Plan:
    """Returns the plan of the same run with another number of slots."""
    sampling = dataclasses.replace(plan.config.sampling, batch_size=num_slots)
    return dataclasses.replace(plan, config=dataclasses.replace(plan.config, sampling=sampling))


def find_slots(plan: Plan, programs: Sequence[Program], compile_at: Callable[[int], Sequence[Program]]) -> FittingSlots:
    """Returns the largest number of slots with which the programs of `PROGRAMS` fit a chip.

    Bytes are nearly linear in the pages of the cache, of which there are few different numbers (`pool_shape`): a line
    through what has been compiled says which number should fit; that is compiled, until the line says nothing new.

    Args:
      plan: what to compile.
      programs: those of `PROGRAMS` at `sampling.batch_size`.
      compile_at: compiles them for a number of slots.
    """
    shape = sampling_shape(plan)
    num_responses = len(RESPONSES) * plan.config.queries.per_iteration
    fitting: list[Tried] = []
    failing: list[Tried] = []

    def add(num_slots: int, programs: Sequence[Program]) -> None:
        one = Tried(num_slots, sampling_shape(with_slots(plan, num_slots)).num_pages, programs)
        (fitting if one.fits(plan.device_bytes) else failing).append(one)

    add(shape.num_slots, programs)
    for _ in range(MOST_COMPILED):
        num_slots = _predict(plan, fitting, failing, num_responses)
        if num_slots <= max((one.num_slots for one in fitting), default=0):
            break
        add(num_slots, compile_at(num_slots))
    return FittingSlots(max(fitting, key=lambda one: one.num_slots, default=None), num_responses)


def _predict(plan: Plan, fitting: Sequence[Tried], failing: Sequence[Tried], most: int) -> int:
    """Returns the largest number of slots up to `most` that should fit, a multiple of the shards; 0 for none."""
    shards = num_batch_shards(plan.sampling.mesh)
    num_pages = min((one.num_pages for one in failing), default=None)
    low, high = 0, -(-most // shards)  # in slots of a shard; pages grow with them
    while low < high:
        middle = (low + high + 1) // 2
        pages = sampling_shape(with_slots(plan, middle * shards)).num_pages
        fits = _bytes_at(pages, fitting, failing) <= USED_SHARE * plan.device_bytes
        low, high = (middle, high) if fits and (num_pages is None or pages < num_pages) else (low, middle - 1)
    return low * shards


def _bytes_at(num_pages: int, fitting: Sequence[Tried], failing: Sequence[Tried]) -> float:
    """Returns the bytes that the larger program should need with so many pages.

    With one number of pages that fits, the cache alone is taken to grow, which is no more than it does: a larger number
    is tried before none is said to fit. With none that fits, all but the parameters is taken to shrink.
    """
    known = {one.num_pages: one.programs for one in fitting}
    if not known:
        smallest = min(failing, key=lambda one: one.num_pages)
        ratio = num_pages / smallest.num_pages
        return max(p.params_bytes + ratio * (p.total_bytes - p.params_bytes) for p in smallest.programs)
    first, *others = sorted(known, key=lambda pages: abs(pages - num_pages))
    if not others:
        return max(p.total_bytes + (num_pages / first - 1) * p.cache_bytes for p in known[first])
    ratio = (num_pages - first) / (others[0] - first)
    pairs = zip(known[first], known[others[0]], strict=True)
    return max(own.total_bytes + ratio * (other.total_bytes - own.total_bytes) for own, other in pairs)


def describe(found: FittingSlots, plan: Plan) -> str:
    """Says how many slots fit, and what to do if those of the config are too many or far fewer."""
    now = plan.config.sampling.batch_size
    if found.best is None:
        return (
            f"sampling.batch_size: no number of slots was found that fits {USED_SHARE:.0%} of a chip (now {now}); take "
            f"more chips than {plan.training.mesh.size}, or lower sampling.max_new_tokens"
        )
    best = found.best.num_slots
    sizes = ", ".join(
        f"{name} {p.total_bytes / GIB:.2f}" for name, p in zip(PROGRAMS, found.best.programs, strict=True)
    )
    line = (
        f"sampling.batch_size: at most {best} slots fit {USED_SHARE:.0%} of a chip ({sizes} GiB, compiled); now {now}"
    )
    if best >= found.num_responses:
        line += f"; a round has no more than {found.num_responses} responses"
    if best < now:
        return f"{line}, lower it"
    return line if best < 2 * now else f"{line}, raise it to sample more responses in a decode step"
