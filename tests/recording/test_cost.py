"""What `record` costs: a picture's teacher beside a text-only one of the same family, by counts and by the clock."""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zoo_image
from diffusers import DiffusionPipeline

from fewstep.recording import RecordingError, record
from fewstep.recording.watch import subject

#: The text-only pipeline of the same family in the folder of such; Stable Video Diffusion has no prompt, and none.
TEXT_ONLY = {
    "InstructPix2Pix": "StableDiffusion",
    "Inpaint4": "StableDiffusion",
    "InpaintXL9": "StableDiffusionXL",
    "ControlNetXL": "StableDiffusionXL",
    "LTXImageToVideo": "LTX",
    "Wan22TI2V": "Wan",
    "WanFirstLastFrame": "Wan",
    "HunyuanVideoImageToVideo": "HunyuanVideo",
    "QwenImageEditPlus": "QwenImage",
}
_REPEATS = 5


class Cost:
    """A call's CPU seconds, forward passes of the denoisers and runs of the pipeline."""

    def __init__(self, pipeline: Any, make: Callable[[], Any]) -> None:
        self.passes = self.runs = 0
        observe = subject.observe

        def counted(forward: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(forward)
            def count(*args: Any, **kwargs: Any) -> Any:
                self.passes += 1
                return forward(*args, **kwargs)

            return count

        def run(*args: Any, **kwargs: Any) -> Any:
            self.runs += 1
            return observe(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            for name in ("unet", "transformer", "transformer_2"):
                if (network := getattr(pipeline, name, None)) is not None:
                    patch.setattr(network, "forward", counted(network.forward))
            patch.setattr(subject, "observe", run)
            start = time.process_time()
            make()
            self.seconds = time.process_time() - start

    @property
    def each(self) -> float:
        """Milliseconds for each forward pass."""
        return 1000 * self.seconds / self.passes


def _text_only(folder: Path, name: str) -> Callable[[], Cost]:
    pipeline = DiffusionPipeline.from_pretrained(folder / name, local_files_only=True)
    call = json.loads((folder / "manifest.json").read_text())[name]["call"]
    return lambda: Cost(pipeline, lambda: record(pipeline, **call))


def _of_pictures(name: str) -> Callable[[], Cost]:
    pipeline, items, call = zoo_image.load(name), zoo_image.items_of(name), zoo_image.call_of(name)

    def make() -> None:
        if name in zoo_image.TRAINED:
            record(pipeline, items=items, **call)
            return
        with pytest.raises(RecordingError, match="is told nothing of"):
            record(pipeline, items=items, **call)

    return lambda: Cost(pipeline, make)


def test_a_picture_costs_few_more_passes_and_runs(zoo: Path) -> None:
    pictures, text = _of_pictures("InstructPix2Pix")(), _text_only(zoo, "StableDiffusion")()
    assert pictures.passes <= 2 * text.passes and pictures.runs <= 3 * text.runs


@pytest.mark.soak
@pytest.mark.usefixtures("small_references", "texts_as_they_are")
@pytest.mark.parametrize("name", TEXT_ONLY)
def test_a_pass_costs_at_most_three_of_a_text_only_pipeline(name: str, zoo: Path) -> None:
    """Medians of runs in turn; ``-s`` prints them."""
    sides = _of_pictures(name), _text_only(zoo, TEXT_ONLY[name])
    costs = [[side() for side in sides] for _ in range(_REPEATS)]
    pictures, text = (statistics.median(cost.each for cost in column) for column in zip(*costs, strict=True))
    own, other = (f"{cost.passes} passes, {cost.runs} runs" for cost in costs[0])
    print(f"\n{name}: {pictures:.1f} ms, {own}; {TEXT_ONLY[name]}: {text:.1f} ms, {other}; {pictures / text:.2f}")
    assert pictures <= 3 * text
