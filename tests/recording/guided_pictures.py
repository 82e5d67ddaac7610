"""Synthetic pipelines that are told a picture and guided: each in another way, all in the smallest form."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput
from picture_pipeline import CHANNELS, PictureNetwork, picture
from torch import Tensor

#: Every way in which such a pipeline is guided here.
WAYS = (
    "one_call",
    "two_calls",
    "unsaid",
    "dropped",
    "other_picture",
    "rescaled",
    "rescaled_channels",
    "deviation",
    "plus_one",
    "drawn",
    "drawn_apart",
    "masked",
    "filled",
)


class MaskedNetwork(PictureNetwork):
    """Reads of its texts what a mask keeps, where it is told one among its options."""

    def forward(self, hidden_states: Any, timestep: Tensor, text: Any = None, options: Any = None) -> Any:
        if "mask" not in options:
            return super().forward(hidden_states, timestep, text)
        rows = zip(hidden_states.split(1), timestep.split(1), text, options["mask"], strict=True)
        answers = [PictureNetwork.forward(self, x, t, one[kept][None])[0] for x, t, one, kept in rows]
        return (torch.cat(answers),)


class GuidedPictures(DiffusionPipeline):
    """From a prompt and a picture (3, 4, 4) to an image; `way` is how it is guided."""

    way = "one_call"

    def __init__(self, network: PictureNetwork, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(network=network, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | None = None,
        image: Tensor | None = None,
        negative_prompt: str | None = None,
        guidance_scale: float = 5.0,
        num_inference_steps: int = 8,
        generator: torch.Generator | None = None,
        output_type: str = "pt",
        return_dict: bool = True,
    ) -> Any:
        scales = {"guidance_scale": guidance_scale}
        return self._sample(prompt, image, negative_prompt, scales, num_inference_steps, generator)

    def _sample(
        self,
        prompt: str | None,
        image: Any,
        negative_prompt: str | None,
        scales: dict[str, float],
        steps: int,
        generator: torch.Generator | None,
    ) -> Any:
        image = image[None]
        if self.way == "drawn":
            image = image + 0.1 * torch.randn(image.shape, generator=generator)
        x = torch.randn(image.shape, generator=generator)
        self.scheduler.set_timesteps(steps)
        told = self.answers(prompt, negative_prompt, image, scales)
        if self.way == "drawn_apart":  # for each answer, and from the global state
            told = [(one, image + 0.1 * torch.randn(image.shape)) for one, image in told]
        for t in self.scheduler.timesteps:
            if self.way == "unsaid":  # the positive is told that an argument is None, the negative nothing of it
                said = [self.ask(x, t, [one], **({} if k else {"picture": None})) for k, one in enumerate(told)]
            elif self.way == "two_calls":
                said = [self.ask(x, t, [one]) for one in told]
            else:
                said = list(self.ask(x, t, told).split(1))
            x = self.scheduler.step(self.weighed(said, scales), t, x, return_dict=False)[0]
        return ImagePipelineOutput(images=x.clamp(0, 1))

    def answers(
        self, prompt: str | None, negative: str | None, image: Tensor, scales: dict[str, float]
    ) -> list[tuple[Tensor, Tensor]]:
        """Text and picture of each answer."""
        if scales["guidance_scale"] <= (0 if self.way == "plus_one" else 1):
            return [(text(prompt), image)]
        others = {"dropped": torch.zeros_like(image), "other_picture": torch.ones_like(image)}
        positive, away = (text(prompt), image), (text(negative), others.get(self.way, image))
        if self.way in ("masked", "filled"):  # it is shorter, or the positive
            away = (away[0].repeat(1, 2, 1)[:, : 1 if self.way == "masked" else 3], image)
        return [positive, away] if self.way in ("two_calls", "unsaid", "plus_one") else [away, positive]

    def ask(self, x: Tensor, t: Tensor, told: list[tuple[Tensor, Tensor]], **more: Any) -> Tensor:
        rows = torch.cat([torch.cat([x, image], 1) for _, image in told])
        if self.way in ("masked", "filled"):
            length = max(one.shape[1] for one, _ in told)
            mask = torch.stack([torch.arange(length) < one.shape[1] for one, _ in told])
            told = [(torch.nn.functional.pad(one, (0, 0, 0, length - one.shape[1])), image) for one, image in told]
            more = {"options": {} if mask.all() else {"mask": mask}}
        texts = torch.cat([one for one, _ in told])
        return self.network(rows, t.expand(len(rows)), text=texts, **more)[0][:, :CHANNELS]

    def weighed(self, said: list[Tensor], scales: dict[str, float]) -> Tensor:
        if len(said) == 1:
            return said[0]
        positive, away = said if self.way in ("two_calls", "unsaid", "plus_one") else said[::-1]
        if self.way == "plus_one":
            return positive + scales["guidance_scale"] * (positive - away)
        total = away + scales["guidance_scale"] * (positive - away)
        if self.way.startswith("rescaled"):
            axis = -1 if self.way == "rescaled" else 1
            total = total * positive.norm(dim=axis, keepdim=True) / total.norm(dim=axis, keepdim=True)
        if self.way == "deviation":
            total = 0.7 * total * positive.std() / total.std() + 0.3 * total
        return total


class ThreeAnswers(GuidedPictures):
    """Text and picture, picture alone, neither, as InstructPix2Pix; in another order than it has."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | None = None,
        image: Tensor | None = None,
        negative_prompt: str | None = None,
        guidance_scale: float = 5.0,
        image_guidance_scale: float = 1.5,
        num_inference_steps: int = 8,
        generator: torch.Generator | None = None,
        output_type: str = "pt",
        return_dict: bool = True,
    ) -> Any:
        scales = {"guidance_scale": guidance_scale, "image_guidance_scale": image_guidance_scale}
        return self._sample(prompt, image, negative_prompt, scales, num_inference_steps, generator)

    def answers(
        self, prompt: str | None, negative: str | None, image: Tensor, scales: dict[str, float]
    ) -> list[tuple[Tensor, Tensor]]:
        if scales["guidance_scale"] <= 1 or scales["image_guidance_scale"] < 1:
            return [(text(prompt), image)]
        away = text(negative)
        return [(away, torch.zeros_like(image)), (text(prompt), image), (away, image)]

    def weighed(self, said: list[Tensor], scales: dict[str, float]) -> Tensor:
        if len(said) == 1:
            return said[0]
        neither, both, alone = said
        total = neither + scales["guidance_scale"] * (both - alone)
        total = total + scales["image_guidance_scale"] * (alone - neither)
        return total * total.abs().sum().sqrt() if self.way == "odd" else total


