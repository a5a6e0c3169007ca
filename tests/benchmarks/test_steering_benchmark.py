"""The steering study: its methods are configs that can be run, and its tables say what made-up cells hold, and what is
missing.
"""

import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.steering.__main__ import chosen_rates, run_cells
from benchmarks.steering.cells import Clock, rounds_of, start_folder
from benchmarks.steering.methods import (
    FAMILIES,
    GROUPS,
    METHODS,
    RATES,
    STUDIES,
    Cell,
    cell_config,
    cells_of_study,
    choosing_cells,
)
from benchmarks.steering.tables import MATCHED_QUALITY, rates_table, spread, study_tables, write_figure
from sso_jax.recipes import RECIPES
from sso_jax.toy import pretraining


def finish(folder: Path, name: str, numbers: dict) -> None:
    (folder / "done").mkdir(parents=True, exist_ok=True)
    (folder / "done" / f"{name}.json").write_text(json.dumps(numbers))


def row(quality: float, accuracy: float = 0.8) -> dict:
    parts = dict.fromkeys(("truth", "completeness", "politeness", "concision"), quality)
    pairs = {
        "pair_accuracy": accuracy,
        "pair_ties": 0.1,
        "chosen_probability": 0.6,
        "rejected_probability": 0.5,
        "steerability": 0.3,
    }
    return {
        "policy_quality": quality,
        "quality_parts": parts,
        "held_out_tokens": 9.0,
        "response_tokens": 11.0,
        "num_pairs": 100,
        **pairs,
    }


def fill(root: Path, cell: Cell, qualities: list[float], accuracies: list[float]) -> None:
    """A cell whose rounds end with these qualities, from a start of 0.5."""
    finish(start_folder(root, cell) / "iteration_0", "evaluation", row(0.5))
    for k, (quality, accuracy) in enumerate(zip(qualities, accuracies, strict=True), start=1):
        finish(root / cell.name / f"iteration_{k}", "round", row(quality, accuracy))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_a_config_that_its_recipe_takes(method, tmp_path):
    config = cell_config(Cell("main", method, 1, 3, 64), 1e-4, tmp_path)
    assert sum(map(len, RECIPES[config.recipe].read(config).rounds)) >= 3 * 64
    assert config.optimizer.learning_rate == 1e-4 and METHODS[method].family in FAMILIES


def test_studies_have_every_method_once_a_seed():
    cells = cells_of_study("main", [1, 2, 3], 64)
    assert sorted(cell.method for cell in cells if cell.seed == 2) == sorted(METHODS) == sorted(sum(GROUPS, ()))
    for study in STUDIES:
        assert len({cell.name for cell in cells_of_study(study, [1, 2], 64)}) == len(cells_of_study(study, [1, 2], 64))


def test_cells_of_study_length_lie_apart_from_those_of_the_world_without_descriptions(tmp_path):
    cells = cells_of_study("length", [1, 2, 3], 128)
    assert Counter(cell.seed for cell in cells) == {1: 7, 2: 7, 3: 7} and {cell.iterations for cell in cells} == {5}
    assert cells[0].name == "length/pbaa_dpo_queries_128/seed_1"
    assert {start_folder(tmp_path, cell).name for cell in cells} == {f"start_{seed}_descriptions" for seed in (1, 2, 3)}
    config = cell_config(cells[0], 1e-4, tmp_path)
    assert config.toy.descriptions and config.sampling.max_new_tokens == 64
    groups = {query.id.split("-")[0] for query in RECIPES["online"].read(config).rounds[0]}
    assert "description" in groups and len(groups) == 11


def test_finished_cells_keep_their_names(tmp_path):
    names = {cell.name for study in ("main", "endurance", "data", "larger") for cell in cells_of_study(study, [1], 128)}
    assert {"main/v1_dpo_queries_128/seed_1", "endurance/v2_queries_96/seed_1", "larger/v2_queries_128/seed_1"} < names
    assert choosing_cells(128)[0].name == "rates/pbaa_ipo_queries_128_rate_0.0001/seed_0"
    starts = {
        start_folder(tmp_path, cells_of_study(study, [1], 128)[0]).name
        for study in ("main", "endurance", "data", "larger")
    }
    assert starts == {"start_1", "start_1_width_128"}
    config = cell_config(cells_of_study("main", [1], 128)[0], 1e-4, tmp_path)
    assert not config.toy.descriptions and config.sampling.max_new_tokens == 48


def test_a_cell_is_run_once_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    small = pretraining.Curriculum(fact_updates=4, style_updates=6, batch_size=8, width=32, num_layers=1)
    monkeypatch.setattr(pretraining, "Curriculum", lambda **_: small)
    cell = Cell("larger", "v1_dpo", 1, 2, 8, width=128)

    def run(clock=Clock(None)):
        return run_cells(tmp_path, [cell], {"v1_dpo": 1e-4}, 6, clock)

    run(Clock(0.0))
    assert rounds_of(tmp_path, cell) is None and not (tmp_path / cell.name).exists()
    run()
    rows = rounds_of(tmp_path, cell)
    assert len(rows) == 3 and all(0 <= row["policy_quality"] <= 1 and set(row["quality_parts"]) for row in rows)
    second = tmp_path / cell.name / "iteration_2" / "done"
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / cell.name).rglob("*.json")}
    run()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / cell.name).rglob("*.json")} == written
    (second / "round.json").unlink()
    run()
    again = {path: path.stat().st_mtime_ns for path in (tmp_path / cell.name).rglob("*.json")}
    assert {path for path in written if again[path] != written[path]} == {second / "round.json"}
    assert rounds_of(tmp_path, cell) == rows
    line = next(
        line for line in study_tables(tmp_path, "larger", [cell]).splitlines() if line.startswith("| SSO v1, DPO")
    )
    shown = [entry.strip() for entry in line.split("|")[2:]]
    assert shown[:4] == ["1", *(f"{row['policy_quality']:.3f}" for row in rows)], line


