"""Pictures have the size and the content they should."""

import numpy as np
import pytest
import torch

from fewstep.eval.grid import GAP, GridRow, contact_sheet, draw_grid, tile, to_pil


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_grid_enlarges_small_pictures_and_shows_them_unchanged():
    rows = [GridRow("teacher, 25 steps", noise(3, 1, 32, 32)), GridRow("student, 4 steps", noise(3, 3, 32, 32))]
    grid = draw_grid(rows, ["a photo of an ankle boot", "a photo of a bag", "x" * 200])
    assert grid.width > 3 * (96 + GAP) and grid.height > 2 * (96 + GAP)
    pixels = np.asarray(grid)
    # The last row's last picture stands in the lower right corner, three pixels for one.
    corner = pixels[-(96 + GAP + 8) : -(GAP + 8), -(96 + GAP + 8) : -(GAP + 8)][::3, ::3]
    assert np.array_equal(np.moveaxis(corner, -1, 0), rows[1].images[2].numpy())


def test_grid_reduces_large_pictures_and_takes_the_middle_of_videos():
    videos = noise(2, 5, 3, 8, 8)
    assert draw_grid([GridRow("v", videos)]).size == draw_grid([GridRow("v", videos[:, 2])]).size
    assert np.array_equal(draw_grid([GridRow("v", videos)]), draw_grid([GridRow("v", videos[:, 2])]))
    assert draw_grid([GridRow("big", noise(1, 3, 512, 1024))]).height < 200
    with pytest.raises(ValueError, match="at least one row"):
        draw_grid([])


def test_contact_sheet_keeps_first_and_last():
    videos = torch.arange(21, dtype=torch.uint8).view(1, 21, 1, 1, 1)
    sheet = contact_sheet(videos, 5)
    assert sheet.flatten().tolist() == [0, 5, 10, 15, 20]
    assert contact_sheet(videos[:, :3]).shape[1] == 3


def test_tile_and_single_picture():
    assert tile([noise(2, 3, 8, 6), noise(1, 3, 8, 6)]).size == (2 * 6 + GAP, 2 * 8 + GAP)
    assert to_pil(noise(1, 4, 5)).mode == "L" and to_pil(noise(3, 4, 5)).mode == "RGB"
