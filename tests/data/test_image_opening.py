"""Images of every kind that people have: each is the picture that was meant, or is named with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from PIL import Image

from fewstep.data.image_opening import UNREADABLE, fitted, opened, upright, why_unreadable

ORANGE, SEEN = (255, 128, 0), 12  # how far a lossy format may be from the colour that was saved


def _plain() -> Image.Image:
    return Image.new("RGB", (8, 8), ORANGE)


def _frames() -> list[Image.Image]:
    return [_plain(), Image.new("RGB", (8, 8), "blue"), Image.new("RGB", (8, 8), "green")]


def _animated(path: Path) -> None:
    first, *others = _frames()
    first.save(
        path, save_all=True, append_images=others, duration=50, **({"lossless": True} if path.suffix == ".webp" else {})
    )


def _see_through(path: Path) -> None:
    """Orange at the left, nothing at the right, whose hidden colour is black."""
    picture = Image.new("RGBA", (8, 8), (*ORANGE, 255))
    picture.paste((0, 0, 0, 0), (4, 0, 8, 8))
    picture.save(path)


def _palette(path: Path) -> None:
    picture = Image.new("P", (8, 8), 0)
    picture.putpalette([*ORANGE, 0, 0, 0])
    picture.paste(1, (4, 0, 8, 8))
    picture.save(path, transparency=1)


WHOLE: dict[str, Callable[[Path], None]] = {
    "plain.png": lambda path: _plain().save(path),
    "plain.jpg": lambda path: _plain().save(path, quality=95),
    "press.jpg": lambda path: _plain().convert("CMYK").save(path, quality=95),
    "press.tiff": lambda path: _plain().convert("CMYK").save(path),
    "palette.png": lambda path: _plain().quantize(4).save(path),
    "animated.gif": _animated,
    "animated.webp": _animated,
    "animated.png": _animated,
    "wrong_name.jpg": lambda path: _plain().save(path, format="PNG"),
}


def _seen(path: Path, channels: int = 3) -> torch.Tensor:
    with opened(path) as picture:
        return fitted(upright(picture), channels, 8, 8).float()


@pytest.mark.parametrize("name", WHOLE)
def test_one_colour(tmp_path: Path, name: str) -> None:
    """Of an animation it is that of the first picture."""
    WHOLE[name](tmp_path / name)
    assert why_unreadable(tmp_path / name) == ""
    off = (_seen(tmp_path / name) - torch.tensor(ORANGE).view(3, 1, 1)).abs().max()
    assert off <= SEEN
    grey = _seen(tmp_path / name, channels=1)
    assert (grey - (0.299 * 255 + 0.587 * 128)).abs().max() <= SEEN


@pytest.mark.parametrize(
    ("name", "save"), [("alpha.png", _see_through), ("palette.png", _palette), ("palette.gif", _palette)]
)
def test_what_is_transparent_is_white(tmp_path: Path, name: str, save: Callable[[Path], None]) -> None:
    save(tmp_path / name)
    seen = _seen(tmp_path / name)
    assert torch.equal(seen[:, :, :4], torch.tensor(ORANGE).view(3, 1, 1).expand(3, 8, 4).float())
    assert (seen[:, :, 4:] == 255).all()


@pytest.mark.parametrize("name", ["deep.png", "deep.tiff"])
def test_sixteen_bits_are_not_clipped(tmp_path: Path, name: str) -> None:
    Image.fromarray(np.full((8, 8), 0x8000, np.uint16)).save(tmp_path / name)
    assert (_seen(tmp_path / name, channels=1) - 127.5).abs().max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_camera_that_was_turned(tmp_path: Path, orientation: int) -> None:
    """The file's upper left corner is where EXIF's table of orientations says."""
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:4, :4] = 255
    picture = Image.fromarray(pixels)
    exif = picture.getexif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "turned.png", exif=exif)
    corner = {1: (0, 0), 2: (0, 7), 3: (7, 7), 4: (7, 0), 5: (0, 0), 6: (0, 7), 7: (7, 7), 8: (7, 0)}[orientation]
    seen = _seen(tmp_path / "turned.png", channels=1)[0]
    assert seen[corner] == 255 and seen.sum() == 16 * 255


def _cut_off(path: Path) -> None:
    Image.effect_noise((32, 32), 80).save(path)
    path.write_bytes(path.read_bytes()[:-200])


def _fractions(path: Path) -> None:
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(path)


def _script(path: Path) -> None:
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")


NAMED: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut.png": (_cut_off, "truncated"),
    "cut.jpg": (_cut_off, "truncated"),
    "fractions.tiff": (_fractions, "whose white is not known"),
    "empty.png": (lambda path: path.write_bytes(b""), "cannot identify"),
    "text.png": (lambda path: path.write_text("a cat"), "cannot identify"),
    "script.png": (_script, "cannot identify"),
}


@pytest.mark.parametrize("name", NAMED)
def test_what_is_no_picture_is_named(tmp_path: Path, name: str) -> None:
    make, words = NAMED[name]
    make(tmp_path / name)
    why = why_unreadable(tmp_path / name)
    assert name in why and words in why and "\n" not in why


def test_more_pixels_than_the_limit_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is Pillow's own, lowered here; it counts what the header says, before a pixel is read."""
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 30)
    _plain().save(tmp_path / "large.png")
    assert "large.png" in why_unreadable(tmp_path / "large.png")
    with pytest.raises(UNREADABLE), opened(tmp_path / "large.png", pixels=False):
        pass


def test_a_very_long_picture_is_cut_before_it_is_scaled(tmp_path: Path) -> None:
    """Scaled to cover 8 x 8 it would be 8 x 64,000; the middle is what was meant anyway."""
    long = Image.new("L", (8000, 1), 0)
    long.paste(200, (3990, 0, 4010, 1))
    long.save(tmp_path / "long.png")
    assert (_seen(tmp_path / "long.png", channels=1) == 200).all()