def test_a_rate_is_chosen_when_all_were_tried(tmp_path):
    cells = choosing_cells(64)
    assert {cell.seed for cell in cells} == {0}
    for cell in cells:
        if cell.method == "v2" or (cell.method == "v1_dpo" and cell.rate != RATES[0]):
            last = {RATES[0]: 0.6, RATES[1]: 0.8, RATES[2]: 0.7, RATES[3]: 0.65}[cell.rate]
            fill(tmp_path, cell, [0.7, 0.9 - last / 10, last], [1] * 3)
    rates = chosen_rates(tmp_path, cells)
    assert rates == {"v2": RATES[1]}
    table = rates_table(tmp_path, cells, rates)
    assert "none yet" in table and "0.800" in table


def test_tables_by_hand(tmp_path):
    """PBAA over two seeds ends at 0.7 and 0.8: 0.750 with a sample deviation of 0.0707; v1 is above it by 0.02 and
    below by 0.04.
    """
    cells = [Cell("main", method, seed, 2, 64) for seed in (1, 2) for method in ("pbaa_dpo", "v1_dpo", "v2")]
    ends = {("pbaa_dpo", 1): 0.7, ("pbaa_dpo", 2): 0.8, ("v1_dpo", 1): 0.72, ("v1_dpo", 2): 0.76}
    for cell in cells:
        if (end := ends.get((cell.method, cell.seed))) is not None:
            fill(tmp_path, cell, [0.6, end], [0.9, 0.7])
    text = study_tables(tmp_path, "main", cells)
    assert "PARTIAL: 4 of 6 cells are done; missing (method/queries/seed): v2/64/1, v2/64/2." in text
    assert "0.750 ± 0.071" in text and "-0.010 ± 0.042 (1 of 2 above)" in text
    lines = [[entry.strip() for entry in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["PBAA, DPO", "truth", "0.50 ± 0.00", "0.60 ± 0.00", "0.75 ± 0.07"] in lines
    assert ["SSO v1, DPO", "pair accuracy", "0.80 ± 0.00", "0.90 ± 0.00", "0.70 ± 0.00"] in lines
    assert "Nothing to show" in study_tables(tmp_path, "main", cells[2:3])
    assert rounds_of(tmp_path, cells[2]) is None
    write_figure(tmp_path, "main", cells)
    assert (tmp_path / "main.svg").stat().st_size > 1000


def test_length_tables_by_hand(tmp_path):
    """Descriptions of 20 and 24 tokens after the last round over two seeds: 22.0 with a sample deviation of 2.83."""
    cells = [Cell("length", "pbaa_dpo", seed, 1, 64, descriptions=True) for seed in (1, 2)]
    for cell, tokens in zip(cells, (20.0, 24.0), strict=True):
        groups = {
            group: {"quality": 0.5, "tokens": tokens, "at_limit": 0.25} for group in ("all", "descriptions", "others")
        }
        pairs = {group: {"chosen": 31.0, "rejected": 13.0} for group in groups}
        numbers = {**row(0.5), "held_out_groups": groups}
        numbers["quality_parts"] |= {"length": 0.6, "substance": 0.4}
        finish(start_folder(tmp_path, cell) / "iteration_0", "evaluation", numbers)
        finish(tmp_path / cell.name / "iteration_1", "round", {**numbers, "pair_tokens": pairs})
    text = study_tables(tmp_path, "length", cells)
    after = text.split("### Tokens of held-out answers")[1].split("###")[0]
    assert "| PBAA, DPO | descriptions | 22.0 ± 2.8 | 22.0 ± 2.8  |" in after
    assert (
        "| PBAA, DPO | others       | -     | 13.0 ± 0.0  |"
        in text.split("### Tokens of the rejected")[1].split("###")[0]
    )
    assert "0.400" in text.split("### Share of a description's")[1]
    write_figure(tmp_path, "length", cells)
    assert (tmp_path / "length.svg").stat().st_size > 1000


def test_pairs_at_matched_quality_are_those_of_the_policy_that_samples_them(tmp_path):
    """Qualities 0.5 (start), 0.6, 0.7; the pairs of rounds 2 and 3 are of the policies at 0.6 and 0.7, so at 0.65
    halfway between.
    """
    cell = Cell("main", "pbaa_dpo", 1, 3, 64)
    fill(tmp_path, cell, [0.6, 0.7, 0.75], [0.9, 0.8, 0.6])
    assert MATCHED_QUALITY == 0.65
    assert "| PBAA, DPO | 1     | 0.70 " in study_tables(tmp_path, "main", [cell])


def test_spread_is_mean_and_sample_deviation():
    assert (
        spread([1.0, 2.0, 3.0]) == "2.000 ± 1.000" and spread([0.5]) == "0.500" and spread([]) == "-" == spread([None])
    )
