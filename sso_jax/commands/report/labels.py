"""What the report calls things: the lead of each recipe, the names of responses, and the terms of the legend."""

import re

STEERED_RECIPES = ("online", "generator")
"""Recipes whose chosen and rejected responses are sampled under principles."""

LEADS = {
    "online": "Recipe online: self-steering optimization on the policy's own pairs, round by round.",
    "generator": "Recipe generator: a generator trained by self-steering makes the pairs of each round.",
    "offline": "Recipe offline: the policy is trained on given pairs of a chosen and a rejected response.",
    "sft": "Recipe sft: the policy is trained on demonstrations, prompts with one response each.",
    "reward": "Recipe reward: a reward model is trained on pairs of a chosen and a rejected response.",
}
"""First sentence of the page, by recipe."""

TERMS = {
    "policy quality": "mean score that the judge gives unsteered answers to held-out queries; it is never trained on",
    "pair accuracy": "share of pairs whose chosen response the judge prefers; ties count as half",
    "held-out loss": "loss on the pairs that no update sees, of the parameters that the iteration ended with",
    "held-out accuracy": "share of held-out pairs whose chosen response has the higher reward: that of a reward model, "
    "with ties as half, or the one that the loss compares",
    "held out": "the same number on the pairs that no update sees",
    "p(chosen)": "probability of the chosen responses under the plain prompt: the mean over pairs of exp(mean log-prob "
    "per token), by the policy at the start of the iteration; high means on-policy",
    "p(rejected)": "the same of the rejected responses",
    "chosen": "the response of a pair that is to win",
    "rejected": "the response of a pair that is to lose",
    "original": "a response without a principle",
    "p+": "good principle of a query",
    "p-": "bad principle of a query",
    "x": "the prompt without a principle",
    "x+": "the prompt with the good principle p+ as system message",
    "x-": "the prompt with the bad principle p- as system message",
    "y+": "chosen response, sampled from x+",
    "y-": "rejected response, sampled from x-",
    "y_o": "original response, sampled from x",
    "base": "loss of objective.base on the chosen and the rejected response under the plain prompt",
    "L+": "steering term: the base loss on the prompt x+, where y+ is to win against y-",
    "L-": "steering term: the base loss on the prompt x-, where y_o is to win against y+ "
    "(y- is, if objective.negative_winner is rejected)",
    "W": "weight of L+ and L- in the loss, sigmoid of minus the mean log-prob per token of y+ and y- under x: 0.5 for "
    "responses that are certain, near 1 for improbable ones",
}
"""Explanations of terms, in the order of the legend."""

SYMBOLS = {"p+", "p-", "x", "x+", "x-", "y+", "y-", "y_o", "L+", "L-"}
"""Terms that need an explanation wherever they are."""


def response_labels(recipe: str) -> dict[str, tuple[str, str]]:
    """Returns (term, addition) for each response of a triple, as in `y+` and `under the good principle`."""
    if recipe not in STEERED_RECIPES:
        return {name: (name, "") for name in ("chosen", "rejected", "original")}
    return {
        "chosen": ("y+", "under the good principle"),
        "rejected": ("y-", "under the bad principle"),
        "original": ("y_o", "without a principle"),
    }


def terms_of_triples(rows: list[dict], recipe: str) -> set[str]:
    """Returns the terms that the triples of a page use: their responses, principles and prompts."""
    contexts = {context for row in rows for means in row.get("log_probs", {}).values() for context in means}
    prompts = {"plain": "x", "positive": "x+", "negative": "x-"}
    labels = {label for name, (label, _) in response_labels(recipe).items() if any(row.get(name) for row in rows)}
    signs = {"p+": "good_system", "p-": "bad_system"}
    principles = {sign for sign, name in signs.items() if any(row.get(name) for row in rows)}
    return labels | principles | {prompts[context] for context in contexts if context in prompts}


def legend(used: set[str]) -> dict[str, str]:
    """Returns the explanations of the terms that a page uses, and of the symbols in these explanations."""
    wanted = set(used)
    for term in reversed(TERMS):  # an explanation names earlier symbols only
        if term in wanted:
            wanted |= SYMBOLS & set(re.split(r"[\s,;:()]+", TERMS[term]))
    return {term: text for term, text in TERMS.items() if term in wanted}
