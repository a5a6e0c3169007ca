"""Prompts and responses as token ids in, packed rows of fixed shape out. With log_probs.py, the only place that knows how rows lie.

A *tree* is a prompt with the responses whose log-probs under that prompt are wanted. A row holds several trees; a tree's responses
follow its prompt one after another, each with positions that go on from the prompt, each blind to the others (`tree_mask`):

    tokens     p p p a a b b b | q q c c | padding
    tree       1 1 1 1 1 1 1 1 | 2 2 2 2 | 0
    branch     0 0 0 1 1 2 2 2 | 0 0 1 1 | 0
    positions  0 1 2 3 4 3 4 5 | 0 1 2 3 | 0

A prompt is thus run once for all its responses. What a response's log-probs are summed into is its *cell*.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from sso_jax.records import Triple

ROW_STEP, TARGET_STEP = 32, 64
ATTENTION_LENGTH = 4096
"""About the length of row at which attending costs as much as all products with weights."""
MOST_COPIES = 4
"""Sequences of a row may have room for so many times its tokens; where they would need more, there are none."""
SPARE, MOST_WASTE = 0.0625, 0.5
"""Shares: how much longer trees may get before the shape of a run's rows changes, and how much dearer than need be it may get."""
COMPILE_STEPS = 100
"""To compile a step takes about as long as so many steps: a round of many more would lose by padding what it saves by not compiling."""


class Branch(NamedTuple):
    """A response and the cell that its log-prob is summed into."""

    response_ids: list[int]
    cell: int


class Tree(NamedTuple):
    """A prompt and the responses to it."""

    prompt_ids: list[int]
    branches: list[Branch]

    def num_tokens(self) -> int:
        return len(self.prompt_ids) + sum(len(branch.response_ids) for branch in self.branches)


class Rows(NamedTuple):
    """Packed rows [R, T] and, for each row, its up to M response tokens: where each is predicted from, what it is, its cell.

    Where their shape has sequences, also each response behind its prompt as a sequence of its own, for attention that takes no mask.
    """

    tokens: Int[np.ndarray, "R T"]
    positions: Int[np.ndarray, "R T"]
    tree: Int[np.ndarray, "R T"]
    branch: Int[np.ndarray, "R T"]
    source: Int[np.ndarray, "R M"]
    target: Int[np.ndarray, "R M"]
    cell: Int[np.ndarray, "R M"]
    sequences: Int[np.ndarray, "R Z U"]
    """Columns of the tokens of each, -1 behind its last."""
    place: Int[np.ndarray, "R M"]
    """Where in them, as one list of Z*U places, the token stands that a response token is predicted from; Z*U of unused targets."""


class RowShape(NamedTuple):
    """Fixed shape of the rows of a stage, so that it compiles once."""

    num_rows: int
    num_tokens: int
    num_targets: int
    num_sequences: int = 0
    """Responses of a row that are also sequences of their own; 0 where attention goes by the mask."""
    sequence_tokens: int = 0


def steered_trees(prompts: dict[str, list[int]], responses: dict[str, list[int]], cells: list[tuple[str, str]], start: int) -> list[Tree]:
    """Trees of one example: for each context its prompt with the responses that `cells` names; cells count on from `start`.

    `cells` is a list of (context, response): one log-prob each.
    """
    contexts = dict.fromkeys(context for context, _ in cells)
    return [
        Tree(prompts[wanted], [Branch(responses[r], start + i) for i, (c, r) in enumerate(cells) if c == wanted]) for wanted in contexts
    ]


def first_fit(sizes: list[int], capacity: int) -> list[list[int]]:
    """Positions of the items in bins of `capacity`, larger items first, each into the first bin with room."""
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


