"""What the embedded inpainting teacher is asked for: real pictures with holes, by a seed.

    python -m fewstep.fashion.items runs/items --count 2000 --pictures training

writes an items file with its pictures, for ``--items runs/items/items.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import PIL.Image
from torch import Tensor

from fewstep.conditioning.item import Item
from fewstep.errors import UserError
from fewstep.fashion import held_back_images, training_images
from fewstep.fashion.holes import hole
from fewstep.fashion.prompts import PROMPTS

#: Whose pictures: those that trained the teacher, for a student to be trained with, or those that trained nothing.
Pictures = Literal["training", "held_back"]


def inpainting_items(count: int, seed: int = 0, pictures: Pictures = "held_back") -> list[Item]:
    """Items of the pipeline's arguments ``prompt``, ``image`` and ``mask_image``, white where it is repainted.

    Those to train with have their wanted result too, the whole picture (``--data targets``).

    Item i shows class i % 10, as samples of the text teachers do. A class's pictures are taken in an order drawn by the
    seed, and from the start again where there are no more (of ``held_back`` after 5,000 items, of ``training`` after
    10,000), with other holes. An item depends on the seed and on its number alone.

    Raises:
        UserError: fewer than one is asked for, or the package's pictures are damaged.
    """
    if count < 1:
        raise UserError(f"at least one item has to be asked for, not {count}")
    images, labels = held_back_images() if pictures == "held_back" else training_images()
    rows = [_order(labels, label, seed) for label in range(len(PROMPTS))]
    items = []
    for index in range(count):
        label, turn = index % len(PROMPTS), index // len(PROMPTS)
        of_class = rows[label]
        row = int(of_class[turn % len(of_class)])
        picture = _picture(images[row, 0]).convert("RGB")  # as every stock pipeline takes them
        arguments = {"prompt": PROMPTS[label], "image": picture, "mask_image": mask(seed, index)}
        if pictures == "training":
            arguments["target"] = picture  # what is wanted is what was there
        items.append(Item(arguments, name=f"{pictures} picture {row}"))
    return items


def mask(seed: int, index: int) -> PIL.Image.Image:
    """The hole of an item as the pipeline takes it: grey, 32x32, 255 where it is repainted."""
    return _picture(hole(seed, index) * 255)


def write_items(folder: Path, count: int, seed: int = 0, pictures: Pictures = "held_back") -> Path:
    """The items' pictures as PNG files, and ``items.jsonl`` with a row for each; returns its path.

    Raises:
        UserError: as :func:`inpainting_items`, or the folder cannot be written.
    """
    items = inpainting_items(count, seed, pictures)
    lines = []
    try:
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        for index, item in enumerate(items):
            row: dict[str, str] = {"prompt": item.arguments["prompt"]}
            for name in ("image", "mask_image"):
                row[name] = f"pictures/{index:05}_{name}.png"
                item.arguments[name].save(folder / row[name])
            row["target"] = row["image"]  # what is wanted is what was there
            lines.append(json.dumps(row))
        path = folder / "items.jsonl"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error})") from error
    return path


def _order(labels: Tensor, label: int, seed: int) -> np.ndarray:
    """The rows of one class, in an order drawn by the seed."""
    rows = (labels == label).nonzero()[:, 0].numpy()
    return np.random.default_rng([seed, label]).permutation(rows)


def _picture(grey: Tensor) -> PIL.Image.Image:
    """0 to 255, (32, 32), as a grey picture."""
    return PIL.Image.fromarray(grey.numpy().astype(np.uint8), mode="L")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for what the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m fewstep.fashion.items", description=__doc__)
    parser.add_argument("folder", type=Path, help="where items.jsonl and pictures/ go")
    parser.add_argument("--count", type=int, default=1000, help="how many items")
    parser.add_argument("--seed", type=int, default=0, help="which pictures, and which holes they have")
    parser.add_argument("--pictures", choices=get_args(Pictures), default="held_back", help="whose pictures")
    told = parser.parse_args(arguments)
    try:
        path = write_items(told.folder, told.count, told.seed, told.pictures)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
