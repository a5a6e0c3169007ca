"""benchmarks.speed: its arithmetic held to hand counts, the traced update held to its arithmetic, and what it makes of
measurements.
"""

import argparse
import dataclasses
import sys

import jax
import pytest
from flax import linen as nn

from benchmarks.speed import __main__ as main
from benchmarks.speed import machine, shapes
from benchmarks.speed.__main__ import figures, in_turns
from benchmarks.speed.ours import make_model, make_update_parts, traced
from sso_jax.models.transformer import abstract_params


def test_the_model_is_the_one_of_the_issue():
    shape = shapes.CPU
    model, _ = make_model(shape)
    entries = sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(abstract_params(model))))
    assert round(entries / 1e6, 1) == 56.9
    assert abs(entries - shape.num_params) < 20_000  # norms and biases


def test_needed_operations_are_the_hand_count():
    """6,144 tokens through 7 layers of 3.0M entries and the keys and values of the last, 3,072 through its rest and the
    head's 16.4M, four times two; in rows of their own 9,216 through all. A response's first token is predicted from the
    256th of the prompt, its last from the one before it.
    """
    layer, keys_and_values, head = 512 * (2 * 512 + 2 * 128) + 3 * 512 * 1536, 2 * 512 * 128, 512 * 32000
    visible = 256 * 257 // 2 + 2 * (128 * 256 + 128 * 129 // 2)
    by_sources = 2 * sum(range(256, 256 + 128))
    attention = 12 * (7 * visible + by_sources) * 2 * 512
    products = 6144 * (7 * layer + keys_and_values) + 3072 * (layer - keys_and_values + head)
    needed = shapes.needed_update_flops(shapes.CPU)
    assert needed["shared"] == 8 * (products + attention)
    assert needed["releases"] == 8 * (9216 * (8 * layer + head) + 24 * (384 * 385 // 2) * 8 * 2 * 512)
    assert round(8 * products / 1e12, 2) == 1.52 and round(8 * 9216 * (8 * layer + head) / 1e12, 2) == 2.99


def test_frozen_weights_need_three_passes_and_their_adapters_four():
    """Of rank 4: two projections of 512 to 512, two of 512 to 128, three of 512 and 1536, each with a matrix at both
    ends.
    """
    adapted = dataclasses.replace(shapes.CPU, adapter_rank=4)
    layer, keys_and_values, head = 512 * (2 * 512 + 2 * 128) + 3 * 512 * 1536, 2 * 512 * 128, 512 * 32000
    of_adapters, of_their_keys_and_values = 4 * (2 * 1024 + 2 * 640 + 3 * 2048), 4 * 2 * 640
    frozen = 6144 * (7 * layer + keys_and_values) + 3072 * (layer - keys_and_values + head)
    trained = 6144 * (7 * of_adapters + of_their_keys_and_values) + 3072 * (of_adapters - of_their_keys_and_values)
    expected = (
        shapes.needed_update_flops(shapes.CPU)["shared"] - 2 * frozen + 8 * trained
    )  # of four passes, two operations each, one less
    assert shapes.needed_update_flops(adapted)["shared"] == expected
    assert adapted.adapter_params == 8 * of_adapters


def test_the_traced_update_runs_little_more_than_it_must():
    """Within 1.15: what is above it are logits computed anew in the backward pass, and the corners of attention's
    blocks.
    """
    counted = traced(make_update_parts(shapes.CPU, jax.devices()[:1]))
    assert 1.0 <= counted["flops"] / shapes.needed_update_flops(shapes.CPU)["shared"] <= 1.15
    assert counted["padding"] == 0.0


def test_figures_are_medians_ratios_and_fractions_of_the_bound():
    options = argparse.Namespace(tiny=False)
    seconds = {
        "ours/sample": [2.0, 1.0, 9.0],
        "transformers/sample": [4.0, 4.0, 4.0],
        "ours/update": [5.0],
        "transformers/update": [20.0],
    }
    cells = {name: {"first": 10.0, "seconds": own, "host_peak_bytes": 100} for name, own in seconds.items()}
    cells["ours/update"] |= {"flops": 2e12, "padding": 0.0}
    cells["ours/sample"] |= {"decode_seconds": [1.0, 0.5, 2.0]}
    cells["machine"] = {"flops": 3e11, "read_bytes": 2e10, "copy_bytes": 2e10}
    cells["transformers/sample"]["beside"] = [1.0, 1.0, 4.0]  # what ours took in turn with it
    cells["transformers/update"]["beside"] = [5.0]
    made = figures("57m", cells, options)
    assert made["generate_tok_s"] == 16 * 64 / 2.0 and made["sso_examples_s"] == 4 / 5.0
    assert (
        made["rows"]["transformers/sample"]["ours_over_it"] == 4.0
        and made["rows"]["transformers/update"]["ours_over_it"] == 4.0
    )
    assert made["rows"]["ours/sample"]["ours_over_it"] == 1.0
    assert made["rows"]["ours/update"]["of_bound"] == pytest.approx(
        shapes.needed_update_flops(shapes.CPU)["shared"] / 3e11 / 5.0
    )
    # 63 steps read 24.1M and 16.4M entries of 4 bytes; each of 16 rows 2 x 8 x 2 x 64 entries of the 129th to the 191st
    # token
    weights, tokens = 4 * (shapes.CPU.layer_params + shapes.CPU.head_params), 63 * (129 + 191) // 2
    assert made["decode_bytes_s"] == (63 * weights + 16 * tokens * 2 * 8 * 2 * 64 * 4) / 1.0
    assert made["compile_s"] == 8.0 + 5.0 and made["peak_bytes"] == 100


def test_a_cell_that_runs_out_of_memory_is_reported_and_the_others_are_measured(monkeypatch, capsys):
    of = {
        "machine": {"flops": 3e11, "read_bytes": 2e10, "copy_bytes": 2e10},
        "ours/update": {"out_of_memory": True, "host_peak_bytes": 1},
    }
    of["transformers/update"] = {"first": 9.0, "seconds": [4.0], "host_peak_bytes": 100}
    of["transformers/machine"] = {"flops": 1e11, "host_peak_bytes": 100}
    monkeypatch.setattr(main, "in_turns", lambda commands: {cell: dict(of[cell]) for cell in commands})
    options = argparse.Namespace(
        tiny=False, device="cpu", work=["update"], peers=["transformers"], tunix_python="", repeats=1, profile=None
    )
    made = figures("57m", main.measure("57m", options), options)
    assert made["out_of_memory"] == ["ours/update"] and list(made["rows"]) == ["transformers/update"]
    assert made["rows"]["transformers/update"]["ours_over_it"] is None and "sso_examples_s" not in made
    main.show(made)
    shown = capsys.readouterr().out
    assert (
        "| ours/update | out of memory |" in shown
        and "300 GFLOP/s" in shown
        and "PyTorch's products 100 GFLOP/s" in shown
    )


def test_cells_take_turns_call_by_call(tmp_path):
    """Two processes write their names into one file at each call: never two of one of them in a row while both have
    calls left.
    """
    code = """
import json, sys, time
from benchmarks.speed.timing import timed
name, repeats, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
def work():
    open(path, "a").write(name + "<")
    time.sleep(0.05)
    open(path, "a").write(">")
print("something else")
print(json.dumps(timed(work, repeats)))
"""
    calls = tmp_path / "calls"
    found = in_turns(
        {name: [sys.executable, "-c", code, name, str(repeats), str(calls)] for name, repeats in (("a", 3), ("b", 1))}
    )
    assert calls.read_text() == "a<>b<>a<>b<>a<>a<>"
    assert len(found["a"]["seconds"]) == 3 and len(found["b"]["seconds"]) == 1 and found["a"]["first"] >= 0.05


def test_a_cell_that_fails_ends_all(tmp_path):
    waits, fails = "from benchmarks.speed.timing import timed; timed(print, 3)", "raise ValueError"
    with pytest.raises(SystemExit, match="failed with exit status 1"):
        in_turns({"a": [sys.executable, "-c", waits], "b": [sys.executable, "-c", fails]})


def test_a_device_that_is_not_there_is_refused():
    machine.require("cpu")
    with pytest.raises(SystemExit, match="--device gpu: JAX computes on cpu here"):
        machine.require("gpu")


def test_peers_that_would_train_something_else_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["speed", "--device", "gpu", "--peers", "transformers"])
    with pytest.raises(SystemExit, match="peers train all weights, but shape 7b trains adapters"):
        main.main()
