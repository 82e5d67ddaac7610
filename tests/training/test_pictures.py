"""Pictures of samples: rounding, videos as strips, grids."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fewstep.training.pictures import frames_of, save_grid, to_uint8


def test_floats_are_rounded_and_clipped():
    assert to_uint8(torch.tensor([-1.0, 0.0, 0.5 / 255, 0.49 / 255, 0.5, 1.0, 2.0])).tolist() == [
        0,
        0,
        1,
        0,
        128,
        255,
        255,
    ]


def test_every_grey_level_survives():
    levels = torch.arange(256).to(torch.uint8)
    assert torch.equal(to_uint8(levels.float() / 255), levels)


def test_the_frames_of_a_video_stand_side_by_side():
    video = torch.arange(2 * 1 * 3 * 2 * 2.0).reshape(2, 1, 3, 2, 2)
    strip = frames_of(video)
    assert strip.shape == (2, 1, 2, 6)
    for frame in range(3):
        assert torch.equal(strip[..., 2 * frame : 2 * frame + 2], video[:, :, frame])
    image = torch.zeros(2, 3, 4, 4)
    assert frames_of(image) is image


def test_a_grid_shows_one_row_per_tensor_and_one_column_per_image(tmp_path: Path):
    rows = [torch.full((3, 3, 64, 64), 0.25), torch.full((3, 3, 64, 64), 0.75)]
    rows[1][2] = 0.0
    save_grid(rows, tmp_path / "made" / "grid.png", pad=2)
    with Image.open(tmp_path / "made" / "grid.png") as picture:
        pixels = np.array(picture)
    assert pixels.shape == (2 * 68, 3 * 68, 3)
    assert pixels[0, 0].tolist() == [255, 255, 255]  # white between the images
    assert pixels[34, 34].tolist() == [64, 64, 64]
    assert pixels[68 + 34, 34].tolist() == [191, 191, 191]
    assert pixels[68 + 34, 2 * 68 + 34].tolist() == [0, 0, 0]


def test_small_grey_images_are_enlarged(tmp_path: Path):
    save_grid([torch.zeros(1, 1, 8, 8)], tmp_path / "grid.png", pad=0)
    with Image.open(tmp_path / "grid.png") as picture:
        assert (picture.size, picture.mode) == ((64, 64), "L")
