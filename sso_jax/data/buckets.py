"""A number of tokens in, the length of row that is made for it out."""

SHORTEST_BUCKET = 32


def bucket(length: int, shortest: int = SHORTEST_BUCKET) -> int:
    """Smallest of `shortest`, a power of two, times 1, 1.5, 2, 3, 4, 6, ... that holds `length`: few shapes, at most
    half of one wasted.
    """
    size = shortest
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size
