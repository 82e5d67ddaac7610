"""Pictures to look at: a labelled grid of models, contact sheets of videos. Pillow only."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SMALLEST_CELL = 96
LARGEST_CELL = 256
GAP = 4
MARGIN = 8
LABEL_LINES = 3
FONT_SIZE = 13
BACKGROUND = "white"
INK = "black"


@dataclass(frozen=True)
class GridRow:
    """label: what stands left of the row. images: uint8 (columns, C, H, W) or videos (columns, frames, C, H, W)."""

    label: str
    images: Tensor


def to_pil(image: Tensor) -> Image.Image:
    """uint8 (C, H, W) with 1 or 3 channels -> a grey or RGB picture."""
    array = np.moveaxis(image.numpy(), 0, -1)
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def contact_sheet(videos: Tensor, frames: int = 8) -> Tensor:
    """uint8 (B, F, C, H, W) -> (B, min(F, frames), C, H, W): evenly spaced frames, first and last among them."""
    count = min(videos.shape[1], frames)
    return videos[:, np.linspace(0, videos.shape[1] - 1, count).round().astype(int).tolist()]


def tile(rows: Sequence[Tensor]) -> Image.Image:
    """Rows of pictures, each uint8 (columns, C, H, W), side by side at their own size and without labels."""
    height, width = rows[0].shape[-2:]
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * (width + GAP) - GAP, len(rows) * (height + GAP) - GAP), BACKGROUND)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            sheet.paste(to_pil(image), (c * (width + GAP), r * (height + GAP)))
    return sheet


def draw_grid(
    rows: Sequence[GridRow], column_labels: Sequence[str] = (), *, smallest: int = SMALLEST_CELL
) -> Image.Image:
    """Rows of models, columns of the same seed and condition, with labels left and above.

    Small pictures are enlarged by a whole factor without smoothing, up to `smallest` pixels, large ones reduced; videos
    show their middle frame.
    Raises ValueError when there is no row.
    """
    if not rows:
        raise ValueError("a grid needs at least one row")
    font = ImageFont.load_default(FONT_SIZE)
    line_height = FONT_SIZE + 3
    stills = [row.images[:, row.images.shape[1] // 2] if row.images.ndim == 5 else row.images for row in rows]
    columns = max(len(row) for row in stills)
    cells = [_cell_size(row.shape[-1], row.shape[-2], smallest) for row in stills]
    width = max(cell[0] for cell in cells)
    headers = [_wrap(label, font, width) for label in column_labels[:columns]]
    left = MARGIN + max(round(font.getlength(row.label)) for row in rows) + MARGIN
    top = MARGIN + max((len(lines) for lines in headers), default=0) * line_height + GAP
    size = (left + columns * (width + GAP) + MARGIN, top + sum(cell[1] + GAP for cell in cells) + MARGIN)
    sheet = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for c, lines in enumerate(headers):
        for k, line in enumerate(lines):
            x = left + c * (width + GAP) + (width - font.getlength(line)) / 2
            draw.text((x, MARGIN + k * line_height), line, INK, font=font)
    y = top
    for row, images, cell in zip(rows, stills, cells):
        draw.text((MARGIN, y + (cell[1] - line_height) / 2), row.label, INK, font=font)
        for c, image in enumerate(images):
            enlarged = cell[0] > image.shape[-1]
            picture = to_pil(image).resize(cell, Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)
            sheet.paste(picture, (left + c * (width + GAP), y))
        y += cell[1] + GAP
    return sheet


def _cell_size(width: int, height: int, smallest: int) -> tuple[int, int]:
    """Size of a picture in the grid: a whole multiple of a small one, a reduced large one."""
    longest = max(width, height)
    if longest > LARGEST_CELL:
        return round(width * LARGEST_CELL / longest), round(height * LARGEST_CELL / longest)
    factor = max(1, smallest // longest)
    return width * factor, height * factor


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """At most `LABEL_LINES` lines of whole words no wider than `width`; what does not fit becomes an ellipsis."""
    lines = [""]
    for word in text.split():
        candidate = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(candidate) <= width:
            lines[-1] = candidate
        else:
            lines.append(word)
    if len(lines) > LABEL_LINES:
        lines = [*lines[: LABEL_LINES - 1], lines[LABEL_LINES - 1] + " …"]
    return [_shorten(line, font, width) for line in lines]


def _shorten(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    while len(line) > 1 and font.getlength(line) > width:
        line = line.rstrip(" …")[:-1] + "…"
    return line
