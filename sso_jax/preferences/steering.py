"""A query with its features in, the query with its two system messages out, and the three prompts x, x+, x- as token ids."""

from importlib import resources

from sso_jax.preferences.principles import Feature, NamedFeatures, feature_table
from sso_jax.records import CONTEXTS, Query, SteeredQuery, Triple
from sso_jax.tokens.chat import Chat


def _join(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def system_message(adjectives: list[str], principles: list[str]) -> str:
    """System message that names the adjectives, lists the principles and asks to keep silent about them."""
    template = resources.files(__package__).joinpath("system_message.txt").read_text(encoding="utf-8").rstrip("\n")
    return template.replace("{adjectives}", _join(adjectives)).replace("{principles}", " ".join(principles))


def steer(query: Query, named: NamedFeatures) -> SteeredQuery:
    """The query with the good and the bad side of its features as system messages."""
    rows: list[Feature] = [feature_table()[name] for name in named.features]
    return SteeredQuery(
        id=query.id,
        query=query.query,
        features=named.features,
        good_system=system_message([row.good_adjective for row in rows], [row.good for row in rows]),
        bad_system=system_message([row.bad_adjective for row in rows], [row.bad for row in rows]),
        features_text=named.text,
        num_random_features=named.num_random,
    )


def steered_prompts(chat: Chat, record: SteeredQuery | Triple) -> dict[str, list[int]]:
    """Token ids of the prompts x, x+ and x- by context."""
    systems = {"plain": None, "positive": record.good_system, "negative": record.bad_system}
    return {context: chat.prompt_ids(record.query, systems[context]) for context in CONTEXTS}
