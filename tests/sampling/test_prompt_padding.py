"""What rounds pad their prompts to: kept from round to round, the same again where a round is done again."""

import pytest

from sso_jax.data.buckets import bucket
from sso_jax.sampling.prompt_padding import MOST_WASTE, PADDING_FILE, open_prompt_padding


def padded(run, iteration, lengths, kind="0+48"):
    """What a round pads batches of these lengths to."""
    slots = open_prompt_padding(run / f"iteration_{iteration - 1}", run / f"iteration_{iteration}")
    return [slots(length, kind) for length in lengths]


def test_a_later_round_pads_to_lengths_of_earlier_ones_where_they_fit(tmp_path):
    assert padded(tmp_path, 0, [30, 60, 90]) == [32, 64, 96]
    assert padded(tmp_path, 1, [33, 62, 95, 50]) == [64, 64, 96, 64]  # buckets of 48, 64, 96, 64
    assert padded(tmp_path, 2, [17]) == [32]


def test_a_new_length_has_room_to_spare_and_a_short_batch_is_not_padded_without_end(tmp_path):
    assert padded(tmp_path, 1, [94]) == [128]  # 94 * 1.0625 is above 96
    assert padded(tmp_path, 2, [97, 30]) == [128, 32] and MOST_WASTE * bucket(30) < 128


def test_a_round_done_again_pads_alike_whatever_came_after_it(tmp_path):
    lengths = [60, 33, 94, 20]
    rounds = {k: padded(tmp_path, k, [length + 9 * k for length in lengths]) for k in range(4)}
    for k in (2, 0, 3, 1):
        assert padded(tmp_path, k, [length + 9 * k for length in lengths]) == rounds[k]


def test_programs_of_another_kind_have_lengths_of_their_own(tmp_path):
    assert padded(tmp_path, 1, [100]) == [128]
    assert padded(tmp_path, 2, [70], kind="0+24") == [96] and padded(tmp_path, 2, [70]) == [128]


@pytest.mark.parametrize("content", ["", "{", '{"0+48": [12'])
def test_a_damaged_file_costs_a_program_and_nothing_else(tmp_path, content):
    padded(tmp_path, 1, [100])
    (tmp_path / "iteration_1" / PADDING_FILE).write_text(content)
    assert padded(tmp_path, 2, [70]) == [96]