class PlacedPictures(GuidedPictures):
    """No prompt, and a scale for each row of the sample, as Stable Video Diffusion has one for each frame."""

    @torch.no_grad()
    def __call__(
        self,
        image: Tensor | None = None,
        min_guidance_scale: float = 1.0,
        max_guidance_scale: float = 3.0,
        num_inference_steps: int = 8,
        generator: torch.Generator | None = None,
        output_type: str = "pt",
        return_dict: bool = True,
    ) -> Any:
        scales = {"low": min_guidance_scale, "guidance_scale": max_guidance_scale}
        return self._sample(None, image, None, scales, num_inference_steps, generator)

    def weighed(self, said: list[Tensor], scales: dict[str, float]) -> Tensor:
        if len(said) == 1:
            return said[0]
        away, positive = said
        w = torch.linspace(scales["low"], scales["guidance_scale"], away.shape[2])[None, None, :, None]
        return away + w * (positive - away)


def text(prompt: str | None) -> Tensor:
    """(1, 2, 3)."""
    letters = [ord(c) % 7 for c in ((prompt or "") + "abcdef")[:6]]
    return torch.tensor(letters).float().reshape(1, 2, CHANNELS)


def guided_pictures(kind: type[GuidedPictures] = GuidedPictures, way: str = "one_call") -> GuidedPictures:
    """A pipeline of one kind and way; the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = MaskedNetwork() if way in ("masked", "filled") else PictureNetwork()
        pipeline = kind(network, FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipeline.way = way
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def guided_items(kind: type[GuidedPictures] = GuidedPictures, count: int = 2) -> list[dict[str, Any]]:
    """Items with a picture of their own each, and a prompt where the pipeline takes one."""
    prompts: list[dict[str, Any]] = [{"prompt": f"{word} boat"} for word in "abcdef"]
    return [{**({} if kind is PlacedPictures else prompts[i]), "image": picture(i)} for i in range(count)]
