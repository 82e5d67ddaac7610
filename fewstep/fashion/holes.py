"""The holes of the embedded inpainting teacher: halves and rectangles, drawn by a seed."""

import numpy as np
from torch import Tensor, from_numpy

SIDE = 32
#: Pixels of a latent's side. A hole is made of whole cells, so that the latents' own mask of it is exact.
CELL = 4
_CELLS = SIDE // CELL
_FEWEST = 5  # cells of a rectangle's side: a hole that a sleeve fits into would ask for nothing
_HALVES = 1 / 3


def hole(seed: int, index: int) -> Tensor:
    """Where one picture is repainted, bool (32, 32), True inside: from 39 to 77 % of it, 54 % in the mean.

    Every third is one of the four halves; the others are rectangles of 5 to 7 cells a side, anywhere. It depends on
    the two numbers alone.
    """
    draw = np.random.default_rng([seed, index])
    cells = np.zeros((_CELLS, _CELLS), dtype=bool)
    if draw.random() < _HALVES:
        cells[: _CELLS // 2] = True
        cells = np.rot90(cells, int(draw.integers(4)))
    else:
        height, width = draw.integers(_FEWEST, _CELLS, size=2)
        top, left = draw.integers(_CELLS - height + 1), draw.integers(_CELLS - width + 1)
        cells[top : top + height, left : left + width] = True
    return from_numpy(np.kron(cells, np.ones((CELL, CELL), dtype=bool)))
