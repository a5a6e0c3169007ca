"""A run whose policy has a folder, small enough for tests of servers that sample for it, and what it leaves."""

import json


def command(model_folder, tmp_path, run: str, *argv: str, **fields) -> list[str]:
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps({"query": f"Write {i}."}) + "\n" for i in range(20)))
    given = {"model.path": model_folder, "queries.path": tmp_path / "queries.jsonl", "queries.per_iteration": 10}
    given |= {"run.directory": tmp_path / run, "run.iterations": 1, "train.batch_size": 4}
    given |= {"sampling.max_new_tokens": 6, "sampling.batch_size": 8, "sampling.temperature": 0}
    given |= {"optimizer.learning_rate": 3e-2, "optimizer.warmup_ratio": 0, "objective.base": "dpo"}
    given |= {"model.remat": "false", "logging.tensorboard": "false", **fields}
    return [*(str(part) for name, value in given.items() for part in (f"--{name}", value)), *argv]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def response_ids(run, folder: str = "iteration_1") -> dict[str, dict[str, list[int]]]:
    return {row["id"]: row["response_ids"] for row in lines(run / folder / "responses.jsonl")}


def stats(run, folder: str = "iteration_1") -> dict:
    return json.loads((run / folder / "done" / "responses.json").read_text())


def lines_of_journal(run) -> list[list[int]]:
    text = (run / "sampling" / "server_responses.jsonl").read_text()
    return [json.loads(line)["ids"] for line in text.split("\n") if line]
