"""What people get wrong, told in one line on standard error with status 2, before anything is written."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from tokenizers import AddedToken
from toys import toy_model, toy_params
from transformers import AutoTokenizer

import evaluate
import sample
import train
from sso_jax.config import Config, ObjectiveConfig, parse
from sso_jax.models.export import export_policy
from sso_jax.toy.pretraining import train_tokenizer

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
COMMANDS = {"train": train.main, "sample": sample.main, "evaluate": evaluate.main}
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
FILE = "{FILE}"
"""Stands in a case for the path of its file."""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, one_device):
    """A random policy with a real tokenizer and 128 positions."""
    tokenizer = train_tokenizer()
    model = toy_model(vocab_size=1024, num_layers=1)
    folder = tmp_path_factory.mktemp("model") / "policy"
    export_policy(
        toy_params(model, one_device), model.architecture, tokenizer, (tokenizer.eos_token_id,), folder, "float32"
    )
    return folder


@pytest.fixture
def good(model_folder, tmp_path):
    """Arguments of a run that would be accepted, writing under tmp_path/run."""
    queries = tmp_path / "queries.jsonl"
    queries.write_text('{"id": "a", "query": "Spell fox."}\n{"id": "b", "query": "What is 1 plus 1?"}\n')
    return {
        "--model.path": str(model_folder),
        "--queries.path": str(queries),
        "--run.directory": str(tmp_path / "run"),
        "--run.iterations": "1",
    }


def refusal(main, arguments: Sequence[str], capsys) -> str:
    """The one line that a command answers with; fails unless the status is 2."""
    capsys.readouterr()
    status = main(list(arguments))
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith(("train.py", "sample.py", "evaluate.py"))]
    assert status == 2 and out == "" and len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


@dataclass(frozen=True)
class Case:
    """One mistake: what is changed of arguments that are good, and what the line must say."""

    words: tuple[str, ...]
    change: dict[str, str | None] = field(default_factory=dict)
    """Arguments by name; None takes one out."""
    file: tuple[str, str | bytes] | None = None
    """Name and contents of a file, which FILE in an argument stands for."""
    damage: Callable[[Path], object] | None = None
    """What is done to a copy of the model's folder."""
    command: str = "train"
    more: tuple[str, ...] = ()
    """Further arguments as they are."""


def config(words: tuple[str, ...], **fields: str) -> Case:
    """A value on the command line; `__` stands for the dot of a field."""
    return Case(words, {f"--{name.replace('__', '.')}": value for name, value in fields.items()})


def toy(words: tuple[str, ...], **fields: str) -> Case:
    """A value for a run of the toy world, told before its policy is trained."""
    case = config(words, model__path="toy", **fields)
    return Case(case.words, {**case.change, "--queries.path": None})


def config_file(words: tuple[str, ...], text: str | bytes) -> Case:
    return Case(words, {"--config": FILE}, ("c.yaml", text))


def queries(words: tuple[str, ...], text: str | bytes, name: str = "q.jsonl", command: str = "train") -> Case:
    return Case((name, *words), {"--queries.path": FILE}, (name, text), command=command)


def pairs(words: tuple[str, ...], text: str | bytes, name: str = "p.jsonl", **fields: str) -> Case:
    """A file of pairs for recipe offline."""
    recipe = {"--recipe": "offline", "--queries.path": None, "--pairs.path": FILE, "--objective.form": "pairwise"}
    return Case(
        (name, *words),
        {**recipe, **{f"--{field.replace('__', '.')}": value for field, value in fields.items()}},
        (name, text),
    )


def demonstrations(words: tuple[str, ...], text: str | bytes) -> Case:
    change = {"--recipe": "sft", "--queries.path": None, "--demonstrations.path": FILE}
    return Case(("d.jsonl", *words), change, ("d.jsonl", text))


def principles(words: tuple[str, ...], text: str | bytes) -> Case:
    return Case(words, {"--principles.source": "file", "--principles.path": FILE}, ("w.jsonl", text))


def folder(words: tuple[str, ...], damage: Callable[[Path], object]) -> Case:
    return Case(words, damage=damage)


def written(name: str, text: str | bytes) -> Callable[[Path], object]:
    """Damage: a file of the folder holds this."""
    return lambda path: (path / name).write_bytes(text.encode() if isinstance(text, str) else text)


def changed(name: str, **fields) -> Callable[[Path], object]:
    """Damage: a JSON file of the folder has these fields; None takes one out."""

    def damage(path: Path) -> None:
        old = json.loads((path / name).read_text())
        (path / name).write_text(
            json.dumps({key: value for key, value in {**old, **fields}.items() if value is not None})
        )

    return damage


def index_alone(text: str) -> Callable[[Path], object]:
    """Damage: an index that holds this, and no single file of weights, which would go before it."""

    def damage(path: Path) -> None:
        (path / "model.safetensors").unlink()
        (path / "model.safetensors.index.json").write_text(text)

    return damage


