"""Where the samples of an evaluation come from: a model at one step count, or a set of images."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import diffusers
import torch
from torch import Tensor

from fewstep.conditioning.item import Item
from fewstep.data.durable import as_json, json_sha256
from fewstep.data.image_opening import UNREADABLE, opened, upright_size
from fewstep.data.images import RealImages, image_contents, read_images
from fewstep.errors import UserError
from fewstep.eval.conditions import SampleConditions
from fewstep.eval.generate import generate
from fewstep.eval.models import Model, in_steps
from fewstep.eval.samples import Made
from fewstep.eval.scorers.scorer import Asked
from fewstep.recording.pipeline import without_safety_checker
from fewstep.training.pictures import in_size
from fewstep.version import __version__

#: Counts the ways of making samples: those of an older one are not used again.
SAMPLING = 2


def reference_seed(seed: int) -> int:
    """The base seed of the teacher's own samples that all rows are compared with; they share none with the rows."""
    return int.from_bytes(hashlib.blake2b(f"reference:{seed}".encode(), digest_size=7).digest(), "little")


@dataclass
class ModelSource:
    """A model at one step count.

    Args:
        model: which.
        conditions: what its samples are asked for.
        steps: its step count.
        num: samples.
        seed: sample i is a function of it and of i.
        load: gives the pipeline; asked only where samples have to be made.
        machine: what their rounding depends on: device, dtype.
        label: tells it from others of the same name.
    """

    model: Model
    conditions: SampleConditions
    steps: int
    num: int
    seed: int
    load: Callable[[], Any]
    machine: tuple[str, ...]
    label: str = ""

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.model.name}, {in_steps(self.steps)}"

    @property
    def name(self) -> str:
        """Of its folders."""
        words = f"{self.model.name} {self.label} {self.steps}steps"
        return re.sub(r"[^\w.]+", "-", words, flags=re.ASCII).strip("-.")[:60].lower()

    @property
    def call(self) -> dict[str, Any]:
        """The keyword arguments of the pipeline, without the condition."""
        return {**self.model.call, "num_inference_steps": self.steps}

    @cached_property
    def content(self) -> Mapping[str, Any] | None:
        """All that the samples depend on, but for the size of a batch; None for a model that nothing identifies."""
        identity = self.model.fingerprint()
        if identity is None:
            return None
        about = {
            "version": [SAMPLING, __version__, torch.__version__, diffusers.__version__],
            "model": [identity, self.call],
            "conditions": json_sha256(self.conditions.about()),
            "samples": [self.num, self.seed],
            "machine": self.machine,
        }
        plain: dict[str, Any] = as_json(about)
        return plain

    @cached_property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the first sample, which those of items of other forms get; None for one form."""
        if len({self.conditions.form(index) for index in range(len(self.conditions.values))}) < 2:
            return None
        (first,) = generate(self.load(), self.call, self.conditions, [0], seed=self.seed, batch_size=1)
        height, width = first.images.shape[-2:]
        return height, width

    def make(self, indices: Sequence[int]) -> Iterator[Made]:
        """These samples, at once."""
        pipeline = self.load()
        with without_safety_checker(pipeline):  # what it blackens says nothing of the model
            made = generate(
                pipeline, self.call, self.conditions, indices, seed=self.seed, batch_size=max(1, len(indices))
            )
            for samples in made:
                yield Made(in_size(samples.images, self.size), samples.evaluations)

    def describe(self, index: int) -> Mapping[str, Any]:
        """A sample's base seed, and what it is asked for."""
        about: dict[str, Any] = {"seed": self.seed}
        if self.conditions.kind is not None:
            (value,) = self.conditions.take([index])
            about[self.conditions.kind] = str(value) if isinstance(value, Item) else value
            about |= {"prompt": value.subject} if isinstance(value, Item) and value.subject is not None else {}
        return about

    def prompts(self, indices: Sequence[int]) -> list[str] | None:
        """What samples are asked for, where that is text."""
        return self.conditions.prompts(indices)

    def asked(self, indices: Sequence[int]) -> Asked:
        """What samples are asked for, where that is text or an item."""
        return self.conditions.items(indices) or self.prompts(indices)


@dataclass
class ImageSource:
    """A set of images, as ``--data`` takes them.

    Args:
        place: where they are.
        shape: (C, H, W) of the samples that they are compared with.
        crop: fit each to that size (scaled until it covers it, cropped at the centre, Lanczos).
        what: of what it is, for its folders and for messages.
    """

    place: str
    shape: tuple[int, ...]
    crop: bool
    what: str = "reference"
    _images: RealImages = field(init=False)

    def __post_init__(self) -> None:
        self._images = read_images(self.place)

    @property
    def name(self) -> str:
        """Of its folders."""
        return self.what

    @property
    def num(self) -> int:
        """How many images there are."""
        return len(self._images)

    @cached_property
    def content(self) -> Mapping[str, Any]:
        """The digests of all images, and what is made of them."""
        known = image_contents(self._images, self.place)
        seen_as = list(self.shape) if self.crop else [self.shape[0]]
        return {"images": json_sha256(as_json(known)), "crop": self.crop, "shape": seen_as}

    def make(self, indices: Sequence[int]) -> Iterator[Made]:
        """These images. Raises UserError where one is of another size, and nobody asked to crop it."""
        yield Made(torch.stack([self._image(index) for index in indices]))

    def describe(self, index: int) -> Mapping[str, Any]:
        """Where an image came from."""
        files = self._images.files
        return {} if isinstance(files, Tensor) else {"from": str(files[index])}

    def asked(self, indices: Sequence[int]) -> Asked:
        """The texts that belong to images."""
        texts = self._images.texts
        return None if texts is None else [texts[index] for index in indices]

    def _image(self, index: int) -> Tensor:
        channels, height, width = self.shape[-3:]
        file = self._images.files[index]
        if isinstance(file, Tensor):
            size = (file.shape[-1], file.shape[-2])
        else:
            try:
                with opened(file, pixels=False) as picture:
                    size = upright_size(picture)
            except UNREADABLE as error:
                raise UserError(f"{file} is not an image that can be read; remove it from the {self.what}") from error
        if size != (width, height) and not self.crop:
            name = f"image {index}" if isinstance(file, Tensor) else file
            raise UserError(
                f"{name} of the {self.what} has {size[0]}x{size[1]} pixels, and the samples {width}x{height}: "
                "add --reference_crop to fit the images to them"
            )
        return self._images.image(index, channels, height, width)


def unique_names(sources: Sequence[ModelSource]) -> None:
    """Give sources that would share a folder labels of their own."""
    seen: dict[str, int] = {}
    for source in sources:
        count = seen[source.name] = seen.get(source.name, 0) + 1
        if count > 1:
            source.label = f"{source.label} {count}"
