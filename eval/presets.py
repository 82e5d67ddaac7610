"""The protocols of papers, as settings of an evaluation.

A number of one protocol does not compare with one of another, so a preset fixes all that it consists of: how many
samples, how they become the network's input, which networks, and at which sizes the reference's images are seen.
"""

from __future__ import annotations

from typing import Any

from fewstep.errors import UserError

PRESETS: dict[str, dict[str, Any]] = {
    # EDM (Karras et al. 2022), consistency models, DMD and DMD2 on ImageNet 64 and CIFAR-10: TensorFlow's bilinear
    # resize without antialiasing, 50,000 samples against the training set's statistics.
    "in64-50k": {"num": 50_000, "metrics": ("fid", "kid", "prdc", "diversity"), "fid_mode": "legacy_tensorflow"},
    # GigaGAN (Kang et al. 2023), DMD, DMD2 and SiD-LSG on COCO 2014: 30,000 prompts, images cropped to squares of the
    # samples' size with Lanczos, clean-fid's resize, CLIP score by ViT-g-14.
    "coco14-30k-gigagan": {
        "num": 30_000,
        "metrics": ("fid", "patch_fid", "clip", "diversity"),
        "fid_mode": "clean",
        "clip_model": "ViT-g-14 laion2b_s12b_b42k",
        "reference_crop": True,
    },
    # DMD2 and its successors on SDXL: 10,000 prompts of COCO 2014 at 1,024 pixels.
    "coco10k-1024": {
        "num": 10_000,
        "metrics": ("fid", "patch_fid", "clip", "diversity"),
        "fid_mode": "clean",
        "clip_model": "ViT-g-14 laion2b_s12b_b42k",
        "reference_crop": True,
    },
    # What needs no data: how far is the student from the teacher's own samples?
    "vs-teacher-5k": {
        "num": 5000,
        "reference": "teacher",
        "metrics": ("fid", "fd_dino", "cmmd", "prdc", "clip", "diversity", "saturation", "speed"),
    },
}


def with_preset(name: str | None, told: dict[str, Any]) -> dict[str, Any]:
    """The settings of a preset, and what else was told.

    Args:
        name: of the preset; None for none.
        told: settings that the user gave; None where one was not given.

    Raises:
        UserError: there is no such preset, or a setting that it fixes was given another value.
    """
    given = {key: value for key, value in told.items() if value is not None}
    if name is None:
        return given
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
    fixed = PRESETS[name]
    if changed := [key for key, value in fixed.items() if key in given and given[key] != value]:
        raise UserError(f"--preset {name} fixes {', '.join(changed)}; leave it out, or take no preset")
    return {**given, **fixed}
