"""A synthetic pipeline for every trait that pipelines are known to have: the recorder meets each of them alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput
from torch import Tensor, nn

from tests.recording.synthetic_parts import CHANNELS, FRAMES, SIDE, WIDTH, Denoiser, Projection, TextEncoder, Traits


class TraitPipeline(DiffusionPipeline):
    """Text to image by flow matching, with `traits`."""

    embedded: float | None = None

    def __init__(self, network: Denoiser, text_encoder: TextEncoder, projection: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(network=network, text_encoder=text_encoder, projection=projection, scheduler=scheduler)

    @property
    def traits(self) -> Traits:
        return self.network.traits

    def encode_prompt(self, prompts: list[str], fixed: int | None = None) -> tuple[Any, Tensor | None]:
        kind = self.traits.text
        rows = [[ord(c) % 127 + 1 for c in prompt] or [0] for prompt in prompts]
        longest = max(len(row) for row in rows)
        if kind == "ragged_list":
            return [self.text_encoder(torch.tensor([row]))[0] for row in rows], None
        length = 20 if kind in ("fixed", "per_frame", "single_trimmed", "nested") else longest
        if kind == "single_trimmed" and len(prompts) == 1:
            length = longest
        padded = torch.tensor([(row + [0] * length)[:length] for row in rows])
        text = self.text_encoder(padded)
        mask = (padded > 0).float()
        mask[:, 0] = 1
        if kind == "mask_when_ragged":
            mask = None if bool((mask == 1).all()) else mask
        elif kind != "single_trimmed":
            mask = None
        return (text.repeat_interleave(FRAMES, 0) if kind == "per_frame" else text), mask

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        guidance_scale: float = 3.0,
        num_inference_steps: int = 8,
        generator: torch.Generator | None = None,
        output_type: str = "pt",
        return_dict: bool = True,
    ) -> Any:
        traits, scheduler, w = self.traits, self.scheduler, guidance_scale
        if traits.off == "above_one" and w < 1:
            raise ValueError("guidance_scale must be at least 1")
        guided = traits.guidance != "none" and {"zero": w > 0, "only_one": w != 1}.get(traits.off, w > 1)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        batch = len(prompts)
        told = [self._told(prompts)]
        if guided:
            if traits.negative == "zeros" and negative_prompt is None:
                empty = self._told(prompts)
                told.append((empty[0] * 0, empty[1]))
            else:
                stock = "blurry" if traits.negative == "stock" else ""
                given = stock if negative_prompt is None else negative_prompt
                told.append(self._told([given] * batch if isinstance(given, str) else given))
        if not traits.positive_first:
            told.reverse()
        self._set_timesteps(num_inference_steps)
        x = torch.randn(batch, *self._shape(), generator=generator).to(self.network.enter.weight.dtype)
        x = x * getattr(scheduler, "init_noise_sigma", 1.0)
        times = self._times()
        for i, t in enumerate(times):
            following = times[i + 1] if i + 1 < len(times) else torch.zeros(())
            given = scheduler.scale_model_input(x, t) if traits.scaled else x
            answers = self._answers(given, t, following, told)
            answer = answers[0]
            if guided:
                positive, negative = answers if traits.positive_first else answers[::-1]
                base = positive if traits.plus_one else negative
                answer = base + self._scale(w, t) * (positive - negative)
                if not traits.linear:
                    answer = answer * (positive.norm(dim=-1, keepdim=True) / answer.norm(dim=-1, keepdim=True))
            result = scheduler.step(answer, t, x, return_dict=False)[0]
            if traits.in_place:
                x[:] = result
            else:
                x = result
        if traits.layout == "packed":
            x = x.movedim(-1, 1).unflatten(-1, (SIDE, SIDE))
        image = ((x.movedim(-1, 1) if traits.layout == "last_all" else x) / 2 + 0.5).clamp(0, 1)
        return ImagePipelineOutput(images=image.squeeze(2) if traits.layout == "five_axes" else image)

    def _set_timesteps(self, count: int) -> None:
        kind = self.traits.own_grid
        if kind == "quadratic":
            self.scheduler.set_timesteps(sigmas=[1 - (i / count) ** 2 for i in range(count)])
        elif kind == "linear_quadratic":
            # Half of the steps go evenly through the first fortieth, the others ever faster: no grid of one step.
            first = count // 2
            even = [1 - i * 0.025 / first for i in range(first)]
            falling = [0.975 * (1 - (i / (count - first)) ** 2) for i in range(count - first)]
            self.scheduler.set_timesteps(sigmas=even + falling if first else [1 / first])
        elif kind == "integers":
            # The network is told whole numbers; the noise levels are shifted apart from them.
            times = torch.linspace(1000, 1, count).long().float()
            self.scheduler.set_timesteps(sigmas=(times / 1000).tolist(), timesteps=times.tolist(), mu=0.5)
        elif self.traits.dynamic_shift:
            self.scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / count, count).tolist(), mu=0.7)
        else:
            self.scheduler.set_timesteps(count)

    def _times(self) -> Tensor:
        return self.scheduler.timesteps

    def _scale(self, w: float, t: Tensor) -> float:
        return w

    def _shape(self) -> tuple[int, ...]:
        if self.traits.layout == "packed":
            return (SIDE * SIDE, CHANNELS)
        return (CHANNELS, 1, SIDE, SIDE) if self.traits.layout == "five_axes" else (CHANNELS, SIDE, SIDE)

    def _told(self, prompts: list[str]) -> tuple[Any, Tensor | None]:
        text, mask = self.encode_prompt(prompts)
        return (self.projection(text) if self.traits.projection else text), mask

    def _answers(self, x: Tensor, t: Tensor, following: Tensor, told: list[tuple[Any, Tensor | None]]) -> list[Tensor]:
        if self.traits.guidance != "batched" or len(told) == 1:
            return [self._ask(x, t, following, *one) for one in told]
        texts, masks = zip(*told, strict=True)
        if isinstance(texts[0], list):
            text: Any = [one for part in texts for one in part]
        else:
            length = max(part.shape[1] for part in texts)
            text = torch.cat([nn.functional.pad(part, (0, 0, 0, length - part.shape[1])) for part in texts])
        if any(mask is not None for mask in masks):
            full = [torch.ones(p.shape[:2]) if m is None else m for p, m in zip(texts, masks, strict=True)]
            mask = torch.cat([nn.functional.pad(m, (0, text.shape[1] - m.shape[1])) for m in full])
        else:
            mask = None
        return list(self._ask(torch.cat([x] * 2), t, following, text, mask).chunk(2))

    def _ask(self, x: Tensor, t: Tensor, following: Tensor, text: Any, mask: Tensor | None) -> Tensor:
        traits, batch = self.traits, len(x)
        told = {"rows": {"all": text, "none": None}, "count": 1} if traits.text == "nested" else text
        arguments: dict[str, Any] = {"text": told, "mask": mask, "timestep": self._time(t, batch), "scale": 2}
        if traits.next_time:
            arguments["next_timestep"] = self._time(following, batch)
        table = torch.linspace(0, 1, 6).view(3, 2)
        arguments["rotary"] = {
            "tuple": (table, table + 1),
            "list": [table, table * 2],
            "complex": torch.complex(table, table),
        }.get(traits.tables)
        if self.embedded is not None:
            arguments["ids"] = torch.full((batch, 1), float(self.embedded))
        if traits.tables == "text_ids":
            arguments["ids"] = torch.arange(text.shape[1]).float()[:, None].expand(-1, 3) / 10
        if traits.tables == "batch_ids":
            arguments["ids"] = table[None].repeat(batch, 1, 1)
        sample: Any = x
        if traits.layout == "last":
            sample = x.movedim(1, -1)
        elif traits.layout == "list":
            sample = list(x.unsqueeze(2).unbind())
        if traits.padded:
            axis = -1 if traits.layout == "last" else 1
            zeros = torch.zeros_like(sample).narrow(axis, 0, 2)
            sample = torch.cat([zeros, sample] if traits.padded == "front" else [sample, zeros], axis)
        output = self.network(hidden_states=sample, return_dict=False, **arguments)[0]
        if traits.layout == "list":
            output = torch.stack(output).squeeze(2)
        elif traits.layout == "last":
            output = output.movedim(-1, 1)
        if traits.output == "half_negated":
            output = -output.chunk(2, dim=1)[0]
        elif traits.output == "x0":
            output = (x - output) / torch.clamp(t / 1000, min=0.05)
        return output

    def _time(self, t: Tensor, batch: int) -> Tensor:
        match self.traits.time:
            case "scalar":
                return t
            case "cast":
                return t.expand(batch).to(self.network.enter.weight.dtype)
            case "one":
                return t[None] if t.dim() == 0 else t
            case "frames":
                return t.double().expand(batch, FRAMES)
            case "truncated":
                return t.expand(batch).long()
            case "thousandth":
                return t.expand(batch) / 1000
            case "reversed":
                return (1000 - t.expand(batch)) / 1000
            case "atan":
                return torch.atan(t / (1000 - t + 1e-6)).expand(batch) * (2 / math.pi)
        return t.expand(batch)


class TrueGuidancePipeline(TraitPipeline):
    """An embedded guidance, and a classifier-free one that wants a negative prompt as well as a scale."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        guidance_scale: float = 3.5,
        true_cfg_scale: float = 4.0,
        num_inference_steps: int = 8,
        generator: torch.Generator | None = None,
        output_type: str = "pt",
    ) -> Any:
        self.embedded = guidance_scale
        scale = 1.0 if negative_prompt is None else true_cfg_scale
        return super().__call__(prompt, negative_prompt, scale, num_inference_steps, generator)


