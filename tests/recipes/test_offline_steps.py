"""Five AdamW steps of recipe `offline` against transformers, PyTorch and the formulas of the paper, from the same
folder and file.
"""

import json
import shutil

import pytest
import torch
import transformers
from toys import FAMILIES, toy_model, toy_params

import train
from sso_jax.commands import train as train_command
from sso_jax.models.architecture import LayerKind
from sso_jax.models.export import export_policy
from sso_jax.models.rope import Rope, YarnRope
from sso_jax.toy.pretraining import train_tokenizer

RATE, STEPS, BATCH = 3e-3, 5, 4
BETA, G, A, GAMMA = 0.2, 0.1, 0.66, 0.1
WORDS = [
    "fox",
    "fig",
    "cat",
    "red",
    "ten",
    "oak",
    "sun",
    "sea",
    "ice",
    "map",
    "owl",
    "bee",
    "tin",
    "jam",
    "fan",
    "hut",
    "axe",
    "pie",
    "log",
    "cup",
]
PAIRS = [
    {
        "id": word,
        "query": f"Spell {word}.",
        "good_system": "Be right and polite.",
        "bad_system": f"Be wrong about {word}.",
        "chosen": f"The letters are {' '.join(word)}.",
        "rejected": "That is hard to say." + " No." * (i % 3),
        "original": f"It is {word}.",
    }
    for i, word in enumerate(WORDS)
]


OTHERS = ("olmo2", "olmo3", "smollm3", "gemma2", "gemma3", "phi3", "qwen3_moe")
SHAPES = {
    "tied": dict(tied_head=True),
    "untied": {},
    **{name: dict(num_layers=2, **FAMILIES[name]) for name in OTHERS},
    "yarn": dict(model_type="llama", qkv_bias=False, kinds=(LayerKind(Rope(1e4, YarnRope(4.0, 32))),)),
}
"""Changes of the toy's architecture, a Qwen2."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory, one_device):
    """Random policies of one or two layers."""
    tokenizer, made = train_tokenizer(), {}
    for name, changes in SHAPES.items():
        model = toy_model(**{"vocab_size": 1024, "num_layers": 1, **changes})
        folder = tmp_path_factory.mktemp("model") / "policy"
        export_policy(
            toy_params(model, one_device, scale=3.0),
            model.architecture,
            tokenizer,
            (tokenizer.eos_token_id,),
            folder,
            "float32",
        )
        made[name] = folder
    return made


def token_log_probs(model, tokenizer, system, query, response):
    """Log-prob of each response token, end of turn included; one row, the whole prompt."""
    messages = [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": query}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    ids = tokenizer(response, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    logits = model(torch.tensor([prompt_ids + ids])).logits[0].double()
    return logits[len(prompt_ids) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


def log_prob(model, tokenizer, system, query, response):
    """Sum of the response tokens' log-probs and their number."""
    log_probs = token_log_probs(model, tokenizer, system, query, response)
    return log_probs.sum(), len(log_probs)


def numbers(model, tokenizer, row):
    """(log-prob, count) of winner and loser under x, x+ and x-."""
    good, bad = row["good_system"], row["bad_system"]
    wanted = [
        (None, "chosen"),
        (None, "rejected"),
        (good, "chosen"),
        (good, "rejected"),
        (bad, "original"),
        (bad, "chosen"),
    ]
    return [log_prob(model, tokenizer, system, row["query"], row[response]) for system, response in wanted]


def loss_of(base, form, policy, reference):
    """L of one pair, METHOD.md: version 1's joint objective, or version 2's generator."""
    (h, n), mlp = (
        zip(*((p - r, n) for (p, n), (r, _) in zip(policy, reference, strict=True)), strict=True),
        [p / n for p, n in policy],
    )

    def pair(w, l):  # noqa: E741
        if base == "dpo":
            return -torch.nn.functional.logsigmoid(BETA * (h[w] - h[l]))
        return (h[w] / n[w] - h[l] / n[l] - 1 / (2 * BETA)) ** 2

    if form == "generator":
        return pair(2, 3) + pair(4, 5) - GAMMA * (mlp[2] + mlp[4])
    weight = torch.sigmoid(-(A * mlp[0] + (1 - A) * mlp[1]))
    return pair(0, 1) + weight * G * (pair(2, 3) + pair(4, 5))


def torch_losses(folder, base, form):
    """Losses of `five_steps`, and y_o's log-prob in the first."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").double()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        first = PAIRS[:BATCH]
        originals = (
            sum(float(log_prob(model, tokenizer, None, row["query"], row["original"])[0]) for row in first) / BATCH
        )
        references = [[(p.detach(), n) for p, n in numbers(model, tokenizer, row)] for row in PAIRS]

    def loss(i):
        return loss_of(base, form, numbers(model, tokenizer, PAIRS[i]), references[i])

    return five_steps(model, loss), originals


def five_steps(model, loss_of_pair):
    """Loss before each of five AdamW steps with a cosine, clipping at 1 and decay of matrices."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), eps=1e-8)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    losses = []
    for step in range(STEPS):
        loss = sum(loss_of_pair(i) for i in range(step * BATCH, (step + 1) * BATCH)) / BATCH
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


