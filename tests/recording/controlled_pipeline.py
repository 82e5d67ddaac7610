"""A synthetic pipeline with a control network: its answers go to the network in every step, and a share switches it.

Guided, both networks are called for both halves; in the way "once" the control network is called for the positive half
alone and serves both calls of the network, and with `guess` it serves the positive half and zeros the other.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput
from torch import Tensor, nn

CHANNELS, SIDE, WIDTH = 3, 4, 8


class ControlNetwork(nn.Module):
    """Two answers of the sample's size for each channel of the hidden ones, and one in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.seen = nn.Linear(CHANNELS, WIDTH), nn.Linear(CHANNELS, WIDTH)
        self.leave, self.middle = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.calls, self.keyed = 0, False

    @property
    def dtype(self) -> torch.dtype:
        return self.enter.weight.dtype

    def forward(
        self, sample: Tensor, timestep: Tensor, text: Tensor, condition: Tensor, scale: float = 1.0, guess: bool = False
    ) -> Any:
        self.calls += 1
        flat, shown = sample.flatten(2).transpose(1, 2), condition.flatten(2).transpose(1, 2)
        time = torch.sin(timestep.float() / 200 + text.mean((1, 2)))[:, None, None].to(sample)
        h = torch.tanh(self.enter(flat) + self.seen(shown) * (1 + time))
        residuals = [scale * self.leave(h), scale * h * time]
        middle = scale * self.middle(torch.sin(h).mean(1))
        return ({0: residuals[0], 3: residuals[1]} if self.keyed else residuals), middle


class ControlledNetwork(nn.Module):
    """Answers entry by entry, told what the control network answered."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.told = nn.Linear(CHANNELS, WIDTH), nn.Linear(CHANNELS, WIDTH)
        self.leave = nn.Linear(WIDTH, CHANNELS)

    @property
    def dtype(self) -> torch.dtype:
        return self.enter.weight.dtype

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        text: Tensor,
        residuals: tuple[Tensor, ...] | dict[int, Tensor] | None = None,
        middle: Tensor | None = None,
        extra: Tensor | None = None,
    ) -> Any:
        h = self.enter(hidden_states.flatten(2).transpose(1, 2)) + self.told(text).mean(1, keepdim=True)
        h = h + torch.sin(timestep.float() / 300)[:, None, None].to(h)
        for place, residual in dict(residuals if isinstance(residuals, dict) else enumerate(residuals or ())).items():
            h = torch.tanh(h + residual * (1 + place))
        if middle is not None:
            h = h + middle[:, None]
        out = self.leave(torch.tanh(h)).transpose(1, 2).reshape(hidden_states.shape)
        return (out,)


class ControlledPipeline(DiffusionPipeline):
    """From a prompt and a picture (3, 4, 4) to an image by flow matching; `way` is how the control goes wrong."""

    way = ""

    def __init__(self, network: ControlledNetwork, control: ControlNetwork, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(network=network, control=control, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt: Any = None,
        image: Any = None,
        control_scale: float = 0.8,
        control_start: float = 0.0,
        control_end: float = 1.0,
        guidance_scale: float = 1.0,
        guess: bool = False,
        num_inference_steps: int = 25,
        generator: torch.Generator | None = None,
        output_type: str = "pt",
        return_dict: bool = True,
    ) -> Any:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        pictures = torch.stack(image if isinstance(image, list) else [image] * len(prompts))
        letters = [[ord(c) % 7 for c in (one + "abcdef")[:6]] for one in prompts]
        text = torch.tensor(letters).float().reshape(len(prompts), 2, CHANNELS)
        x = torch.randn(len(prompts), CHANNELS, SIDE, SIDE, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for i, t in enumerate(self.scheduler.timesteps):
            share, time = num_inference_steps, t.expand(len(x))
            on = i / share >= control_start and (i + 1) / share <= control_end
            scale = control_scale * on
            if self.way == "ramp" and i % 2:
                scale = control_scale / 2
            told = {"text": text}
            if guidance_scale > 1:
                answer = self._guided(x, time, text, pictures, scale, guidance_scale, guess)
                x = self.scheduler.step(answer, t, x, return_dict=False)[0]
                continue
            if self.way != "some" or i < 2:
                residuals, middle = self.control(x, time, text, condition=pictures, scale=scale, guess=False)
                if self.way == "changed":
                    residuals, middle = [residual + 1 for residual in residuals], middle + 1
                told |= {"residuals": given(residuals), "middle": middle}
            x = self.scheduler.step(self.network(x, time, **told)[0], t, x, return_dict=False)[0]
        return ImagePipelineOutput(images=(x / 2 + 0.5).clamp(0, 1))

    def _guided(
        self, x: Tensor, time: Tensor, text: Tensor, pictures: Tensor, scale: float, weight: float, guess: bool
    ) -> Tensor:
        """What the scheduler is given under guidance; the negative text is zeros."""
        texts, rows = [torch.zeros_like(text), text], len(x)
        if self.way == "once" or guess:
            residuals, middle = self.control(x, time, text, condition=pictures, scale=scale, guess=guess)
        if self.way == "once":
            told = {"residuals": given(residuals), "middle": middle}
            negative = self.network(x, time, texts[0], extra=None, **told)[0]
            return negative + weight * (self.network(x, time, text, **told)[0] - negative)
        twice, both = torch.cat([x, x]), torch.cat(texts)
        if guess:
            residuals = [torch.cat([torch.zeros_like(part), part]) for part in residuals]
            middle = torch.cat([torch.zeros_like(middle), middle])
        else:
            shown = torch.cat([pictures, pictures])
            residuals, middle = self.control(twice, time.repeat(2), both, condition=shown, scale=scale, guess=False)
        answer = self.network(twice, time.repeat(2), both, residuals=given(residuals), middle=middle)[0]
        return answer[:rows] + weight * (answer[rows:] - answer[:rows])


def given(residuals: Any) -> Any:
    """As the network is told them: under their keys where they have some, else one after the other."""
    return residuals if isinstance(residuals, dict) else tuple(residuals)


def controlled_pipeline(way: str = "", shift: float = 3.0) -> ControlledPipeline:
    """The same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        pipeline = ControlledPipeline(ControlledNetwork(), ControlNetwork(), scheduler)
    pipeline.way = way
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def controlled_items(count: int = 2) -> list[dict[str, Any]]:
    """Items with a prompt and a picture of their own each."""
    pictures = [torch.randn(CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(i)) for i in range(count)]
    return [{"prompt": f"{'abcdefghij'[i]} boat", "image": pictures[i]} for i in range(count)]
