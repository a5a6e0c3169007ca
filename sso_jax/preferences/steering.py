"""A query with its principles in, the query with its two system messages out, and the three prompts x, x+, x- as token ids."""

from importlib import resources

from sso_jax.records import CONTEXTS, PrincipledQuery, SteeredQuery, Triple
from sso_jax.tokens.chat import Chat


def _join(words: tuple[str, ...]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def system_message(adjectives: tuple[str, ...], principles: tuple[str, ...]) -> str:
    """System message that names the adjectives, lists the principles and asks to keep silent about them."""
    template = resources.files(__package__).joinpath("system_message.txt").read_text(encoding="utf-8").rstrip("\n")
    return template.replace("{adjectives}", _join(adjectives)).replace("{principles}", " ".join(principles))


def steer(record: PrincipledQuery) -> SteeredQuery:
    """The query with the good and the bad side of its features as system messages."""
    return SteeredQuery(
        id=record.id,
        query=record.query,
        features=record.features,
        good_system=system_message(record.good_adjectives, record.good_principles),
        bad_system=system_message(record.bad_adjectives, record.bad_principles),
        features_text=record.features_text,
        num_random_features=record.num_random_features,
        num_fallbacks=record.num_fallbacks,
    )


def steered_prompts(chat: Chat, record: SteeredQuery | Triple) -> dict[str, list[int]]:
    """Token ids of the prompts x, x+ and x- by context; those without a system message (plain pairs) are not there."""
    systems = {"plain": None, "positive": record.good_system, "negative": record.bad_system}
    history = record.history if isinstance(record, Triple) else ()
    contexts = [context for context in CONTEXTS if context == "plain" or systems[context] is not None]
    return {context: chat.prompt_ids(record.query, systems[context], history) for context in contexts}
