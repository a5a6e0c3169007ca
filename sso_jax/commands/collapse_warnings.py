"""Rows of summary.json and lines of metrics.jsonl in, warnings of a collapse out, each a sentence with its numbers."""

from collections.abc import Sequence


def collapse_warnings(
    rows: Sequence[dict],
    lines: Sequence[dict],
    length_growth: float,
    min_chosen_probability: float,
    min_pairs_share: float,
) -> list[str]:
    """What looks wrong in the last of the rounds.

    Args:
      rows: summary rows of the rounds with training so far, in order; a number that a recipe does not have is None.
      lines: metrics of the last round's updates.
    """
    first, last = rows[0], rows[-1]
    found = []
    before, now = first.get("response_tokens"), last.get("response_tokens")
    if before and now and now >= length_growth * before:
        found.append(f"responses have grown from {before:.1f} tokens in the first round to {now:.1f}")
    probability = last.get("chosen_probability")
    if probability is not None and probability < min_chosen_probability:
        found.append(
            f"the policy gives its chosen responses {probability:.4f} a token, below {min_chosen_probability}: it "
            "leaves its own data"
        )
    queries, pairs = last.get("num_queries"), last.get("num_pairs")
    if queries and pairs is not None and pairs < min_pairs_share * queries:
        found.append(f"only {pairs} of {queries} queries ended as pairs, below a share of {min_pairs_share}")
    return found + _falling_chosen(lines)


def _falling_chosen(lines: Sequence[dict]) -> list[str]:
    """The failure that a growing margin hides: the chosen responses lose probability too, between the first and last
    quarter.
    """
    told = [line for line in lines if line.get("chosen_log_prob") is not None and line.get("margin") is not None]
    quarter = len(told) // 4
    if quarter == 0:
        return []

    def mean(part, name):
        return sum(line[name] for line in part) / len(part)

    start, end = told[:quarter], told[-quarter:]
    fall = mean(end, "chosen_log_prob") - mean(start, "chosen_log_prob")
    growth = mean(end, "margin") - mean(start, "margin")
    return (
        [f"the margin grew by {growth:.3g} while chosen responses lost {-fall:.3g} nats"]
        if fall < -1.0 and growth > 0
        else []
    )
