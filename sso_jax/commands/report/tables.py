"""Text tables of a round for the terminal."""

Line = tuple[str, str]
"""A label and its text."""


def format_number(value: float | None, digits: int = 3) -> str:
    """Formats a number with fixed digits, and None as a dash."""
    return "-" if value is None else f"{value:.{digits}f}"


def table(row: dict) -> str:
    """Formats the table of one round, a row of summary.json, for the terminal."""
    title = f"iteration {row['iteration']}" + (" (before any update)" if row["iteration"] == 0 else "")
    lines = [*_data_lines(row), *judged_lines(row), *_held_out_lines(row), *_quality_lines(row), *_timing_lines(row)]
    width = max((len(name) for name, _ in lines), default=0)
    body = [f"  {name:<{width}}  {value}" for name, value in lines] or ["  nothing to measure without a judge"]
    return "\n".join([f"== {title} ".ljust(width + 30, "="), *body])


def _data_lines(row: dict) -> list[Line]:
    """Returns the lines of what the round trained on, pairs or demonstrations, and of what was dropped."""
    num_pairs, num_queries = row["num_pairs"], row["num_queries"]
    lines = []
    if num_pairs is not None:
        lines.append(("pairs kept", str(num_pairs) + ("" if num_queries is None else f" of {num_queries} queries")))
    elif num_queries is not None:
        lines.append(("demonstrations", str(num_queries)))
    lines += [(f"  dropped: {reason}", str(count)) for reason, count in sorted((row["dropped"] or {}).items())]
    return lines if num_pairs is None else [*lines, *_pair_lines(row)]


def _pair_lines(row: dict) -> list[Line]:
    lines = []
    if row.get("before_filter") is not None:
        lines.append(("  before the filters", _before(row["before_filter"])))
    if row["pair_accuracy"] is not None:
        lines.append(("pair accuracy", f"{row['pair_accuracy']:.3f} (ties {format_number(row['pair_ties'])}, as half)"))
    if row["chosen_probability"] is not None or row["rejected_probability"] is not None:
        lines.append(("probability by the policy, chosen / rejected", _probabilities(row)))
    if row["response_tokens"] is not None:
        lines.append(("tokens a response", format_number(row["response_tokens"], 1)))
    return lines


def _before(numbers: dict) -> str:
    """Describes the pairs before the filters, for comparison with those after."""
    accuracy = "" if numbers.get("pair_accuracy") is None else f", accuracy {numbers['pair_accuracy']:.3f}"
    return f"{numbers['num_pairs']} pairs{accuracy}, probability {_probabilities(numbers)}"


def _probabilities(numbers: dict) -> str:
    return " / ".join(format_number(numbers.get(f"{side}_probability")) for side in ("chosen", "rejected"))


def judged_lines(row: dict) -> list[Line]:
    """Returns the lines of a round's endpoint judge and of its reward model, if it has them."""
    lines = []
    judged, reward = row.get("endpoint_judge"), row.get("reward")
    if judged:
        accuracy, ties = format_number(judged["accuracy"]), format_number(judged["ties"])
        numbers = f"{accuracy} of {judged['num_judged']} (ties {ties}, as half)"
        agreement = f"both orders agree {format_number(judged['consistency'])}"
        lines.append(("pair accuracy by the endpoint", f"{numbers}; {agreement}"))
    if reward:
        accuracy = f"{format_number(reward.get('held_out_accuracy'))} of {reward['num_held_out']} pairs"
        lines.append(("reward model, held-out accuracy", accuracy))
        if reward.get("judge_accuracy") is not None:
            lines.append(("reward model, in the judge's order", format_number(reward["judge_accuracy"])))
    return lines


def _held_out_lines(row: dict) -> list[Line]:
    """Returns the line of the pairs that no update saw."""
    numbers = row.get("held_out")
    if not numbers:
        return []
    said = ", ".join(
        f"{name} {format_number(numbers[name])}" for name in ("loss", "accuracy", "margin") if numbers[name] is not None
    )
    return [(f"held-out pairs ({numbers['num_pairs']}), after update {numbers['updates']}", said)]


def _quality_lines(row: dict) -> list[Line]:
    """Returns the lines of the policy's held-out answers: quality, by group of queries, and log-prob."""
    lines = []
    if row["policy_quality"] is not None:
        parts = ", ".join(f"{name} {value:.2f}" for name, value in (row["quality_parts"] or {}).items())
        said = f" ({parts})" if parts else ""
        lines.append(("policy quality, unsteered, held out", f"{row['policy_quality']:.3f}{said}"))
    for group, means in (row.get("held_out_groups") or {}).items():
        tokens = f"{means['tokens']:.1f} tokens, {means['at_limit']:.3f} cut at the limit"
        lines.append((f"  {group}", f"{means['quality']:.3f}, {tokens}"))
    lines += _answer_lines(row.get("held_out_answers"))
    if row.get("held_out_log_prob") is not None:
        log_prob = f"{row['held_out_log_prob']:.3f} (they are in no pair)"
        lines.append(("log-prob a token of the first policy's answers", log_prob))
    return lines


def _answer_lines(numbers: dict | None) -> list[Line]:
    """Returns the lines of the held-out answers that no judge scores."""
    if not numbers:
        return []
    mean, p90 = (format_number(numbers[name], 1) for name in ("mean_tokens", "p90_tokens"))
    cut = format_number(numbers["cut"])
    shares = " / ".join(format_number(numbers[name]) for name in ("repeated_4grams", "compressed", "empty", "refused"))
    lines = [
        (
            f"answers to {numbers['num_responses']} held-out queries",
            f"{mean} tokens (90th percentile {p90}), {cut} cut at the limit",
        ),
        ("  repeated 4-grams / compressed size / empty / refused", shares),
    ]
    if numbers.get("relevance") is not None:
        lines.append(("  relevance to the query, cosine", format_number(numbers["relevance"])))
    followed, steered = numbers.get("instructions"), numbers.get("steerability")
    if followed:
        strict, loose = (format_number(followed[f"instruction_{name}"]) for name in ("strict", "loose"))
        lines.append((f"  instructions followed, of {followed['num_instructions']}", f"{strict} strict, {loose} loose"))
    if numbers.get("start_log_ratio") is not None:
        lines.append(("  log p(start) - log p, nats an answer", format_number(numbers["start_log_ratio"], 2)))
    if steered:
        sides = " / ".join(format_number(steered[side]) for side in ("chosen", "rejected"))
        lines.append(("  steerability of y+ / y-, nats a token", sides))
    return lines


def _timing_lines(row: dict) -> list[Line]:
    """Returns the lines of the seconds and token rates of the stages."""
    lines = []
    if row["seconds"] is not None:
        lines.append(("seconds", ", ".join(f"{stage} {value:.1f}" for stage, value in row["seconds"].items())))
    if row["tokens_per_second"] is not None:
        rates = [f"{name} {rate:.0f}" for name, rate in row["tokens_per_second"].items() if rate is not None]
        lines += [("tokens a second", ", ".join(rates))] if rates else []
    return lines
