"""Mazes made on the fly: walls, start, goal and the one route between them.

A maze of size n (odd) has (n-1)/2 x (n-1)/2 cells at the odd places of an n x n grid and is a spanning tree of them, so
that its route is unique. The tree is grown from a random root with every cell's parent kept: the route is two climbs
to the common ancestor, no search needed. Plain Python over padded flat lists is the fastest form found without a
compiled dependency (see `python -m tasks.mazegen`).
"""

import hashlib
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from random import Random
from typing import NamedTuple

import numpy as np

UP, DOWN, LEFT, RIGHT, WAIT = range(5)
"""The published move codes."""
MOVES = np.array([[-1, 0], [1, 0], [0, -1], [0, 1], [0, 0]])
"""Row and column step of each."""


class Maze(NamedTuple):
    walls: np.ndarray
    """(n, n) bool."""
    start: tuple[int, int]
    goal: tuple[int, int]
    route: list[int]
    """Move codes from start to goal."""


# ----------------------------------------------------------------------------------------------------------------------
# Two ways to grow a tree. Cells are numbered on a grid padded by one, whose border counts as visited.


def depth_first(cells: int, rng: Random) -> list[int]:
    """Randomised depth-first search: long winding corridors, as published. Returns every cell's parent or -1."""
    width = cells + 2
    free, parents = _unvisited(cells), [-1] * (width * width)
    random, cell = rng.random, _root(cells, rng)
    free[cell] = 0
    stack = []
    while True:
        choices = [other for other in (cell - width, cell - 1, cell + 1, cell + width) if free[other]]
        if choices:
            stack.append(cell)
            other = choices[int(random() * len(choices))]
            parents[other] = cell
            free[other] = 0
            cell = other
        elif stack:
            cell = stack.pop()
        else:
            return parents


def prim(cells: int, rng: Random) -> list[int]:
    """Randomised Prim's algorithm: short branches, many dead ends. Returns every cell's parent, -1 elsewhere."""
    width = cells + 2
    free, parents = _unvisited(cells), [-1] * (width * width)
    random, cell = rng.random, _root(cells, rng)
    free[cell] = 0
    edges = []
    while True:
        edges += [(cell, other) for other in (cell - width, cell - 1, cell + 1, cell + width) if free[other]]
        while edges:
            pick = int(random() * len(edges))
            edges[pick], edges[-1] = edges[-1], edges[pick]
            parent, cell = edges.pop()
            if free[cell]:
                free[cell] = 0
                parents[cell] = parent
                break
        else:
            return parents


ALGORITHMS: dict[str, Callable[[int, Random], list[int]]] = {"depth_first": depth_first, "prim": prim}


def _unvisited(cells: int) -> bytearray:
    row = b"\0" + b"\1" * cells + b"\0"
    return bytearray(bytes(cells + 2) + row * cells + bytes(cells + 2))


def _root(cells: int, rng: Random) -> int:
    return (rng.randrange(cells) + 1) * (cells + 2) + rng.randrange(cells) + 1


# ----------------------------------------------------------------------------------------------------------------------


def make_maze(size: int, rng: Random, algorithm: str = "depth_first", accept: Callable | None = None) -> Maze:
    """One random maze; start and goal are two different random cells.

    Args:
        size: side in pixels, odd and at least 5.
        accept: takes walls (n, n); mazes it refuses are thrown away before start and goal are drawn.
    """
    cells, grow = (size - 1) // 2, ALGORITHMS[algorithm]
    while True:
        parents = grow(cells, rng)
        walls = _walls(parents, size)
        if accept is None or accept(walls):
            break
    start = _root(cells, rng)
    goal = _root(cells, rng)
    while goal == start:
        goal = _root(cells, rng)
    width = cells + 2
    route = [code for code in _climb(parents, start, goal, width) for _ in range(2)]
    return Maze(walls, _pixel(start, width), _pixel(goal, width), route)


@cache
def _pixels(size: int) -> np.ndarray:
    """Flat pixel of every padded cell."""
    row, column = np.divmod(np.arange(((size + 3) // 2) ** 2), (size + 3) // 2)
    return (2 * row - 1) * size + 2 * column - 1


def _pixel(cell: int, width: int) -> tuple[int, int]:
    return 2 * (cell // width) - 1, 2 * (cell % width) - 1


def _walls(parents: list[int], size: int) -> np.ndarray:
    parents = np.array(parents)
    pixels = _pixels(size)
    child = np.flatnonzero(parents >= 0)
    parent = parents[child]
    walls = np.ones(size * size, dtype=bool)
    walls[pixels[child]] = walls[pixels[parent]] = False  # the root is nobody's child, but somebody's parent
    walls[(pixels[child] + pixels[parent]) // 2] = False
    return walls.reshape(size, size)


def _climb(parents: list[int], start: int, goal: int, width: int) -> list[int]:
    """Moves from cell to cell: up from the start to the common ancestor, and the goal's climb turned round."""
    up = [start]
    while (cell := parents[up[-1]]) >= 0:
        up.append(cell)
    place = {cell: i for i, cell in enumerate(up)}
    down = [goal]
    while down[-1] not in place:
        down.append(parents[down[-1]])
    path = up[: place[down[-1]]] + down[::-1]
    code = {-width: UP, width: DOWN, -1: LEFT, 1: RIGHT}
    return [code[after - before] for before, after in pairwise(path)]


def layout_hash(walls: np.ndarray) -> int:
    """A number of the wall layout alone, the same for all eight rotations and reflections of it."""
    forms = []
    for turned in (walls, walls.T):  # rows and columns swapped or not, each read from its four corners
        for rows in (1, -1):
            for columns in (1, -1):
                forms.append(np.packbits(turned[::rows, ::columns]).tobytes())
    return int.from_bytes(hashlib.blake2b(min(forms), digest_size=8).digest(), "little")


def follow(walls: np.ndarray, start: tuple[int, int], route: list[int]) -> list[tuple[int, int]]:
    """The places a route visits, start included; it ends where it would leave the grid or enter a wall."""
    places = [tuple(start)]
    for code in route:
        row, column = places[-1][0] + MOVES[code][0], places[-1][1] + MOVES[code][1]
        if not (0 <= row < len(walls) and 0 <= column < len(walls)) or walls[row, column]:
            break
        places.append((int(row), int(column)))
    return places


if __name__ == "__main__":
    from time import perf_counter

    for algorithm in ALGORITHMS:
        for size in (9, 15, 39, 99):
            rng, n, begin = Random(0), 0, perf_counter()
            while perf_counter() - begin < 2:
                layout_hash(make_maze(size, rng, algorithm).walls)
                n += 1
            print(f"{algorithm:12} {size}x{size}: {n / (perf_counter() - begin):6.0f} mazes per second per core")
