"""Text tables of a round for the terminal."""


def format_number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _before(numbers: dict) -> str:
    """The pairs that came to the filters, for comparison with what they left."""
    accuracy = "" if numbers.get("pair_accuracy") is None else f", accuracy {numbers['pair_accuracy']:.3f}"
    probabilities = " / ".join(format_number(numbers[f"{side}_probability"]) for side in ("chosen", "rejected"))
    return f"{numbers['num_pairs']} pairs{accuracy}, on-policy probability {probabilities}"


def table(row: dict) -> str:
    """The table of one round, for the terminal."""
    title = f"iteration {row['iteration']}" + (" (before any update)" if row["iteration"] == 0 else "")
    lines: list[tuple[str, str]] = []
    if row["num_queries"] is not None and row["num_pairs"] is None:
        lines.append(("demonstrations", str(row["num_queries"])))
    if row["num_pairs"] is not None:
        lines.append(("pairs kept", f"{row['num_pairs']} of {row['num_queries']} queries"))
        lines += [(f"  dropped: {reason}", str(count)) for reason, count in sorted(row["dropped"].items())]
        if row.get("before_filter") is not None:
            lines.append(("  before the filters", _before(row["before_filter"])))
        if row["pair_accuracy"] is not None:
            lines.append(("pair accuracy", f"{row['pair_accuracy']:.3f} (ties {row['pair_ties']:.3f}, as half)"))
        probabilities = f"{format_number(row['chosen_probability'])} / {format_number(row['rejected_probability'])}"
        lines.append(("on-policy probability, chosen / rejected", probabilities))
        lines.append(("tokens a response", format_number(row["response_tokens"], 1)))
    lines += judged_lines(row)
    if row["policy_quality"] is not None:
        parts = ", ".join(f"{name} {value:.2f}" for name, value in row["quality_parts"].items())
        lines.append(("policy quality, unsteered, held out", f"{row['policy_quality']:.3f} ({parts})"))
    for group, means in (row.get("held_out_groups") or {}).items():
        lines.append(
            (
                f"  {group}",
                f"{means['quality']:.3f}, {means['tokens']:.1f} tokens, {means['at_limit']:.3f} cut at the limit",
            )
        )
    if row.get("held_out_log_prob") is not None:
        lines.append(
            ("log-prob a token of the first policy's answers", f"{row['held_out_log_prob']:.3f} (they are in no pair)")
        )
    if row["seconds"] is not None:
        lines.append(("seconds", ", ".join(f"{stage} {value:.1f}" for stage, value in row["seconds"].items())))
    if row["tokens_per_second"] is not None:
        rates = row["tokens_per_second"]
        lines.append(
            ("tokens a second", ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items() if rate is not None))
        )
    width = max((len(name) for name, _ in lines), default=0)
    body = [f"  {name:<{width}}  {value}" for name, value in lines] or ["  nothing to measure without a judge"]
    return "\n".join([f"== {title} ".ljust(width + 30, "="), *body])


def judged_lines(row: dict) -> list[tuple[str, str]]:
    """Lines of a round's endpoint judge and of its reward model, where it has them."""
    lines = []
    judged, reward = row.get("endpoint_judge"), row.get("reward")
    if judged:
        numbers = (
            f"{format_number(judged['accuracy'])} of {judged['num_judged']} (ties "
            f"{format_number(judged['ties'])}, as half)"
        )
        lines.append(
            ("pair accuracy by the endpoint", f"{numbers}; both orders agree {format_number(judged['consistency'])}")
        )
    if reward:
        lines.append(
            (
                "reward model, held-out accuracy",
                f"{format_number(reward.get('held_out_accuracy'))} of {reward['num_held_out']} pairs",
            )
        )
        if reward.get("judge_accuracy") is not None:
            lines.append(("reward model, in the judge's order", f"{format_number(reward['judge_accuracy'])}"))
    return lines