def removed(pattern: str) -> Callable[[Path], object]:
    return lambda path: [file.unlink() for file in path.glob(pattern)]


def halved(name: str) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[: (path / name).stat().st_size // 2])


def pickled_only(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    (path / "model.safetensors.index.json").unlink(missing_ok=True)


def token_added(token: str, special: bool = False) -> Callable[[Path], object]:
    """Damage: the tokenizer has a token, id 1024, that the model has no row for."""

    def damage(path: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)], special_tokens=special)
        tokenizer.save_pretrained(path)

    return damage


UNKNOWN = ("needs token '<tool>' (id 1024)", "embedding of 1024 rows")
PAIR = {"id": "1", "query": "q", "chosen": "yes", "rejected": "no"}
STEERED = {**PAIR, "good_system": "g", "bad_system": "b", "original": "perhaps"}


def line(**fields) -> str:
    return json.dumps({name: value for name, value in fields.items() if value is not None}) + "\n"


CASES = {
    # fields of the config, on the command line
    "unknown_field": config(("run.sead", "run.seed"), run__sead="1"),
    "unknown_section": config(("modle.path", "model.path"), modle__path="x"),
    "wrong_type": config(("train.batch_size", "'many'", "give a whole number"), train__batch_size="many"),
    "fraction_for_a_count": config(("train.batch_size", "'2.5'", "give a whole number"), train__batch_size="2.5"),
    "null_for_a_number": config(("train.batch_size", "None", "give a whole number"), train__batch_size="null"),
    "word_for_a_number": config(("sampling.top_p", "'most'", "give a number"), sampling__top_p="most"),
    "word_for_a_count_or_null": config(("top_k", "'all'", "give a whole number, or null"), sampling__top_k="all"),
    "no_truth_value": config(("filter.enabled", "'perhaps'", "give true or false"), filter__enabled="perhaps"),
    "wrong_choice": config(
        ("optimizer.schedule", "'step'", "give one of cosine, linear, wsd, constant"), optimizer__schedule="step"
    ),
    "unknown_recipe": config(("recipe", "'magic'", "one of online, generator, offline"), recipe="magic"),
    "wrong_choice_or_null": config(
        ("matmul_precision", "'low'", "one of default, high, highest, or null"), model__matmul_precision="low"
    ),
    "word_for_a_list": config(("lora.targets", "'query'", "give a list [...] of query, key"), lora__targets="query"),
    "number_for_a_table": config(("sampling.mesh", "'3'", "a table {...} of data, fsdp, tensor"), sampling__mesh="3"),
    "unknown_part_of_a_table": config(("sampling.mesh", "dat is none of them"), sampling__mesh='{"dat": 2}'),
    "word_in_a_table": config(("sampling.mesh", "'data: x'", "data, fsdp, tensor"), sampling__mesh__data="x"),
    "value_for_a_section": config(("sampling", "'hot'", "a section", "--sampling.temperature"), sampling="hot"),
    "unknown_attention": config(("model.attention", "magic", "splash"), model__attention="magic"),
    "unknown_order_of_layers": config(("sampling.layers", "beside", "unrolled"), sampling__layers="beside"),
    "no_logits": config(("model.max_logits", "0", "1 or more"), model__max_logits="0"),
    "top_p_above_one": config(("sampling.top_p", "1.5", "(0, 1]"), sampling__top_p="1.5"),
    "top_p_of_zero": config(("sampling.top_p", "0.0", "(0, 1]"), sampling__top_p="0"),
    "top_k_of_zero": config(("sampling.top_k", "0", "1 or more"), sampling__top_k="0"),
    "negative_temperature": config(("sampling.temperature", "-1"), sampling__temperature="-1"),
    "infinite_temperature": config(("sampling.temperature", "inf"), sampling__temperature=".inf"),
    "learning_rate_that_is_no_number": config(("optimizer.learning_rate", "nan"), optimizer__learning_rate=".nan"),
    "infinite_learning_rate": config(("optimizer.learning_rate", "inf"), optimizer__learning_rate=".inf"),
    "no_iterations": config(("run.iterations", "0"), run__iterations="0"),
    "negative_seed": config(("run.seed", "-1"), run__seed="-1"),
    "seed_of_64_bits": config(("run.seed", "1099511627776"), run__seed="1099511627776"),
    "no_new_tokens": config(("sampling.max_new_tokens", "0"), sampling__max_new_tokens="0"),
    "b1_of_one": config(("optimizer.b1", "1.0"), optimizer__b1="1.0"),
    "warmup_of_all": config(("optimizer.warmup_ratio", "1.0"), optimizer__warmup_ratio="1"),
    "field_of_an_earlier_version": config(
        ("train.microbatch_size", "train.tokens_per_step", "command line"), train__microbatch_size="3"
    ),
    "field_of_an_earlier_version_in_a_file": config_file(
        ("c.yaml", "train.microbatch_size", "train.tokens_per_step"), "train: {microbatch_size: 3}\n"
    ),
    "device_step_without_tokens": config(("train.tokens_per_step", "0", "1 or more"), train__tokens_per_step="0"),
    "rows_of_one_token": config(("train.max_tokens", "1"), train__max_tokens="1"),
    "no_checkpoint": config(("checkpoint.every_steps", "0"), checkpoint__every_steps="0"),
    "two_free_mesh_axes": config(("mesh", "-1 to one axis"), mesh__data="-1"),
    "mesh_that_does_not_fit": config(("mesh.tensor 3", "number of devices, 8"), mesh__tensor="3"),
    "heads_that_the_mesh_does_not_cut": config(
        ("mesh.tensor", "4", "num_key_value_heads 2"), mesh__fsdp="2", mesh__tensor="4"
    ),
    "sampling_mesh_that_does_not_fit": config(
        ("sampling.mesh.fsdp 7", "number of devices, 8"), sampling__mesh='{"data": 1, "fsdp": 7}'
    ),
    "mesh_axis_of_zero": config(("mesh.data", "0"), mesh__data="0"),
    "half_given_hosts": config(("hosts", "num_processes"), hosts__coordinator="127.0.0.1:1"),
    "topology_that_is_none": config(("dry_run", "v9z:1x1"), dry_run="v9z:1x1"),
    "unknown_loss": config(("objective.base", "'dop'", "dpo"), objective__base="dop"),
    "setting_of_another_loss": config(("objective.tau", "0.5", "ipo"), objective__tau="0.5"),
    "label_smoothing_of_half": config(
        ("label_smoothing", "[0, 0.5)"), objective__base="robust", objective__label_smoothing="0.5"
    ),
    "exo_without_smoothing": config(("label_smoothing", "exo"), objective__base="exo", objective__label_smoothing="0"),
    "loss_that_needs_scores": config(
        ("objective.base", "reward_conditioned", "scores"), objective__base="reward_conditioned"
    ),
    "gap_without_scores": config(("filter.min_score_gap", "0.5"), filter__min_score_gap="0.5"),
    "share_without_a_reward_model": config(("filter.reward_share", "0.5"), filter__reward_share="0.5"),
    "missing_reward_model": config(("filter.reward_path", "no_such"), filter__reward_path="./no_such"),
    "judge_without_a_judge": config(("pairs.control", "judge_order", "toy"), pairs__control="judge_order"),
    "adapters_on_nothing": config(("lora.targets",), lora__rank="4", lora__targets="[]"),
    "adapters_on_noses": config(("lora.targets", "nose"), lora__rank="4", lora__targets="[nose]"),
    "adapters_from_nowhere": config(("lora.start_from", "no folder", "nowhere"), lora__start_from="./nowhere"),
    "adapters_left_in_a_jar": config(("lora.export", "jar", "merged"), lora__export="jar"),
    "directory_without_a_name": config(("run.directory",), run__directory=""),
    "directory_that_is_a_file": Case(("run.directory", "taken"), {"--run.directory": FILE}, ("taken", "mine")),
    "directory_below_a_file": Case(("run.directory", "taken"), {"--run.directory": f"{FILE}/run"}, ("taken", "mine")),
    "descriptions_without_the_toy": config(("toy.descriptions", "True", "toy world"), toy__descriptions="true"),
    "size_of_a_toy_that_is_not_used": config(("toy.width", "32", "toy world"), toy__width="32"),
    "toy_sampling_mesh_that_does_not_fit": toy(
        ("sampling.mesh.fsdp 7", "number of devices, 8"), sampling__mesh='{"data": 1, "fsdp": 7}'
    ),
    "toy_sampling_mesh_that_does_not_divide": toy(
        ("sampling.mesh.tensor: 8 does not divide", "num_attention_heads 4"),
        sampling__mesh='{"data": 1, "fsdp": 1, "tensor": 8}',
    ),
    "toy_mesh_that_does_not_divide": toy(
        ("mesh.tensor: 8 does not divide",), mesh__data="1", mesh__fsdp="1", mesh__tensor="8"
    ),
    "toy_reference_that_is_nowhere": toy(
        ("model.reference_path: no folder './nowhere'",), model__reference_path="./nowhere"
    ),
    "toy_reward_model_that_is_nowhere": toy(
        ("filter.reward_path: no folder './nowhere'",), filter__reward_path="./nowhere", filter__min_score_gap="1"
    ),
    "thinking_that_is_neither": config(("chat.thinking", "'maybe'"), chat__thinking="maybe"),
    "room_for_thoughts_below_zero": config(("chat.thought_tokens", "-1", "0 or more"), chat__thought_tokens="-1"),
    "bad_rows_that_are_kept": config(("data.on_bad_rows", "'keep'"), data__on_bad_rows="keep"),
    "queries_of_a_toy": config(("queries.path", "its own queries"), model__path="toy"),
    "no_queries": Case(("queries.path", "not given"), {"--queries.path": None}),
    "more_rounds_than_queries": config(("queries.path", "2 usable queries for 3 rounds"), run__iterations="3"),
    "pairs_that_are_not_used": config(("pairs.path", "p.jsonl", "online"), pairs__path="p.jsonl"),
    "offline_without_pairs": Case(("pairs.path", "not given"), {"--recipe": "offline", "--queries.path": None}),
    "sft_without_demonstrations": Case(
        ("demonstrations.path", "not given"), {"--recipe": "sft", "--queries.path": None}
    ),
    "reward_of_two_rounds": config(("run.iterations", "2", "reward"), recipe="reward", run__iterations="2"),
    "wandb_that_is_not_there": config(("logging.wandb_project", "wandb"), logging__wandb_project="p"),
    # endpoints and principles
    "endpoint_without_address": config(("endpoint.url", "not given"), principles__source="endpoint"),
    "endpoint_that_is_down": config(
        ("endpoint.url", "127.0.0.1:9", "cannot be reached"),
        principles__source="endpoint",
        endpoint__url="http://127.0.0.1:9/v1",
    ),
    "judging_without_endpoint": config(("endpoint.url", "judging.pairs"), judging__pairs="5"),
    "endpoint_of_another_kind": config(("endpoint.url", "localhost:8000", "http"), endpoint__url="localhost:8000"),
    "principles_file_without_path": config(("principles.path", "None", "file"), principles__source="file"),
    "principles_path_without_file": config(("principles.path", "p.jsonl", "predefined"), principles__path="p.jsonl"),
    "missing_principles_file": config(
        ("principles.path", "no_such"), principles__source="file", principles__path="no_such.jsonl"
    ),
    "principles_of_another_query": principles(
        ("w.jsonl, line 1", "'z'"), line(id="z", good_system="g", bad_system="b")
    ),
    "principles_for_one_of_two": principles(
        ("w.jsonl", "1 of 2", "'b'"), line(id="a", good_system="g", bad_system="b")
    ),
    "principles_that_are_equal": principles(
        ("w.jsonl, line 1", "equal"), line(id="a", good_system="g", bad_system="g")
    ),
    "principle_that_is_a_number": principles(
        ("w.jsonl, line 1", "good_system"), line(id="a", good_system=1, bad_system="b")
    ),
    # config files
    "missing_config_file": config(("config", "no_such.yaml"), config="no_such.yaml"),
    "config_that_is_no_yaml": config_file(("c.yaml",), "run: [1\n"),
    "config_that_is_a_list": config_file(("c.yaml",), "- run\n- model\n"),
    "config_that_is_a_word": config_file(("c.yaml",), "tiny\n"),
    "config_that_is_no_text": config_file(("c.yaml",), b"\xff\xfe\x00run"),
    "config_that_is_a_folder": config(("config", "configs"), config="configs"),
    "misspelt_field_in_a_file": config_file(("temprature", "sampling.temperature"), "sampling:\n  temprature: 1.0\n"),
    "misspelt_section_in_a_file": config_file(
        ("smapling.temperature", "sampling.temperature"), "smapling:\n  temperature: 1.0\n"
    ),
    "text_for_a_section": config_file(("c.yaml", "sampling", "'hot'"), "sampling: hot\n"),
    "number_for_a_section": config_file(("c.yaml", "run", "5"), "run: 5\n"),
    "section_without_fields": config_file(("c.yaml", "run", "None"), "run:\n"),
    "field_without_a_value": config_file(("c.yaml", "train.batch_size", "no value"), "train:\n  batch_size:\n"),
    "config_without_anything": config_file(("c.yaml", "not a table of fields"), ""),
    "config_that_holds_itself": config_file(("c.yaml",), "run: &a {directory: *a}\n"),
    "list_that_holds_itself": config_file(("recipe", "online"), "recipe: &a [*a]\n"),
    "wrong_type_in_a_file": config_file(("train.batch_size", "'lots'", "whole number"), "train: {batch_size: lots}\n"),
    "list_in_a_file": config_file(("run.seed", "'[1, 2]'", "give a whole number"), "run: {seed: [1, 2]}\n"),
    "none_in_a_file": config_file(("train.epochs", "'none'", "give a whole number"), "train: {epochs: none}\n"),
    "field_without_its_section_in_a_file": config_file(
        ("learning_rate", "did you mean optimizer.learning_rate or generator.learning_rate?"), "learning_rate: 1\n"
    ),
    # queries
    "missing_queries_file": config(("queries.path", "no_such.jsonl"), queries__path="no_such.jsonl"),
    "queries_of_no_known_kind": queries(("queries.path", ".jsonl"), "fox", "q.docx"),
    "no_query_at_all": queries(("no queries",), ""),
    "malformed_line": queries(("q.jsonl, line 2", "not valid JSON"), '{"query": "a"}\n{"query": "b"\n'),
    "line_of_another_type": queries(("q.jsonl, line 3", "list"), '{"query": "a"}\n\n["b"]\n'),
    "line_without_text": queries(("q.jsonl, line 1", "no text", "prompt"), '{"text": "a"}\n'),
    "text_that_is_a_number": queries(("q.jsonl, line 1", "no text"), '{"query": 5}\n'),
    "text_of_blanks": queries(("q.jsonl, line 1", "no text"), '{"query": "  "}\n'),
    "line_that_is_not_utf_8": queries(("q.jsonl, line 2", "UTF-8"), b'{"query": "a"}\n{"query": "\xff"}\n'),
    "half_a_character": queries(("q.jsonl, line 1", "surrogate"), '{"query": "\\ud83d"}\n'),
    "line_nested_without_end": queries(("q.jsonl, line 1", "not valid JSON"), '{"query": ' + "[" * 100000 + "\n"),
    "number_of_5000_digits": queries(("q.jsonl, line 1", "not valid JSON"), '{"query": ' + "1" * 5000 + "}\n"),
    "id_used_twice": queries(("q.jsonl, line 2", "'1'"), '{"id": 1, "query": "a"}\n{"id": 1, "query": "b"}\n'),
    "queries_too_long_for_the_model": queries(("128 tokens",), line(query="fox " * 200)),
    "json_that_is_no_list": queries(("list of JSON objects",), '["a", "b"]', "q.json"),
    "json_cut_short": queries(("q.json, line 1", "not valid JSON"), '[{"query": "a"}', "q.json"),
    "table_that_is_none": queries(("queries.path",), b"PAR1garbage", "q.parquet"),
    # pairs and demonstrations
    "no_pair_at_all": pairs(("no pairs",), ""),
    "pair_without_rejected": pairs(
        ("p.jsonl, line 2", "no rejected"), line(**PAIR) + line(**{**PAIR, "rejected": None})
    ),
    "pair_without_prompt": pairs(("p.jsonl, line 1", "no prompt"), line(**{**PAIR, "query": None})),
    "response_that_is_a_number": pairs(("p.jsonl, line 1", "chosen", "int"), line(**{**PAIR, "chosen": 5})),
    "system_that_is_a_list": pairs(
        ("p.jsonl, line 1", "good_system", "list"), line(**{**STEERED, "good_system": ["g"]})
    ),
    "label_of_three": pairs(("p.jsonl, line 1", "label 3"), line(input="q", output_1="a", output_2="b", label=3)),
    "turn_by_nobody_known": pairs(
        ("p.jsonl, line 1", "'robot'"), line(prompt=[{"role": "robot", "content": "x"}], chosen="yes", rejected="no")
    ),
    "responses_to_two_prompts": pairs(
        ("p.jsonl, line 1", "different prompts"),
        line(
            **{s: [{"role": "user", "content": s}, {"role": "assistant", "content": s}] for s in ("chosen", "rejected")}
        ),
    ),
    "pairs_without_any_contrast": pairs(("no", "contrast"), line(**{**PAIR, "rejected": "yes"})),
    "pairs_without_principles": pairs(("lack", "good_system", "'1'"), line(**PAIR), objective__form="online"),
    "features_that_are_a_number": pairs(("p.jsonl, line 1", "features"), line(**STEERED, features=5)),
    "ids_that_are_texts": pairs(("p.jsonl, line 1", "response_ids"), line(**STEERED, response_ids={"chosen": ["a"]})),
    "scores_that_are_texts": pairs(
        ("p.jsonl, line 1", "score"), line(**PAIR, chosen_score="high", rejected_score="low")
    ),
    "gap_of_pairs_without_scores": pairs(("filter.min_score_gap", "scores"), line(**PAIR), filter__min_score_gap="1"),
    "no_demonstration_at_all": demonstrations(("no demonstrations",), ""),
    "demonstration_without_response": demonstrations(("d.jsonl, line 1",), '{"prompt": "a"}\n'),
    "demonstrations_too_long": demonstrations(("128 tokens",), line(prompt="fox " * 200, response="yes")),
    # model folders
    "missing_model_folder": config(("model.path", "no_such_folder"), model__path="./no_such_folder"),
    "unreachable_hub_id": config(("model.path", "nobody/nothing"), model__path="nobody/nothing"),
    "no_weights": folder(("no model.safetensors",), removed("model*")),
    "pickled_weights_only": folder(
        ("no model.safetensors", "only pytorch_model.bin", "safe_serialization=True"), pickled_only
    ),
    "weights_left_in_git_lfs": folder(
        ("model.safetensors: a Git LFS pointer", "git lfs pull"), written("model.safetensors", LFS_POINTER)
    ),
    "tokenizer_left_in_git_lfs": folder(
        ("tokenizer.json: a Git LFS pointer", "git lfs pull"), written("tokenizer.json", LFS_POINTER)
    ),
    "config_left_in_git_lfs": folder(
        ("config.json: a Git LFS pointer", "git lfs pull"), written("config.json", LFS_POINTER)
    ),
    "half_a_weights_file": folder(("model.safetensors",), halved("model.safetensors")),
    "weights_that_are_none": folder(("model.safetensors",), written("model.safetensors", b"\x10" * 40)),
    "index_without_map": folder(("model.safetensors.index.json",), index_alone("{}")),
    "index_of_a_missing_file": folder(
        ("no_such.safetensors",), index_alone('{"weight_map": {"lm_head.weight": "no_such.safetensors"}}')
    ),
    "no_config": folder(("config.json", "no such file"), removed("config.json")),
    "config_json_cut_short": folder(("config.json", "not valid JSON"), halved("config.json")),
    "config_json_that_is_a_list": folder(("config.json", "list"), written("config.json", "[]")),
    "unknown_model_type": folder(("config.json", "'mamba'"), changed("config.json", model_type="mamba")),
    "config_json_without_a_size": folder(
        ("config.json", "hidden_size is missing"), changed("config.json", hidden_size=None)
    ),
    "size_that_is_a_text": folder(("config.json", "hidden_size", "'wide'"), changed("config.json", hidden_size="wide")),
    "heads_of_zero": folder(("config.json", "num_attention_heads", "0"), changed("config.json", num_attention_heads=0)),
    "sliding_window": folder(
        ("config.json", "sliding_window"),
        changed("config.json", use_sliding_window=True, sliding_window="64", max_window_layers=0),
    ),
    "unknown_rotary_type": folder(
        ("config.json", "'yarn'"), changed("config.json", rope_parameters={"rope_type": "yarn"})
    ),
    "model_of_texts_and_images": folder(
        ("config.json", "'llava'"), changed("config.json", model_type="llava", text_config={"model_type": "llama"})
    ),
    "rotary_scaling_without_numbers": folder(
        ("config.json", "factor is missing"), changed("config.json", rope_parameters={"rope_type": "llama3"})
    ),
    "weights_of_another_width": folder(("weight", "(1024, 64)"), changed("config.json", hidden_size=64)),
    "vocabulary_of_another_model": folder(
        ("model.embed_tokens.weight", "(64, 32)"), changed("config.json", vocab_size=64)
    ),
    "layer_without_weights": folder(("layers.1",), changed("config.json", num_hidden_layers=2)),
    "mesh_that_cannot_cut_the_model": config(("mesh.tensor", "8"), mesh__tensor="8"),
    "experts_of_a_model_without_any": config(("mesh.expert: 2 for a model without experts",), mesh__expert="2"),
    "router_loss_without_experts": config(("train.router_loss: 0.1 for a model without",), train__router_loss="0.1"),
    # tokenizers
    "no_tokenizer": folder(("tokenizer",), removed("tokenizer*")),
    "tokenizer_cut_short": folder(("tokenizer",), halved("tokenizer.json")),
    "tokenizer_config_that_is_no_json": folder(("tokenizer",), written("tokenizer_config.json", "{")),
    "no_end_of_turn": folder(("eos_token",), written("tokenizer_config.json", '{"eos_token": null}')),
    "template_that_is_no_jinja": folder(
        ("chat template", "user turn"), written("chat_template.jinja", "{% for m in messages %}")
    ),
    "template_that_leaves_out_the_query": folder(
        ("chat template", "leaves out the user turn"), written("chat_template.jinja", "Hello")
    ),
    "template_that_adds_a_number": folder(
        ("chat template",), written("chat_template.jinja", "{{ messages[0].content + 1 }}")
    ),
    "template_that_reaches_out": folder(
        ("chat template",),
        written("chat_template.jinja", "{{ messages.__class__.__mro__[1].__subclasses__() }}{{ messages[0].content }}"),
    ),
    "generation_config_that_is_no_json": folder(
        ("generation_config.json", "not valid JSON"), written("generation_config.json", "{")
    ),
    "end_of_turn_that_is_a_text": folder(
        ("generation_config.json", "'stop'"), changed("generation_config.json", eos_token_id="stop")
    ),
    "query_with_a_token_without_a_row": replace(
        queries((), line(query="Use a <tool>.")),
        damage=token_added("<tool>"),
        words=("query 'Use a <tool>.'", *UNKNOWN),
    ),
    "single_query_with_a_token_without_a_row": Case(
        ("query 'Use a <tool>.'", *UNKNOWN),
        {"--queries.path": None, "--query": "Use a <tool>."},
        damage=token_added("<tool>"),
        command="sample",
    ),
    "response_with_a_token_without_a_row": replace(
        pairs((), line(**{**PAIR, "rejected": "a <tool>"})),
        damage=token_added("<tool>"),
        words=("pairs.path: rejected of pair '1'", *UNKNOWN),
    ),
    "demonstration_with_a_token_without_a_row": replace(
        demonstrations((), line(prompt="a", response="<tool>")),
        damage=token_added("<tool>"),
        words=("demonstrations.path: demonstration 'a'", *UNKNOWN),
    ),
    "template_with_a_token_without_a_row": folder(
        ("the chat template needs token '<|turn|>' (id 1024)", "vocab_size of 1024"),
        lambda path: (
            token_added("<|turn|>", special=True)(path),
            (path / "chat_template.jinja").write_text("{{ messages[0].content }}<|turn|>"),
        ),
    ),
    "end_of_turn_without_a_row": folder(
        ("the end of a response needs token '<|stop|>' (id 1024)", "vocab_size of 1024"),
        lambda path: (
            token_added("<|stop|>", special=True)(path),
            changed("generation_config.json", eos_token_id=[2, 1024])(path),
        ),
    ),
    # sample.py and evaluate.py
    "sampling_from_the_toy": Case(("model.path",), {"--model.path": "toy"}, command="sample"),
    "answers_into_no_folder": Case(("out", "no/such/folder"), {"--out": "no/such/folder/out.jsonl"}, command="sample"),
    "answers_into_a_folder": Case(("out", "configs"), {"--out": "configs"}, command="sample"),
    "answers_without_a_file": Case(("out", "not given"), {"--out": None}, command="sample"),
    "query_of_nothing": Case(("query: ''", "give a text"), {"--queries.path": None, "--query": ""}, command="sample"),
    "query_of_blanks": Case(("query: ' \\n'",), {"--queries.path": None, "--query": " \n"}, command="sample"),
    "query_and_queries": Case(("query", "one of them"), {"--query": "Spell fox."}, command="sample"),
    "field_of_training": Case(("optimizer.learning_rate",), {"--optimizer.learning_rate": "1"}, command="sample"),
    "answers_in_an_unknown_form": Case(("form", "haiku"), {"--form": "haiku"}, command="sample"),
    "sampling_for_malformed_queries": queries(("q.jsonl, line 1", "not valid JSON"), "{", command="sample"),
    "sampling_for_no_query_at_all": queries(("no queries",), "", command="sample"),
    "policy_as_a_reward_model": Case(
        ("config.json", "not a reward model"), {"--pairs.path": FILE}, ("p.jsonl", line(**PAIR)), command="evaluate"
    ),
    "rating_without_pairs": Case(("pairs.path", "not given"), command="evaluate"),
    "rating_into_a_folder": Case(
        ("out", "configs"), {"--pairs.path": FILE, "--out": "configs"}, ("p.jsonl", line(**PAIR)), command="evaluate"
    ),
    "rating_of_equal_sides": Case(
        ("p.jsonl", "equal sides"),
        {"--pairs.path": FILE},
        ("p.jsonl", line(**{**PAIR, "rejected": "yes"})),
        command="evaluate",
    ),
    # command lines
    "option_without_a_value": Case(("run.seed", "no value", "a whole number"), more=("--run.seed",)),
    "config_without_a_file": Case(("config", "no value", "YAML file"), more=("--config",)),
    "word_without_an_option": Case(("tiny", "not an option", "--config"), more=("tiny",)),
    "dash_for_a_dot": Case(("--run-seed: no such field; did you mean --run.seed?",), more=("--run-seed=1",)),
    "dash_for_a_dot_and_a_value": Case(("did you mean --run.directory?",), more=("--run-directory", "X")),
    "underscore_for_a_dot": Case(("did you mean --run.directory?",), more=("--run_directory", "X")),
    "dashes_for_underscores": Case(("did you mean --train.batch_size?",), more=("--train.batch-size", "2")),
    "capitals": Case(("did you mean --run.seed?",), more=("--Run.Seed", "2")),
    "one_dash": Case(("did you mean --run.seed?",), more=("-run.seed", "2")),
    "field_without_its_section": Case(
        ("did you mean --optimizer.learning_rate or --generator.learning_rate?",), more=("--learning_rate", "1")
    ),
    "misspelt_field_without_its_section": Case(("--optimizer.learning_rate",), more=("--lerning-rate", "1")),
    "beginning_of_a_field": Case(("did you mean --run.directory?",), more=("--run.dir", "X")),
    "option_like_no_field": Case(
        ("--frobnicate: no such field; --help names every field",), more=("--frobnicate", "1")
    ),
    "help_on_no_section": Case(("--help samplng", "did you mean sampling?"), more=("--help", "samplng")),
    "help_on_nothing_known": Case(("--help haiku", "give all or one of run, model"), more=("--help", "haiku")),
}


