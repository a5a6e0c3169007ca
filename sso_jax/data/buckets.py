"""Rounds sequence lengths up to a few bucket sizes, so that few shapes are compiled."""

SHORTEST_BUCKET = 32


def bucket(length: int, shortest: int = SHORTEST_BUCKET) -> int:
    """Returns the smallest bucket, `shortest` (a power of two) times 1, 1.5, 2, 3, 4, 6, ..., that fits `length`.

    Lengths above `shortest` leave less than a third of their bucket as padding.
    """
    size = shortest
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size
