"""Prompt trees: a prompt with the responses whose log-probs are computed under it."""

from typing import NamedTuple

from sso_jax.data.records import Cell


class Branch(NamedTuple):
    """A response and the cell that its log-prob is summed into."""

    response_ids: list[int]
    cell: int
    weights: list[float] | None = None
    """Weight of each token in weighted sums; None for 1."""


class Tree(NamedTuple):
    """A prompt and the responses to it."""

    prompt_ids: list[int]
    branches: list[Branch]

    def num_tokens(self) -> int:
        """Returns the number of tokens of the prompt and all responses."""
        return len(self.prompt_ids) + sum(len(branch.response_ids) for branch in self.branches)


def steered_trees(
    prompts: dict[str, list[int]],
    responses: dict[str, list[int]],
    cells: list[Cell],
    start: int,
    token_weights: dict[str, list[float]] | None = None,
) -> list[Tree]:
    """Returns the trees of one example: each context's prompt with the responses that `cells` names for it.

    Args:
      prompts: prompts by context.
      responses: responses by name.
      cells: (context, response) of each log-prob.
      start: cell of the first of them; the others follow.
      token_weights: weights of the tokens of responses under the plain prompt.
    """
    contexts = dict.fromkeys(context for context, _ in cells)
    of_plain = token_weights or {}
    return [
        Tree(
            prompts[wanted],
            [
                Branch(responses[response], start + i, of_plain.get(response) if context == "plain" else None)
                for i, (context, response) in enumerate(cells)
                if context == wanted
            ],
        )
        for wanted in contexts
    ]


def first_fit(sizes: list[int], capacity: int) -> list[list[int]]:
    """Returns the indices of the items in each bin of `capacity`: largest first, each in the first bin with room."""
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        fitting = next((b for b, left in enumerate(room) if left >= sizes[item]), None)
        if fitting is None:
            bins.append([])
            room.append(capacity)
            fitting = len(bins) - 1
        bins[fitting].append(item)
        room[fitting] -= sizes[item]
    return bins
