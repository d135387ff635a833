"""Which documents share a row: best-fit decreasing, planned from lengths alone."""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int] | np.ndarray, size: int) -> list[list[int]]:
    """Returns the documents of each row, by index, for rows of `size` places.

    Documents are taken from the longest to the shortest, equals in their order, and
    each goes to the row with the least room that suffices (of several, the one that has
    had this room for longest), or begins a new one. Empty ones are left out, and longer
    ones count as `size`.

    As TRL 1.16's packing strategy "bfd", and Ding et al. 2024, "Fewer Truncations
    Improve Language Modeling", arxiv.org/abs/2404.10830, section 3.
    """
    clipped = np.minimum(np.asarray(lengths, np.int64), size)
    order = np.argsort(-clipped, kind="stable")
    order = order[: np.count_nonzero(clipped)]
    rows: list[list[int]] = []
    with_room: dict[int, deque[list[int]]] = {}
    rooms: list[int] = []  # those that some row has, ascending
    for index, length in zip(order.tolist(), clipped[order].tolist(), strict=True):
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            row = with_room[room].popleft()
            if not with_room[room]:
                del rooms[at]
        else:
            room, row = size, []
            rows.append(row)
        row.append(index)
        if room > length:
            left = with_room.setdefault(room - length, deque())
            if not left:
                insort(rooms, room - length)
            left.append(row)
    return rows
