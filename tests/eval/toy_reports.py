"""Reports as an evaluation makes them, with numbers chosen by hand, and pictures that are told apart by eye."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fewstep.eval.report import Measure, Report, protocol
from fewstep.eval.report.pictures import write_pictures

FRECHET = {"better": "lower", "reference": "the teacher's own samples", "n_ref": 1000, "resize": "clean, 299"}
MEASURES = {
    "fid": Measure(
        "FID",
        "fid",
        "{:.2f}",
        extractor="inception-2015-12-05",
        weights_sha256="ab" * 32,
        floor=2.5,
        floor_of="the teacher against itself with other seeds",
        **FRECHET,
    ),
    "fd_dino": Measure(
        "FD-DINOv2",
        "fd_dino",
        "{:.1f}",
        extractor="dinov2-vitl14",
        weights_sha256="cd" * 32,
        verified=False,
        floor_of="the reference is statistics alone",
        **FRECHET,
    ),
    "clip": Measure("CLIP score ViT-g-14", "clip", better="higher", scorer="ViT-g-14", weights_sha256="ef" * 32),
    "diversity": Measure("diversity", "diversity", "{:.2f}", better="near", extractor="dinov2-vitl14"),
}
CONDITIONS = ("a photo of a fox", "a bicycle in the rain", "two cups of tea")
#: (role, steps, FID, its spread, FD-DINOv2, CLIP score, diversity, latency in ms)
ROWS = (
    ("teacher", 4, 31.4, 0.5, 410.0, 0.301, 0.52, 130.0),
    ("teacher", 25, 4.0, 0.2, 95.0, 0.333, 0.61, 800.0),
    ("student", 1, 12.0, 0.3, 190.0, 0.322, 0.44, 20.0),
    ("student", 4, 5.0, 0.25, 120.0, 0.331, 0.55, 80.0),
)


def row(role: str, steps: int, numbers: tuple[float, ...], model: str = "") -> dict[str, Any]:
    """One row of the four measures; the ratio of latencies is to the teacher's 25 steps."""
    fid, spread, dino, clip, diversity, latency = numbers
    ratio = 800.0 / latency
    return {
        "model": model or role,
        "role": role,
        "steps": steps,
        "nfe": steps * (2 if role == "teacher" else 1),
        "num": 1000,
        "metrics": {"fid": fid, "fd_dino": dino, "clip": clip, "diversity": diversity},
        "spread": {"fid": spread},
        "call": {"num_inference_steps": steps},
        "speed": {
            "latency_ms": latency,
            "latency_p90_ms": latency * 1.1,
            "latency_ratio": ratio,
            "latency_ratio_low": ratio * 0.95,
            "latency_ratio_high": ratio * 1.05,
            "images_per_second": 2000.0 / latency,
            "device": "cpu x86_64",
            "dtype": "float32",
            "threads": 1,
            "torch": "2.14.0",
            "batch_size": 8,
        },
        "pictures": [],
    }


def toy_report(**fields: Any) -> Report:
    """A teacher at 4 and 25 steps, a student at 1 and 4; `fields` take the place of the report's own."""
    told: dict[str, Any] = {
        "protocol": protocol(num=1000, seed=0, conditions_sha256="12" * 32),
        "rows": [row(role, steps, numbers) for role, steps, *numbers in ROWS],
        "measures": dict(MEASURES),
        "num": 1000,
        "seed": 0,
        "conditions": {"kind": "prompt", "shown": list(CONDITIONS)},
        "skipped": ["patch_fid is skipped: the pictures are too small."],
        "notes": ["2 of 1,000 prompts were cut after 77 tokens."],
        "versions": {"fewstep": "0.1.0", "torch": "2.14.0"},
    }
    return Report(**{**told, **fields})


def with_pictures(report: Report, out: Path, size: int = 64) -> Report:
    """The same report with a picture for each row and condition in `out`: a gradient, noisier with fewer steps."""
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 255, size)
    for number, row in enumerate(report.rows):
        images = []
        for column in range(len(report.conditions["shown"])):
            layers = [ramp.expand(size, size), ramp.expand(size, size).T, torch.full((size, size), 80.0 * column)]
            noise = torch.randn(3, size, size, generator=generator) * 60 / row["steps"]
            images.append((torch.stack(layers) + noise).clamp(0, 255).to(torch.uint8))
        row["pictures"] = write_pictures(out, f"row_{number:02d}", torch.stack(images))
    return report
