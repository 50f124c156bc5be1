"""Axis orders: how a tensor of an ONNX graph lies in the `.tflite` file.

An order is a permutation: axis i of the stored tensor is axis order[i] of the graph's tensor. Pictures
[1, C, H, W] are stored with `NHWC` = (0, 2, 3, 1). Transposes of the graph then only change the order
that a value is known by, and nothing moves until an operator asks for another order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Order = tuple[int, ...]

NHWC: Order = (0, 2, 3, 1)


def plain(rank: int) -> Order:
    """As in the graph."""
    return tuple(range(rank))


def picture(rank: int) -> Order:
    """Channels last for pictures [N, C, H, W], else as in the graph."""
    return NHWC if rank == 4 else plain(rank)


def stored(shape: Sequence[int], order: Order) -> tuple[int, ...]:
    """The shape in the file."""
    return tuple(shape[axis] for axis in order)


def transposed(order: Order, perm: Sequence[int]) -> Order:
    """Order of ONNX `Transpose(x, perm)` when its data are left where they lie."""
    new_axis = {old: new for new, old in enumerate(perm)}
    return tuple(new_axis[axis] for axis in order)


def last(order: Order, axis: int) -> Order:
    """`order` with `axis` moved to the end."""
    return (*(a for a in order if a != axis), axis)


def moves_nothing(shape: Sequence[int], old: Order, new: Order) -> bool:
    """Changing from one order to the other leaves every element in place: only axes of size 1 move."""
    return [a for a in old if shape[a] != 1] == [a for a in new if shape[a] != 1]


def groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Axes of two shapes of equal product, in the smallest runs that match: [2, 6, 4] and [12, 4] give
    ([0, 1], [0]) and ([2], [1]). Axes of size 1 are left out."""
    result = []
    left = [i for i, d in enumerate(before) if d != 1]
    right = [i for i, d in enumerate(after) if d != 1]
    while left or right:
        a, b = [left.pop(0)], [right.pop(0)]
        x, y = before[a[0]], after[b[0]]
        while x != y:
            if x < y:
                a.append(left.pop(0))
                x *= before[a[-1]]
            else:
                b.append(right.pop(0))
                y *= after[b[-1]]
        result.append((a, b))
    return result


def reshape(before: Sequence[int], after: Sequence[int], order: Order) -> tuple[Order, Order]:
    """(order that the input must have, order of the result) for a reshape that moves no data.

    The input's order is `order` where that is possible: where axes that are merged or split lie
    together and in sequence. Else the nearest one that has them so.
    """
    assert math.prod(before) == math.prod(after)
    runs = groups(before, after)
    of_axis = {axis: n for n, (axes, _) in enumerate(runs) for axis in axes}
    sequence: list[int] = []  # groups in the order in which they are stored
    for axis in order:
        if axis in of_axis and of_axis[axis] not in sequence:
            sequence.append(of_axis[axis])
    wanted_rest = [axis for n in sequence for axis in runs[n][0]]
    have_rest = [axis for axis in order if axis in of_axis]
    needed = order
    if wanted_rest != have_rest:
        needed = (*(a for a in order if a not in of_axis), *wanted_rest)
    new_rest = [axis for n in sequence for axis in runs[n][1]]
    ones = [axis for axis in range(len(after)) if after[axis] == 1]
    # a picture that stays one keeps its usual order: axes of size 1 may lie anywhere
    usual = picture(len(after))
    if [a for a in usual if after[a] != 1] == new_rest:
        return needed, usual
    result: Order = (*ones, *new_rest)
    natural = plain(len(after))
    if [a for a in natural if after[a] != 1] == new_rest:
        result = natural
    return needed, result


def arrange(data: np.ndarray, order: Order) -> np.ndarray:
    """A constant of the graph as it is stored."""
    result: np.ndarray = np.ascontiguousarray(np.transpose(data, order))
    return result
