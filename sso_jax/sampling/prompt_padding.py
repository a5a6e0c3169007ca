"""Lengths of prompts in, lengths to pad them to out: those of earlier rounds where they fit, so that nothing is
compiled again.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from sso_jax.data.buckets import bucket
from sso_jax.runtime.files import write_text
from sso_jax.runtime.hosts import on_first_process

PADDING_FILE = "prompt_slots.json"
HEADROOM, MOST_WASTE = 0.0625, 2
"""How much longer a batch's longest prompt may get before it is padded to another length, and how many times its bucket
that may be."""


def with_headroom(length: int) -> int:
    """What prompts of a length not met before are padded to."""
    return bucket(math.ceil(length * (1 + HEADROOM)))


@dataclass
class RoundPadding:
    """What a round pads prompts to. It follows from what the rounds before it left: a round that is resumed pads to the
    same.
    """

    folder: Path
    """Of the round."""
    earlier: dict[str, list[int]] = field(default_factory=dict)
    """Lengths in use before this round, by what else a program depends on (shared prefix and budget of tokens)."""
    known: dict[str, list[int]] = field(default_factory=dict)
    """Those and the ones that this round added, as the file in its folder has them for the round after it."""

    def __call__(self, length: int, kind: str) -> int:
        """The least length of earlier rounds that holds `length` and is at most MOST_WASTE buckets, or a new one with
        room to spare.
        """
        fitting = [slots for slots in self.earlier.get(kind, []) if length <= slots <= MOST_WASTE * bucket(length)]
        slots = min(fitting, default=with_headroom(length))
        if slots not in self.known.setdefault(kind, []):
            self.known[kind].append(slots)
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(json.dumps(self.known), self.folder / PADDING_FILE)
        return slots


def open_prompt_padding(before: Path, folder: Path) -> RoundPadding:
    """The slots of the round of `folder`; `before` is the folder of the round before it."""
    earlier, own = (
        on_first_process(lambda: _read(before / PADDING_FILE)),
        on_first_process(lambda: _read(folder / PADDING_FILE)),
    )
    known = {kind: list(dict.fromkeys([*earlier.get(kind, []), *own.get(kind, [])])) for kind in [*earlier, *own]}
    return RoundPadding(folder, earlier, known)


def _read(path: Path) -> dict[str, list[int]]:
    """A damaged file is as none: what it costs is a compilation."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        return {}
