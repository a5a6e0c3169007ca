"""benchmarks.ragged.slots: its simulation is held to the stage that it stands for, and its share to a hand count."""

import json

import jax
import numpy as np
import pytest

from benchmarks.ragged import order as orders
from benchmarks.ragged import slots as simulation
from benchmarks.ragged.slots import Device, count, simulate
from sso_jax.sampling.decode import Drawn
from sso_jax.sampling.prefill import FirstTokens
from sso_jax.sampling.slots import WINDOW, PoolShape, Size, Slots, queue_order
from sso_jax.sampling.stage import Request, Stage

PAGE = 64


class NoModel:
    """Programs of a stage without a model: the response to a request of key (i, 0) has `lengths[i]` tokens."""

    def __init__(self, lengths):
        self.lengths, self.of_slot, self.num_windows = lengths, {}, 0

    def start(self, shape):
        return None

    def admit(self, weights, state, prompts, *settings):
        requests = np.asarray(prompts.keys)[:, 0]
        self.of_slot |= dict(zip(np.asarray(prompts.slots).tolist(), requests.tolist(), strict=True))
        done = np.asarray([self.lengths[i] == 1 for i in requests])
        return state, FirstTokens(np.full(len(requests), 7, np.int32), done)

    def window(self, weights, state, inputs, *settings):
        self.num_windows += 1
        counts, done = np.zeros(len(inputs.live), np.int32), np.ones(len(inputs.live), bool)
        for slot in np.flatnonzero(np.asarray(inputs.live)).tolist():
            left = self.lengths[self.of_slot[slot]] - int(inputs.counts[slot])
            counts[slot], done[slot] = np.clip(left, 0, WINDOW), left <= WINDOW
        return state, Drawn(np.full((len(done), WINDOW), 7, np.int32), counts, done)


def drawn_requests(count, limit):
    """(prompt tokens, response tokens) of log-normal lengths up to a limit."""
    rng = np.random.default_rng(3)
    lengths = np.clip(rng.lognormal(np.log(120), 0.9, count), 1, limit).astype(int).tolist()
    return list(zip(rng.integers(1, 90, count).tolist(), lengths, strict=True))


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("few_pages", [False, True])
def test_a_simulation_runs_the_windows_of_a_stage_and_ends_requests_in_its_order(one_device, lag, few_pages):
    requests, limit = drawn_requests(150, 600), 600
    sizes, lengths = [Size(prompt, limit) for prompt, _ in requests], [length for _, length in requests]
    shape = PoolShape(8, 16 if few_pages else 96, 16, 1, PAGE)
    programs, slots = NoModel(lengths), Slots(sizes, queue_order(sizes), shape)
    asked = [Request([1] * size.prompt_tokens, (i, 0)) for i, size in enumerate(sizes)]
    with jax.set_mesh(one_device):
        stage = Stage(programs, one_device, ({}, {}), asked, slots, ((), np.zeros(1, np.int32)))
        stage._lag = lag
        responses = [item for ended in stage.run() for item in ended.items()]
    windows, again = [], Slots(sizes, queue_order(sizes), shape)
    ended = simulate(again, lengths, lag, lambda: windows.append(None))
    assert sorted((i, len(response)) for i, response in responses) == list(enumerate(lengths))
    assert [i for i, _ in responses] == ended and programs.num_windows == len(windows)
    assert slots.restarts == again.restarts and (slots.restarts > 0) == few_pages


def test_the_share_of_row_steps_is_the_hand_count():
    """Two slots: 33 tokens are two windows, 1 + 3 * 16 = 49 are three. In the queue's order 33 | 49, then 33 | -.

    The windows are (33, 49), (33, 49), (33, 49), (33, -): four of 2 * 16 row-steps, of which 32 + 48 + 32 draw one.
    """
    counts = count([(9, 33), (8, 49), (7, 33)], (2, 1), Device(PAGE, 0))
    assert counts.share_used == pytest.approx(112 / 128)
    assert (counts.windows, counts.drain, counts.restarts) == (4, 2, 0)
    assert count([(9, 33), (8, 49), (7, 33)], (2, 1), Device(PAGE, 0), order=[1, 0, 2]).windows == 4
    assert count([(9, 33)], (1, 1), Device(PAGE, 1)).share_used == pytest.approx(32 / 48)  # its end is seen late


def test_the_table_has_every_policy_of_a_file_and_nine_tenths_of_row_steps(tmp_path, capsys, monkeypatch):
    rng = np.random.default_rng(0)
    rows = [{"prompt": 20, "responses": np.clip(rng.lognormal(5.8, 0.5, 2), 2, 3000).astype(int).tolist()}] * 40
    (path := tmp_path / "lengths.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(simulation, "BATCHES", ((4, 1), (8, 2)))
    simulation.print_slots(str(path), 1200)
    _, _, *lines = capsys.readouterr().out.splitlines()
    cells = [line.split(" | ") for line in lines]
    assert [row[0] for row in cells] == ["| policy 0"] * 2 + ["| policy 1"] * 2
    assert [row[1] for row in cells] == ["4", "8 on 2 shards"] * 2
    assert all(float(row[2].rstrip("%")) > 90 for row in cells)


def test_orders_are_longest_first_by_what_they_name():
    """Means of the roles are 20, 55 and 5: requests 1 and 4 come first by role, the longer prompt before the other."""
    found = orders.queues([(5, [10, 50, 4]), (9, [30, 60, 6])])
    assert found == {
        "prompt": [3, 4, 5, 0, 1, 2],
        "given": [0, 1, 2, 3, 4, 5],
        "role": [4, 1, 3, 0, 5, 2],
        "other": [3, 0, 5, 2, 4, 1],
        "true": [4, 1, 3, 0, 5, 2],
    }


def test_the_true_order_takes_the_fewest_windows_of_ragged_responses(tmp_path, capsys, monkeypatch):
    rng = np.random.default_rng(0)
    rows = [{"prompt": 20, "responses": rng.integers(2, 600, 3).tolist()} for _ in range(20)]
    (path := tmp_path / "lengths.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(orders, "BATCHES", ((16, 1),))
    orders.print_orders(str(path), 90)
    _, _, *lines = capsys.readouterr().out.splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert [row[:2] for row in cells] == [["60", "16"], ["90", "16"]]
    shares = [[float(share.split(" ± ")[0]) for share in row[3:7]] for row in cells]
    assert all(true < min(row) for *row, true in shares)
