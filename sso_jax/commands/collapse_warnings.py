"""Warnings about signs of a collapse, from the rows of summary.json and the lines of metrics.jsonl."""

from collections.abc import Sequence

from sso_jax.data.records import RESPONSES

MOST_CUT = 0.1
"""Share of responses cut at the limit of tokens above which a role is named."""


def collapse_warnings(
    rows: Sequence[dict],
    lines: Sequence[dict],
    length_growth: float,
    min_chosen_probability: float,
    min_pairs_share: float,
) -> list[str]:
    """Returns a sentence with numbers for each sign of a collapse in the last round.

    Args:
      rows: summary rows of the rounds with training so far, in order; numbers that a recipe does not have are None.
      lines: metrics of the last round's updates.
      length_growth: factor by which responses may have grown since the first round.
      min_chosen_probability: least probability per token of chosen responses.
      min_pairs_share: least share of queries that yield pairs.
    """
    first, last = rows[0], rows[-1]
    found = []
    before, now = first.get("response_tokens"), last.get("response_tokens")
    if before and now and now >= length_growth * before:
        found.append(f"responses have grown from {before:.1f} tokens in the first round to {now:.1f}")
    probability = last.get("chosen_probability")
    if probability is not None and probability < min_chosen_probability:
        found.append(
            f"chosen responses have probability {probability:.4f} per token, below {min_chosen_probability}: the "
            "policy has drifted from its own data"
        )
    queries, pairs = last.get("num_queries"), last.get("num_pairs")
    if queries and pairs is not None and pairs < min_pairs_share * queries:
        found.append(f"only {pairs} of {queries} queries yielded pairs, below a share of {min_pairs_share}")
    return found + _cut_responses(last.get("sampling") or {}) + _falling_chosen(lines)


def _cut_responses(roles: dict[str, dict]) -> list[str]:
    """Warns of roles whose responses often reach the limit of tokens: they are trained on without their ends."""
    return [
        f"{numbers['cut']:.0%} of {role} responses were cut at the limit of tokens; raise sampling.max_new_tokens"
        for role, numbers in roles.items()
        if numbers["cut"] > MOST_CUT and role in RESPONSES
    ]


def _falling_chosen(lines: Sequence[dict]) -> list[str]:
    """Warns if chosen responses lose probability from the first to the last quarter, which a growing margin hides."""
    complete = [line for line in lines if line.get("chosen_log_prob") is not None and line.get("margin") is not None]
    quarter = len(complete) // 4
    if quarter == 0:
        return []

    def mean(part, name):
        return sum(line[name] for line in part) / len(part)

    start, end = complete[:quarter], complete[-quarter:]
    fall = mean(end, "chosen_log_prob") - mean(start, "chosen_log_prob")
    growth = mean(end, "margin") - mean(start, "margin")
    if fall >= -1.0 or growth <= 0:
        return []
    return [f"the margin grew by {growth:.3g} while chosen responses lost {-fall:.3g} nats"]
