"""The pictures that a report's rows show, as files beside it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import Tensor

from fewstep.data.durable import write_durably
from fewstep.eval.grid import contact_sheet, tile, to_pil

FOLDER = "pictures"


def write_pictures(out: Path, row: str, images: Tensor) -> list[str]:
    """One PNG for each shown sample of a row, of a video a contact sheet. Returns their paths relative to `out`.

    Args:
        out: folder of the report.
        row: name of the row's own folder.
        images: uint8 (columns, C, H, W), of videos (columns, frames, C, H, W).
    """
    (out / FOLDER / row).mkdir(parents=True, exist_ok=True)
    names = [f"{FOLDER}/{row}/{column:03d}.png" for column in range(len(images))]
    for name, image in zip(names, images):
        picture = to_pil(image) if images.ndim == 4 else tile(list(contact_sheet(image[None])))
        write_durably(out / name, partial(picture.save, format="PNG"))
    return names
