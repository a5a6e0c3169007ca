"""Chooses the lengths that prompts are padded to; reuses those of earlier rounds, so that nothing is recompiled."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from sso_jax.data.buckets import bucket
from sso_jax.runtime.files import write_text
from sso_jax.runtime.hosts import on_first_process

PADDING_FILE = "prompt_slots.json"
HEADROOM, MOST_WASTE = 0.0625, 2
"""Share that is added to a new padded length, and most times its bucket that a batch's longest prompt is padded to."""


def with_headroom(length: int) -> int:
    """Returns the padded length for prompts of a new length."""
    return bucket(math.ceil(length * (1 + HEADROOM)))


@dataclass
class RoundPadding:
    """Padded lengths of a round.

    They depend only on those of earlier rounds and the prompts so far: a resumed round pads to the same lengths.
    """

    folder: Path
    """Folder of the round."""
    earlier: dict[str, list[int]] = field(default_factory=dict)
    """Lengths used before this round, by what else a program depends on (shared prefix and token budget)."""
    known: dict[str, list[int]] = field(default_factory=dict)
    """Those lengths and the ones added in this round, as stored in the round's folder for the next round."""

    def __call__(self, length: int, kind: str) -> int:
        """Returns the shortest earlier length that holds `length` within MOST_WASTE buckets, or a new one."""
        fitting = [slots for slots in self.earlier.get(kind, []) if length <= slots <= MOST_WASTE * bucket(length)]
        slots = min(fitting, default=with_headroom(length))
        if slots not in self.known.setdefault(kind, []):
            self.known[kind].append(slots)
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(json.dumps(self.known), self.folder / PADDING_FILE)
        return slots


def open_prompt_padding(before: Path, folder: Path) -> RoundPadding:
    """Opens the padding of the round in `folder`; `before` is the folder of the previous round."""
    earlier = on_first_process(lambda: _read(before / PADDING_FILE))
    own = on_first_process(lambda: _read(folder / PADDING_FILE))
    known = {kind: list(dict.fromkeys([*earlier.get(kind, []), *own.get(kind, [])])) for kind in [*earlier, *own]}
    return RoundPadding(folder, earlier, known)


def _read(path: Path) -> dict[str, list[int]]:
    """Reads stored lengths; a damaged file counts as missing, because it only costs a compilation."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        return {}
