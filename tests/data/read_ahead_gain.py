"""What threads that read images gain beside a device that is waited for: a program, for docs/distill.md.

    python tests/data/read_ahead_gain.py FOLDER      images are made there

The device is a sleep, once and twice as long as the images of its step take to read; blocks take turns.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median

import torch
from PIL import Image

from fewstep.data.images import RealImages, read_images
from fewstep.data.read_ahead import ReadAhead

BATCH, STEPS, BLOCKS, SIZE = 4, 20, 3, 1024
WORKERS = (0, 1, 2, 4)


def make(folder: Path) -> None:
    """Write photographs' size and smoothness, without their content."""
    (folder / "any").mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for number in range(BATCH * STEPS):
        small = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8)
        picture = Image.fromarray(small.numpy()).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        picture.save(folder / "any" / f"{number}.jpg", quality=92)


def seconds(images: RealImages, workers: int, device: float) -> float:
    """Of a step."""
    reader = ReadAhead(lambda row: images.image(row, 3, SIZE, SIZE), workers)
    began = time.perf_counter()
    for step in range(STEPS):
        rows = range(BATCH * step, BATCH * (step + 1))
        reader.take(rows)
        reader.announce((row + BATCH) % len(images) for row in rows)
        time.sleep(device)
    return (time.perf_counter() - began) / STEPS


def main(folder: Path) -> None:
    """Print a line for each length of the device's step."""
    make(folder)
    images = read_images(str(folder))
    seconds(images, 0, 0.0)
    reading = seconds(images, 0, 0.0)
    for device in (reading, 2 * reading):
        found: dict[int, list[float]] = {workers: [] for workers in WORKERS}
        for block in range(BLOCKS):
            for workers in WORKERS if block % 2 else reversed(WORKERS):
                found[workers].append(seconds(images, workers, device))
        ratios = {workers: round(median(times) / median(found[0]), 2) for workers, times in found.items()}
        print(f"reading {reading:.3f} s, device {device:.3f} s: a step by --data_workers, over that with 0: {ratios}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
