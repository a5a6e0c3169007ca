"""benchmarks.scale: its arithmetic held to a hand count, and docs/scale.md to what it prints."""

from pathlib import Path

import pytest

from benchmarks import scale

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scale.md"
CHIP = scale.Chip(flops=1e12, memory=1e9, links=1e8)
SHARES = scale.Shares(update=0.5, memory=0.5, slots=0.8, padding=0.2)
WORK = scale.Work(prompt=100, principle=50, response=100, question=200, answer=20, batch_size=4, host_write=1e9)
MODEL = scale.Model(params=10**9, active=10**9, token_bytes=1000, layer_bytes=1000)


def test_the_stages_are_the_hand_count():
    """Ten queries on 2 chips of 1 TFLOP/s at half of it, so 1e12 operations a second.

    Sampling: 10 * 320 tokens in 10 * 0.8 = 8 a step are 400 steps. In a step each chip reads half of 2e9 bytes of
    weights and 5 * 200 tokens of 1,000 bytes at 0.5e9 a second, 2.002 s, and sends 4 * 10 * 1,000 / 2 bytes; or it
    gathers half of the weights at 1e8 a second, 10 s. Prompts are 10 * 600 tokens of 2e9 operations, 12 s. The trees of
    a query have 300 + 100 + 700 = 1,100 tokens, 11,000 in all, 13,750 with padding: 27.5 s at 2 operations a parameter,
    110 s at 8. Three updates of 10e9 bytes, of which half is another chip's, are 150 s of links. The checkpoint has
    12e9 bytes, the export 2e9.
    """
    split, gathered = (scale.Slice(CHIP, 2, 10, split) for split in (2, None))
    assert scale.sampling(MODEL, split, WORK, 10, SHARES) == (pytest.approx(400 * 2.002 + 12), "memory")
    assert scale.sampling(MODEL, gathered, WORK, 10, SHARES) == (pytest.approx(400 * 10 + 12), "links")
    assert scale.scoring(MODEL, split, WORK, 10, SHARES) == (pytest.approx(27.5), "operations")
    assert scale.update(MODEL, split, WORK, 10, SHARES) == (pytest.approx(150), "links")
    assert scale.update(MODEL, split, WORK._replace(batch_size=10), 10, SHARES) == (pytest.approx(110), "operations")
    assert scale.saving(MODEL, split, WORK) == (pytest.approx(14), "storage")


def test_the_seconds_until_a_stop_are_the_hand_count():
    """A step takes 10 s, or split 2.002 s as above, a window 16 of them; 2 * 16,384 tokens of a device step are
    65.536 s at 2 operations a parameter; an update of 4 queries is 50 s of links.
    """
    found = scale.stops(MODEL, scale.Slice(CHIP, 2, 10, None), WORK, SHARES)
    assert [part.seconds for part in found.values()] == pytest.approx([320, 131.072, 100, 12, 2])
    split = scale.stops(MODEL, scale.Slice(CHIP, 2, 10, 2), WORK, SHARES)
    assert next(iter(split.values())) == (pytest.approx(32 * 2.002), "memory")


def test_the_pages_have_the_tables_that_are_printed():
    assert scale.table(20_000) in PAGE.read_text() and scale.table(1_000_000) in PAGE.read_text()
    assert scale.stops_table() in PAGE.with_name("reliability.md").read_text()
