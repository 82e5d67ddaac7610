"""Any folder of pipelines: each sub-folder with a model_index.json is one; a manifest.json may say how it is called."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

#: What is tried where the folder lies in its usual place; every pipeline takes seconds, and --zoo asks for all.
SAMPLE = ("Flux", "PixArtSigma", "StableDiffusionXL")
#: Of those that `make soak` tries, what `make test` does.
SHORT = ("Flux", "PixArtSigma", "Sana", "StableDiffusion3", "Wan")


def names(config: pytest.Config, *, sample: bool, short: bool = True) -> list[Any]:
    """The pipelines to try as pytest's parameters, a skipped one where there is no folder.

    Args:
        sample: only ``SAMPLE``, unless a folder is given.
        short: all but ``SHORT`` are left to the soak, unless a folder is given.
    """
    folder = config.getoption("zoo")
    found = sorted(path.parent.name for path in folder.glob("*/model_index.json")) if folder else []
    if not config.option.zoo_given:
        found = [name for name in found if name in SAMPLE or not sample]
        if short:
            found = [name if name in SHORT else pytest.param(name, marks=pytest.mark.soak) for name in found]
    return found or [pytest.param("none", marks=pytest.mark.skip(reason="no folder of tiny pipelines: give --zoo DIR"))]


def call_of(folder: Path, name: str, pipeline: Any) -> dict[str, Any]:
    """The keyword arguments of a pipeline's call: the manifest's, else a prompt or a label and its own defaults."""
    manifest = folder / "manifest.json"
    known = json.loads(manifest.read_text()) if manifest.is_file() else {}
    if name in known:
        return dict(known[name]["call"])
    parameters = inspect.signature(type(pipeline).__call__).parameters
    stand_ins = {"prompt": "a b lower", "class_labels": [1]}
    return {argument: value for argument, value in stand_ins.items() if argument in parameters}


def denoiser(pipeline: Any) -> nn.Module:
    """The network to shake: by its usual names, else the largest that neither encodes nor decodes."""
    modules = {n: part for n, part in pipeline.components.items() if isinstance(part, nn.Module)}
    for name in ("unet", "transformer"):
        if name in modules:
            return modules[name]
    others = [m for n, m in modules.items() if "encoder" not in n and not hasattr(m, "decode")]
    return max(others, key=lambda module: sum(parameter.numel() for parameter in module.parameters()))
