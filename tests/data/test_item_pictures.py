"""A picture of an item is what diffusers itself opens of the same file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionInstructPix2PixPipeline
from diffusers.utils import load_image
from PIL import Image

from fewstep.data.items import read_items
from fewstep.errors import UserError

COLOURS = np.random.default_rng(1).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def table(folder: Path, *rows: Any) -> Path:
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "items.jsonl"


def unusual(folder: Path) -> dict[str, Path]:
    """Files of a picture, by what is unusual about each."""
    plain, alpha = Image.fromarray(COLOURS), Image.fromarray(COLOURS[..., 0], "L")
    turned = Image.Exif()
    turned[0x0112] = 6
    clear = plain.copy()
    clear.putalpha(alpha)
    saved: dict[str, tuple[str, Image.Image, dict[str, Any]]] = {
        "transparent": ("png", clear, {}),
        "grey and transparent": ("png", clear.convert("LA"), {}),
        "a palette with a transparent colour": ("png", plain.quantize(8), {"transparency": 1}),
        "a transparent colour": ("png", plain, {"transparency": plain.getpixel((0, 0))}),
        "CMYK": ("jpg", plain.convert("CMYK"), {}),
        "turned": ("jpg", plain, {"exif": turned}),
        "two colours": ("png", plain.convert("1"), {}),
    }
    files = {name: folder / f"{name}.{suffix}" for name, (suffix, *_) in saved.items()}
    for name, (_, shown, how) in saved.items():
        shown.save(files[name], **how)
    return files


def test_a_picture_is_what_diffusers_opens_of_the_same_file(tmp_path: Path) -> None:
    files = unusual(tmp_path)
    rows = [{"prompt": "", "image": path.name, "mask_image": path.name} for path in files.values()]
    for path, item in zip(
        files.values(), read_items(table(tmp_path, *rows), StableDiffusionInpaintPipeline).each, strict=True
    ):
        opened = load_image(str(path))
        with Image.open(path) as shown:
            as_given = (
                read_items([{"prompt": "", "image": shown}], StableDiffusionInstructPix2PixPipeline).each[0].arguments
            )
        for arguments in (item.arguments, as_given):
            assert arguments["image"].mode == "RGB" and np.array_equal(arguments["image"], opened), path.stem
        assert np.array_equal(item.arguments["mask_image"], opened.convert("L")), path.stem


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_a_picture_that_diffusers_would_cut_is_refused(mode: str, tmp_path: Path) -> None:
    numbers = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    Image.fromarray(np.full((6, 8), 300, numbers)).save(tmp_path / "deep.tiff")
    with pytest.raises(UserError, match=f"row 1 .* image: .*deep.tiff .*of the mode {mode}, .* 8 bits"):
        read_items(table(tmp_path, {"prompt": "", "image": "deep.tiff"}), StableDiffusionInstructPix2PixPipeline)
