"""Base `spo`: hidden means against unpacked rows, the head against PyTorch, and a run that learns the degrees."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from toys import toy_model, toy_params

import train
from sso_jax.commands import train as train_command
from sso_jax.config import ObjectiveConfig
from sso_jax.models.export import export_policy
from sso_jax.recipes.objective import build_objective
from sso_jax.runtime.errors import InputError
from sso_jax.toy.pretraining import train_tokenizer
from sso_jax.training.log_probs import cell_log_probs, cell_means, cell_sums, forward
from sso_jax.training.packing import pack
from sso_jax.training.row_shapes import row_shape
from sso_jax.training.spo_head import NUM_DEGREES, degree_terms, init_head
from sso_jax.training.trees import Branch, Tree


def test_means_are_those_of_rows_of_their_own(one_device):
    """Packed trees with several responses against one unpacked row a response: final hidden states of all its tokens
    but the last.
    """
    model = toy_model(num_layers=1)
    params = toy_params(model, one_device)
    trees = [Tree([5, 6, 7], [Branch([8, 9, 10], 0), Branch([11], 1)]), Tree([5, 4], [Branch([12, 13], 2)])]
    rows = pack(trees, row_shape([trees]), 3)

    def of_cells():
        hidden = forward(model, params, rows, rows.source).hidden
        return cell_sums(model, params, rows, hidden, 3), cell_means(rows, hidden, 3)

    sums, means = jax.jit(of_cells)()
    np.testing.assert_allclose(sums, jax.jit(lambda: cell_log_probs(model, params, rows, 3))(), rtol=1e-5)
    apply = jax.jit(lambda ids, positions, mask: model.apply({"params": params}, ids, positions, mask))
    for tree in trees:
        for branch in tree.branches:
            ids = jnp.array([tree.prompt_ids + branch.response_ids])
            size = ids.shape[1]
            hidden, _ = apply(ids, jnp.arange(size)[None], jnp.tril(jnp.ones((1, size, size), bool)))
            inner = hidden[0, len(tree.prompt_ids) : -1]
            expected = inner.mean(0) if len(inner) else jnp.zeros(hidden.shape[-1])
            np.testing.assert_allclose(means[branch.cell], expected, rtol=1e-4, atol=1e-5)


def test_degree_terms_equal_pytorch():
    head, means = init_head(0, 8), jax.random.normal(jax.random.key(1), (5, NUM_DEGREES, 8))
    head = jax.tree.map(lambda leaf: leaf + 0.1, head)
    tensors = jax.tree.map(lambda leaf: torch.tensor(np.asarray(leaf)), head)
    inner = torch.nn.functional.gelu(
        torch.tensor(np.asarray(means)) @ tensors["hidden"]["kernel"] + tensors["hidden"]["bias"], approximate="tanh"
    )
    logits = (inner @ tensors["out"]["kernel"] + tensors["out"]["bias"]).reshape(-1, NUM_DEGREES)
    truth = torch.arange(NUM_DEGREES).repeat(5)
    loss, right = degree_terms(head, means)
    expected = torch.nn.functional.cross_entropy(logits, truth, reduction="none").reshape(5, NUM_DEGREES).mean(1)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(right, (logits.argmax(-1) == truth).float().reshape(5, NUM_DEGREES).mean(1))


def test_a_head_of_zeros_knows_nothing():
    zeros = jax.tree.map(jnp.zeros_like, init_head(0, 8))
    loss, _ = degree_terms(zeros, jnp.ones((3, NUM_DEGREES, 8)))
    np.testing.assert_allclose(loss, np.log(4) * np.ones(3), rtol=1e-6)


@pytest.fixture(scope="module")
def spo_run(tmp_path_factory, one_device):
    """Two rounds of `spo` on given pairs, with a learning rate at which the head learns."""
    patch, root = pytest.MonkeyPatch(), tmp_path_factory.mktemp("spo")
    patch.setattr(train_command, "write_report", lambda directory: None)
    model, tokenizer = toy_model(vocab_size=1024, num_layers=1), train_tokenizer()
    export_policy(
        toy_params(model, one_device, 3.0),
        model.architecture,
        tokenizer,
        (tokenizer.eos_token_id,),
        root / "model",
        "float32",
    )
    words = ["fox", "fig", "cat", "red", "ten", "oak"]
    pairs = [
        {"prompt": f"Spell {w}.", "chosen": f"The letters are {' '.join(w)}, it is the kind animal.", "rejected": "No."}
        for w in words
    ]
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    changes = {
        "--recipe": "offline",
        "--objective.base": "spo",
        "--objective.form": "pairwise",
        "--objective.degree_weight": 0.5,
        "--run.iterations": 2,
        "--model.path": root / "model",
        "--pairs.path": root / "pairs.jsonl",
        "--run.directory": root / "run",
        "--train.batch_size": 6,
        "--train.epochs": 12,
        "--optimizer.learning_rate": 1e-2,
        "--model.remat": "false",
        "--logging.tensorboard": "false",
    }
    argv = [str(part) for pair in changes.items() for part in pair]
    assert train.main(argv) == 0
    patch.undo()
    return root / "run", argv


def test_the_loss_is_dpo_and_gamma_times_the_cross_entropy_which_falls(spo_run):
    rows = [json.loads(line) for line in (spo_run[0] / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    for row in rows:
        assert row["loss"] == pytest.approx(row["base_loss"] + 0.5 * row["degree_loss"], rel=1e-5)
    for first, last in ((rows[0], rows[11]), (rows[12], rows[23])):  # the head is new each round
        assert first["base_loss"] == pytest.approx(np.log(2), rel=1e-5)
        assert last["degree_loss"] < 0.7 * first["degree_loss"] and last["degree_accuracy"] > first["degree_accuracy"]


def test_the_exported_policy_has_no_head(spo_run):
    model = transformers.AutoModelForCausalLM.from_pretrained(spo_run[0] / "iteration_2" / "policy")
    assert not any("degree" in name for name, _ in model.named_parameters())


def test_removal_is_refused_where_nothing_is_removed():
    with pytest.raises(InputError, match=r"objective\.degree_removal: 'random' is not used by base 'dpo'"):
        build_objective(ObjectiveConfig(base="dpo", degree_removal="random"))