def _round_up(value: int, step: int) -> int:
    return max(step, -(-value // step) * step)


class _Size(NamedTuple):
    """What a tree takes of a row."""

    tokens: int
    targets: int
    branches: int
    longest: int
    """Tokens of its prompt and its longest response."""


def _size(tree: Tree, spare: float = 0.0) -> _Size:
    """That of a tree which is longer by the share `spare`; its targets by four times that, for those of a row vary most."""
    lengths = [len(branch.response_ids) for branch in tree.branches]
    longest = len(tree.prompt_ids) + max(lengths, default=0)
    return _Size(_longer(tree.num_tokens(), spare), _longer(sum(lengths), 4 * spare), len(lengths), _longer(longest, spare))


def row_shape(batches: list[list[Tree]], row_multiple: int = 1, spare: float = 0.0, by_sequence: bool = False) -> RowShape:
    """Cheapest rounded shape into which every one of these batches packs; rows come in multiples of `row_multiple`.

    Rows are one to four times as long as the longest tree: where trees are of uneven length, longer rows leave less of them empty. The
    same batches with trees longer by the share `spare` pack into it too. That they pack themselves does not follow: of shorter trees a row
    may hold more, and with them more targets. `by_sequence` gives it sequences, unless they would be most of them padding.
    """
    sizes = [[_size(tree, longer) for tree in trees] for longer in dict.fromkeys((0.0, spare)) for trees in batches]
    longest = max(size.tokens for of_batch in sizes for size in of_batch)
    shapes = [_shape_of_length(sizes, _round_up(times * longest, ROW_STEP), row_multiple, spare, by_sequence) for times in (1, 2, 3, 4)]
    return min(shapes, key=_cost)


def lasting_row_shape(
    batches: list[list[Tree]], row_multiple: int, earlier: RowShape | None, is_last: bool, by_sequence: bool = False
) -> RowShape:
    """Shape of the rows of a round: that of the round before where these batches pack into it, so that nothing is compiled again.

    Otherwise, and where the earlier one would cost more than a compilation does, or more than MOST_WASTE above the cheapest, it is decided
    anew, with room to spare unless the round `is_last`. It follows from the batches and the shape before it alone: a round that is resumed
    cuts the same rows.
    """
    waste = min(MOST_WASTE, COMPILE_STEPS / len(batches))
    fits = earlier is not None and earlier.num_rows % row_multiple == 0 and _holds(earlier, batches)
    if fits and _cost(earlier) <= (1.0 + waste) * _cost(row_shape(batches, row_multiple)):
        return earlier
    return row_shape(batches, row_multiple, 0.0 if is_last or waste < SPARE else SPARE, by_sequence)


def _longer(size: int, spare: float) -> int:
    return math.ceil(size * (1.0 + spare))


def _cost(shape: RowShape) -> float:
    """Work of a shape: its tokens, and attention, which grows with the length of their rows."""
    return shape.num_rows * shape.num_tokens * (1.0 + shape.num_tokens / ATTENTION_LENGTH)


def _shape_of_length(sizes: list[list[_Size]], num_tokens: int, row_multiple: int, spare: float, by_sequence: bool) -> RowShape:
    """Rounded shape of rows of `num_tokens` for batches of trees of these sizes."""
    num_rows, num_targets, num_sequences = _filled(sizes, num_tokens)
    step = max(1, 2 ** (num_rows.bit_length() - 3))  # within a quarter of a power of two: few shapes, little padding
    num_sequences = int(num_sequences * (1.0 + 4 * spare))
    longest = _round_up(max(size.longest for of_batch in sizes for size in of_batch), ROW_STEP)
    sequences = (num_sequences, longest) if by_sequence and num_sequences * longest <= MOST_COPIES * num_tokens else ()
    return RowShape(_round_up(_round_up(num_rows, step), row_multiple), num_tokens, _round_up(num_targets, TARGET_STEP), *sequences)


def _filled(sizes: list[list[_Size]], num_tokens: int) -> tuple[int, int, int]:
    """(rows, targets in a row, branches in a row) that the fullest of these batches takes."""
    num_rows, num_targets, num_branches = 1, 1, 1
    for of_batch in sizes:
        bins = [[of_batch[i] for i in bin_] for bin_ in first_fit([size.tokens for size in of_batch], num_tokens)]
        num_rows = max(num_rows, len(bins))
        num_targets = max(num_targets, *(sum(size.targets for size in bin_) for bin_ in bins))
        num_branches = max(num_branches, *(sum(size.branches for size in bin_) for bin_ in bins))
    return num_rows, num_targets, num_branches


def _holds(shape: RowShape, batches: list[list[Tree]]) -> bool:
    """Whether every one of these batches packs into the shape."""
    sizes = [[_size(tree) for tree in trees] for trees in batches]
    if max(size.tokens for of_batch in sizes for size in of_batch) > shape.num_tokens:
        return False
    num_rows, num_targets, num_branches = _filled(sizes, shape.num_tokens)
    if num_rows > shape.num_rows or num_targets > shape.num_targets:
        return False
    longest = max(size.longest for of_batch in sizes for size in of_batch)
    return not shape.num_sequences or (num_branches <= shape.num_sequences and longest <= shape.sequence_tokens)


def pack(trees: list[Tree], shape: RowShape, num_cells: int) -> Rows:
    """Packs trees into rows first-fit. Unused targets point to the cell `num_cells`, which nobody reads.

    Raises:
      ValueError: if the trees need more rows, tokens, targets or sequences than `shape` has.
    """
    sizes = [tree.num_tokens() for tree in trees]
    if trees and not _holds(shape, [trees]):
        needed = f"{len(trees)} trees of {sum(sizes)} tokens, the longest of {max(sizes)}"
        raise ValueError(f"{needed}, do not pack into {shape}; take row_shape of all batches")
    bins = first_fit(sizes, shape.num_tokens)
    num_places = shape.num_sequences * shape.sequence_tokens
    of_tokens = lambda: np.zeros((shape.num_rows, shape.num_tokens), np.int32)  # noqa: E731
    of_targets = lambda value=0: np.full((shape.num_rows, shape.num_targets), value, np.int32)  # noqa: E731
    rows = Rows(
        tokens=of_tokens(),
        positions=of_tokens(),
        tree=of_tokens(),
        branch=of_tokens(),
        source=of_targets(),
        target=of_targets(),
        cell=of_targets(num_cells),
        sequences=np.full((shape.num_rows, shape.num_sequences, shape.sequence_tokens), -1, np.int32),
        place=of_targets(num_places),
    )
    for row, members in enumerate(bins):
        free = _Free(0, 0, 0)
        for number, member in enumerate(members, start=1):
            free = _write_tree(rows, row, free, number, trees[member])
    return rows


class _Free(NamedTuple):
    """The first of a row's columns, targets and sequences that are free."""

    column: int
    target: int
    sequence: int


def _write_tree(rows: Rows, row: int, free: _Free, number: int, tree: Tree) -> _Free:
    """Writes a tree and its targets from the free places of a row on; returns the next free ones."""
    at, targets, _ = free
    trunk = len(tree.prompt_ids)
    trunk_end = at + trunk
    rows.tokens[row, at:trunk_end] = tree.prompt_ids
    rows.positions[row, at:trunk_end] = np.arange(trunk)
    end = trunk_end
    for branch_number, branch in enumerate(tree.branches, start=1):
        size = len(branch.response_ids)
        here = slice(end, end + size)
        rows.tokens[row, here] = branch.response_ids
        rows.positions[row, here] = trunk + np.arange(size)
        rows.branch[row, here] = branch_number
        wanted = slice(targets, targets + size)
        rows.source[row, wanted] = [trunk_end - 1, *range(end, end + size - 1)][:size]
        rows.target[row, wanted] = branch.response_ids
        rows.cell[row, wanted] = branch.cell
        if rows.sequences.size:
            sequence = free.sequence + branch_number - 1
            rows.sequences[row, sequence, : trunk + size] = [*range(at, trunk_end), *range(end, end + size)]
            rows.place[row, wanted] = sequence * rows.sequences.shape[2] + trunk - 1 + np.arange(size)
        end, targets = end + size, targets + size
    rows.tree[row, at:end] = number
    return _Free(end, targets, free.sequence + len(tree.branches))


class Example(NamedTuple):
    """What an update needs of one pair: its trees' ids, the reference log-probs of its cells, and where it came from."""

    id: str
    prompts: dict[str, list[int]]
    responses: dict[str, list[int]]
    reference_log_probs: list[float]


class PreferenceBatch(NamedTuple):
    """An update's examples in A microbatches of E examples with C cells each."""

    rows: Rows
    """Leading axis A."""
    num_tokens: Int[np.ndarray, "A E C"]
    reference_log_probs: np.ndarray
    """[A, E, C] sums in nats."""
    weights: np.ndarray
    """[A, E]; they sum to 1 over the update, and are 0 for examples that only fill it."""


class SupervisedBatch(NamedTuple):
    """An update's prompt-response records in A microbatches of E examples."""

    rows: Rows
    weights: np.ndarray
    """[A, E]; one over the response tokens of the whole update: the loss is their mean negative log-prob."""


def make_example(triple: Triple, prompts: dict[str, list[int]], responses: dict[str, list[int]], cells: list[tuple[str, str]]) -> Example:
    """Example of a scored triple."""
    return Example(triple.id, prompts, responses, [triple.log_probs[context][response] for context, response in cells])


def cut_microbatches(items: list, size: int, num_micro: int) -> list[list]:
    """Items in `num_micro` lists of at most `size`; the last ones may be short or empty."""
    return [items[i * size : (i + 1) * size] for i in range(num_micro)]


def micro_trees(examples: list[Example], cells: list[tuple[str, str]]) -> list[Tree]:
    """Trees of the examples of a microbatch; example e has the cells e*C ... e*C + C-1."""
    return [tree for e, example in enumerate(examples) for tree in steered_trees(example.prompts, example.responses, cells, e * len(cells))]


def stack_rows(rows: list[Rows]) -> Rows:
    """Rows of microbatches, which come first."""
    return Rows(*(np.stack(parts) for parts in zip(*rows, strict=True)))


def preference_batch(
    examples: list[Example], cells: list[tuple[str, str]], micro_size: int, num_micro: int, shape: RowShape
) -> PreferenceBatch:
    """Examples of one update (at most `micro_size * num_micro`) as arrays."""
    num_cells = micro_size * len(cells)
    num_tokens = np.ones((num_micro, micro_size, len(cells)), np.int32)
    references = np.zeros((num_micro, micro_size, len(cells)), np.float32)
    weights = np.zeros((num_micro, micro_size), np.float32)
    rows = []
    for a, micro in enumerate(cut_microbatches(examples, micro_size, num_micro)):
        rows.append(pack(micro_trees(micro, cells), shape, num_cells))
        for e, example in enumerate(micro):
            num_tokens[a, e] = [len(example.responses[response]) for _, response in cells]
            references[a, e] = example.reference_log_probs
            weights[a, e] = 1.0 / len(examples)
    return PreferenceBatch(stack_rows(rows), num_tokens, references, weights)


def supervised_batch(trees: list[Tree], micro_size: int, num_micro: int, shape: RowShape) -> SupervisedBatch:
    """Prompt-response trees of one update as arrays; cell e of a microbatch is its example e."""
    total = sum(_size(tree).targets for tree in trees)
    weights = np.zeros((num_micro, micro_size), np.float32)
    rows = []
    for a, micro in enumerate(cut_microbatches(trees, micro_size, num_micro)):
        placed = [Tree(tree.prompt_ids, [branch._replace(cell=e) for branch in tree.branches]) for e, tree in enumerate(micro)]
        rows.append(pack(placed, shape, micro_size))
        weights[a, : len(micro)] = 1.0 / total
    return SupervisedBatch(stack_rows(rows), weights)