def arguments_of(case: Case, good: dict[str, str], model_folder: Path, tmp_path: Path) -> list[str]:
    """The command line of a case, its files written."""
    given = dict(good)
    if case.command != "train":
        queried = {"--queries.path": good["--queries.path"]} if case.command == "sample" else {}
        given = {"--model.path": good["--model.path"], **queried, "--out": str(tmp_path / "run")}
    if case.damage is not None:
        copy = tmp_path / "policy"
        copy.mkdir()
        for path in model_folder.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        case.damage(copy)
        given["--model.path"] = str(copy)
    place = tmp_path / case.file[0] if case.file else tmp_path
    if case.file:
        place.write_bytes(case.file[1].encode() if isinstance(case.file[1], str) else case.file[1])
    given |= case.change
    return [
        part.replace(FILE, str(place)) for name, value in given.items() if value is not None for part in (name, value)
    ] + [*case.more]


def tree(path: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_told_in_one_line_and_nothing_is_written(good, model_folder, capsys, tmp_path, name):
    case = CASES[name]
    arguments = arguments_of(case, good, model_folder, tmp_path)
    before = tree(tmp_path)
    told = refusal(COMMANDS[case.command], arguments, capsys)
    assert all(word in told for word in case.words), told
    assert not any(jargon in told for jargon in ("<class", "typing.", "Union", "Parser key", "Expected a")), told
    assert tree(tmp_path) == before and not (tmp_path / "run").exists()


def test_the_table_has_what_was_asked_for():
    assert len(CASES) >= 60


def test_the_arguments_that_the_cases_change_are_good(good, tmp_path):
    """Else a case could be refused for another reason than its own."""
    quick = {**good, "--sampling.max_new_tokens": "4", "--run.compilation_cache": ""}
    assert train.main([part for pair in quick.items() for part in pair]) == 0


def test_a_padding_token_that_the_model_has_no_row_for_does_no_harm(good, model_folder, tmp_path):
    copy = tmp_path / "policy"
    shutil.copytree(model_folder, copy)
    token_added("[PAD]", special=True)(copy)
    quick = {**good, "--model.path": str(copy), "--sampling.max_new_tokens": "4", "--run.compilation_cache": ""}
    assert train.main([part for pair in quick.items() for part in pair]) == 0


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(good, capsys, tmp_path, one_device):
    model, tokenizer, path = toy_model(), train_tokenizer(), tmp_path / "policy"
    export_policy(toy_params(model, one_device), model.architecture, tokenizer, (2,), path, "float32")
    told = refusal(train.main, [part for pair in {**good, "--model.path": str(path)}.items() for part in pair], capsys)
    assert f"ids up to {len(tokenizer) - 1}" in told and f"vocab_size of {model.architecture.vocab_size}" in told


SECRET = "sk-4711-very-secret"


@pytest.mark.parametrize("field", ["endpoint.key", "endpoint.api_key", "principles.token", "OPENAI_API_KEY"])
@pytest.mark.parametrize("place", ["file", "argument", "argument_with_equals"])
def test_a_key_outside_the_environment_is_refused_and_not_repeated(good, capsys, tmp_path, field, place):
    section, _, name = field.rpartition(".")
    (tmp_path / "c.yaml").write_text(f"{section}:\n  {name}: {SECRET}\n" if section else f"{name}: {SECRET}\n")
    if place == "file":
        extra = {"--config": str(tmp_path / "c.yaml")}
    else:
        extra = {f"--{field}": SECRET} if place == "argument" else {f"--{field}={SECRET}": "--run.seed=1"}
    line = refusal(train.main, [part for pair in {**good, **extra}.items() for part in pair], capsys)
    assert field in line and "environment" in line and SECRET not in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"--endpoint.url": f"http://me:{SECRET}@host/v1"},
        {"--endpoint.url": f"http://host/v1?k={SECRET}"},
        {"--endpoint.key_variable": SECRET},
    ],
)
def test_a_key_in_another_field_is_refused_and_not_repeated(good, capsys, change):
    line = refusal(train.main, [part for pair in {**good, **change}.items() for part in pair], capsys)
    assert "environment" in line and SECRET not in line and next(iter(change)).lstrip("-") in line


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_parses(path):
    config = parse(Config, ["--config", str(path)], "train.py", "")
    assert isinstance(config.objective, ObjectiveConfig)


@pytest.mark.parametrize(
    ("command", "words"), [(sample, "model.path: 'toy' is trained by"), (evaluate, "pairs.path: not given")]
)
def test_a_command_without_arguments_says_what_it_needs(command, words, capsys):
    assert command.main([]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert words in line


def test_a_command_line_without_arguments_is_parsed():
    assert parse(Config, [], "train.py", "") == Config()


@pytest.mark.parametrize("platform", ["cuda", "bogus"])
def test_a_platform_that_is_not_there_is_named(platform):
    code = "from sso_jax.runtime.jax_setup import require_devices; require_devices()"
    environment = {**os.environ, "JAX_PLATFORMS": platform}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert f"InputError: JAX_PLATFORMS: {platform!r} gives no device" in result.stderr