def _scheduler(traits: Traits) -> FlowMatchEulerDiscreteScheduler:
    if traits.dynamic_shift or traits.own_grid == "integers":
        return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return FlowMatchEulerDiscreteScheduler(shift=1.0 if traits.own_grid == "linear_quadratic" else 2.0)


class ExpertPipeline(TraitPipeline):
    """Three networks split by time; each may have a guidance scale of its own."""

    #: The lowest timestep of the first, above which the second is called up to and with that of the second.
    FIRST, ABOVE_SECOND = 650.3, 200.0

    def __init__(
        self,
        network: Denoiser,
        middle: Denoiser,
        low: Denoiser,
        text_encoder: TextEncoder,
        projection: nn.Module,
        scheduler: Any,
    ) -> None:
        super().__init__(network, text_encoder, projection, scheduler)
        self.register_modules(middle=middle, low=low)
        self._scales: tuple[float, ...] = ()

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        guidance_scale: float = 3.0,
        guidance_scale_2: float | None = None,
        guidance_scale_3: float | None = None,
        num_inference_steps: int = 8,
        generator: torch.Generator | None = None,
        output_type: str = "pt",
    ) -> Any:
        later = [guidance_scale if w is None else w for w in (guidance_scale_2, guidance_scale_3)]
        self._scales = (guidance_scale, *later)
        return super().__call__(prompt, negative_prompt, guidance_scale, num_inference_steps, generator)

    def expert(self, t: Tensor) -> int:
        """Which of the three is called at a timestep."""
        return 0 if t >= self.FIRST else 1 if t > self.ABOVE_SECOND else 2

    def _scale(self, w: float, t: Tensor) -> float:
        return self._scales[self.expert(t)]

    def _ask(self, x: Tensor, t: Tensor, *rest: Any) -> Tensor:
        networks = self.__dict__
        first = networks["network"]
        try:
            networks["network"] = (first, networks["middle"], networks["low"])[self.expert(t)]
            return super()._ask(x, t, *rest)
        finally:
            networks["network"] = first


def synthetic_experts(
    traits: Traits, scheduler: Any = None, kind: type[ExpertPipeline] = ExpertPipeline, third: Traits | None = None
) -> ExpertPipeline:
    """Three experts of fixed random weights, different from each other; the third may have other traits."""
    one = synthetic(traits, scheduler)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        pipeline = kind(middle=Denoiser(traits), low=Denoiser(third or traits), **one.components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def synthetic(traits: Traits, scheduler: Any = None) -> TraitPipeline:
    """A pipeline with `traits` and fixed random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        pipeline = TraitPipeline(
            Denoiser(traits),
            TextEncoder(),
            Projection(WIDTH, WIDTH),
            _scheduler(traits) if scheduler is None else scheduler,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