CASES = [
    *(("online", "dpo", "tied"), ("online", "ipo", "untied")),
    *(("generator", "dpo", "untied"), ("generator", "ipo", "tied")),
    *(("online", "dpo", name) for name in ("yarn", *OTHERS)),
]
"""Half of eight: each form meets each base and each kind of head, and each base each kind of head; and other families.
"""


def command(tmp_path, folder, **changes) -> list[str]:
    """Arguments of a run on `PAIRS`, which are written beside it."""
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    fields = {
        "model.path": folder,
        "pairs.path": tmp_path / "pairs.jsonl",
        "run.directory": tmp_path / "run",
        "train.batch_size": BATCH,
        "train.shuffle": "false",
        "optimizer.learning_rate": RATE,
        "optimizer.warmup_ratio": 0,
        "model.remat": "false",
        "logging.tensorboard": "false",
        **changes,
    }
    own = (str(part) for name, value in fields.items() for part in (f"--{name}", value))
    return ["--config", "configs/offline.yaml", *own]


@pytest.mark.parametrize(("form", "base", "family"), CASES)
def test_five_steps_follow_pytorch(folders, tmp_path, monkeypatch, form, base, family):
    monkeypatch.setattr(train_command, "write_report", lambda directory: None)  # its figures take longer than the steps
    changes = {"objective.form": form, "objective.base": base}
    if family == "qwen3_moe":
        changes["train.router_loss"] = 0  # the loss in PyTorch has none
    assert train.main(command(tmp_path, folders[family], **changes)) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    got = [row["loss"] for row in rows]
    expected, originals = torch_losses(folders[family], base, form)
    assert max(abs(a - expected[0]) / expected[0] for a in expected) > 0.005  # the steps do something
    assert got == pytest.approx(expected, rel=1e-4)
    assert rows[0]["original_log_prob"] == (pytest.approx(originals, rel=1e-4) if form == "online" else None)


def torch_contrast_losses(folder, strength):
    """DPO on sums of the tokens' log-probs times w_t = 1 - s + s |e_t| / mean |e|, e_t of the first policy."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).double()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sides, weights, references = ("chosen", "rejected"), [], []
    with torch.no_grad():
        for row in PAIRS:
            own, sums = [], []
            for side in sides:
                good, bad = (
                    token_log_probs(model, tokenizer, row[system], row["query"], row[side])
                    for system in ("good_system", "bad_system")
                )
                contrast = (good - bad).abs()
                own.append(1 - strength + strength * contrast / contrast.mean())
                sums.append((own[-1] * token_log_probs(model, tokenizer, None, row["query"], row[side])).sum())
            weights.append(own)
            references.append(sums)

    def loss(i):
        ratios = [
            (w * token_log_probs(model, tokenizer, None, PAIRS[i]["query"], PAIRS[i][side])).sum() - reference
            for w, side, reference in zip(weights[i], sides, references[i], strict=True)
        ]
        return -torch.nn.functional.logsigmoid(BETA * (ratios[0] - ratios[1]))

    return five_steps(model, loss), weights


def test_five_steps_with_weighted_tokens_follow_pytorch(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(train_command, "write_report", lambda directory: None)
    changes = {"objective.form": "pairwise", "objective.base": "dpo", "objective.token_contrast": 0.75}
    argv = command(tmp_path, folders["untied"], **changes)
    assert train.main(argv) == 0
    expected, weights = torch_contrast_losses(folders["untied"], 0.75)
    contrasts = tmp_path / "run" / "iteration_1" / "contrasts.jsonl"
    stored = {row["id"]: row for row in map(json.loads, contrasts.read_text().splitlines())}
    for row, own in zip(PAIRS, weights, strict=True):
        for side, values in zip(("chosen", "rejected"), own, strict=True):
            assert stored[row["id"]]["weights"][side] == pytest.approx(values.tolist(), rel=1e-3, abs=1e-4)
    assert max(max(w) for own in weights for w in own) > 1.5  # the weights do something
    got = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(abs(a - expected[0]) / expected[0] for a in expected) > 0.005
    assert got == pytest.approx(expected, rel=1e-4)
    # a round that begins its updates again reads its weights
    shutil.rmtree(tmp_path / "run" / "iteration_1" / "checkpoints")
    for name in ("round", "training", "export"):
        (tmp_path / "run" / "iteration_1" / "done" / f"{name}.json").unlink()
    assert train.main(argv) == 0
    again = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert again == got
