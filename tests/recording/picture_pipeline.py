"""A synthetic pipeline for every way in which a picture is told to a network: the recorder meets each of them alone."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput
from torch import Tensor, nn

CHANNELS, FRAMES, SIDE, WIDTH = 3, 4, 4, 16
#: The seed of the first pinned picture, which is not to be the noise that the recording's seeds draw.
FIRST_PINNED = 20

#: Every way that is recorded.
RECORDABLE = (
    "channels",
    "channels_before",
    "drawn",
    "global_draw",
    "tokens_behind",
    "tokens_before",
    "frame_not_stepped",
    "frame_mixed_in",
    "frames_scattered",
    "list",
    "two_rows",
    "argument",
    "argument_shared",
    "no_prompt",
    "negated",
    "several_of_one",
    "trace",
    "pinned",
    "pinned_clean",
    "pinned_clean_in_place",
)


class PictureNetwork(nn.Module):
    """Answers entry by entry, told by everything: every entry, the times of all entries, text and pictures apart."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.mix, self.leave = nn.Linear(1, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        self.time, self.told = nn.Linear(WIDTH, WIDTH), nn.Linear(CHANNELS, WIDTH)

    @property
    def dtype(self) -> torch.dtype:
        return self.enter.weight.dtype

    def forward(
        self, hidden_states: Any, timestep: Tensor, text: Tensor | None = None, picture: Tensor | None = None
    ) -> Any:
        x = hidden_states
        if isinstance(x, list):
            x = torch.stack([torch.cat(one) if isinstance(one, list) else one for one in x])
        batch = len(x)
        flat = x.reshape(batch, -1, 1)
        places = torch.arange(flat.shape[1]).to(flat) / flat.shape[1]
        angles = timestep.float().reshape(batch, -1, 1) / 300 + torch.arange(WIDTH)
        h = self.enter(flat) + torch.sin(angles).to(flat).matmul(self.time.weight).mean(1, keepdim=True)
        h = torch.tanh(h + torch.sin(7 * places)[None, :, None])
        h = h + self.mix(torch.sin(3 * h + 9 * places[None, :, None])).mean(1, keepdim=True)
        for told in (text, picture):
            if told is not None:
                h = h + self.told(told).reshape(batch, -1, WIDTH).mean(1, keepdim=True)
        out = self.leave(torch.tanh(h)).reshape(x.shape)
        return (list(out.unbind()) if isinstance(hidden_states, list) else out,)


class PicturePipeline(DiffusionPipeline):
    """From a prompt and a picture (3, 4, 4), or several, to an image by flow matching; `way` is how it is told."""

    way = "channels"

    def __init__(self, network: PictureNetwork, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(network=network, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt: Any = None,
        image: Any = None,
        mask: Any = None,
        strength: float = 1.0,
        jitter: float = 0.1,
        place: int = 0,
        num_inference_steps: int = 8,
        generator: torch.Generator | None = None,
        output_type: str = "pt",
        return_dict: bool = True,
    ) -> Any:
        way, scheduler = self.way, self.scheduler
        prompts = [prompt] if isinstance(prompt, str) or prompt is None else prompt
        batch = len(prompts)
        if way == "several_of_one" and batch > 1:
            raise ValueError("one prompt at a time")
        pictures = self._pictures(image, batch)
        text = None
        if way != "no_prompt":
            letters = [[ord(c) % 7 for c in (one + "abcdef")[:6]] for one in prompts]
            text = torch.tensor(letters).float().reshape(batch, 2, CHANNELS)
        drawn = {"drawn": generator, "global_draw": None}.get(way, "mode")
        if drawn != "mode":
            pictures = pictures + jitter * torch.randn(pictures.shape, generator=drawn)
        video = way.startswith(("frame", "pinned_clean"))
        tokens = way.startswith("tokens") or way == "several_of_one"
        shape = (CHANNELS, FRAMES, SIDE, SIDE) if video else (SIDE * SIDE, CHANNELS) if tokens else pictures.shape[1:]
        x = torch.randn(batch, *shape[: len(shape)], generator=generator)
        if way == "frame_not_stepped":
            x = x[:, :, 1:]
        if way == "trace":
            x = 0.99 * x + 0.01 * pictures
        if way.startswith("pinned_clean"):
            x[:, :, 0] = pictures
        noise = x
        by_size = scheduler.config.get("use_dynamic_shifting", False)
        scheduler.set_timesteps(num_inference_steps, **({"mu": x[0].numel() / 100} if by_size else {}))
        times = scheduler.timesteps
        if way in ("pinned", "pinned_anew") and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)  # as pipelines do whose scheduler noises their pictures
        if way == "starts" or strength < 1:
            begin = len(times) - max(1, int(len(times) * strength))
            scheduler.set_begin_index(begin)
            times = times[begin:]
            sigma = scheduler.sigmas[begin]
            x = (1 - sigma) * pictures + sigma * x
        if way == "asked_before":
            self.network(pictures, torch.zeros(batch), text)
        for number, t in enumerate(times):
            shown = way != "kept_of_the_first" or number == 0
            answer = self._ask(x, t, text, pictures if shown else None, jitter, place)
            x = scheduler.step(answer, t, x, return_dict=False)[0]
            if way.startswith("pinned"):
                x = self._pinned(x, pictures, mask, noise, times[number + 1 : number + 2], jitter)
        return ImagePipelineOutput(images=self._shown(x, pictures))

    def _shown(self, x: Tensor, pictures: Tensor) -> Tensor:
        """Images of the last sample."""
        return (x / 2 + 0.5).clamp(0, 1)

    def _pictures(self, image: Any, batch: int) -> Tensor:
        """(B, 3, 4, 4), or with several of one prompt (1, 3, 4 n, 4)."""
        given = image if isinstance(image, list) else [image]
        if self.way == "several_of_one":
            return torch.cat(given, dim=1)[None]
        if len(given) == 1 and self.way != "argument_shared":  # where one serves every prompt as it is
            given = given * batch
        return torch.stack(given)

    def _pinned(self, x: Tensor, pictures: Tensor, mask: Any, noise: Tensor, then: Tensor, jitter: float) -> Tensor:
        """The sample with the picture in its place: where the mask is 0, or in the first frame."""
        if self.way == "pinned_clean":
            return torch.cat([pictures[:, :, None], x[:, :, 1:]], 2)
        if self.way == "pinned_clean_in_place":
            x[:, :, 0] = pictures
            return x
        if len(then):
            flow = hasattr(self.scheduler, "scale_noise")
            noised = self.scheduler.scale_noise if flow else self.scheduler.add_noise
            anew = noise + jitter * torch.randn(noise.shape) if self.way == "pinned_anew" else noise
            pictures = noised(pictures, noise=anew, **{"timestep" if flow else "timesteps": then})
        masks = torch.stack(mask if isinstance(mask, list) else [mask] * len(x))
        return masks * x + (1 - masks) * pictures

    def _ask(self, x: Tensor, t: Tensor, text: Tensor | None, pictures: Any, jitter: float, place: int) -> Tensor:
        way, batch = self.way, len(x)
        time = t.expand(batch)
        told: dict[str, Any] = {} if text is None else {"text": text}
        if way in ("channels", "drawn", "global_draw", "no_prompt", "trace", "pinned", "pinned_anew"):
            return self.network(torch.cat([x, pictures], 1), time, **told)[0][:, :CHANNELS]
        if way == "redrawn":
            noisy = pictures + jitter * torch.randn(pictures.shape)
            return self.network(torch.cat([x, noisy], 1), time, **told)[0][:, :CHANNELS]
        if way == "channels_before":
            return self.network(torch.cat([pictures, x], 1), time, **told)[0][:, CHANNELS:]
        if way == "negated":
            return -self.network(torch.cat([x, pictures], 1), 1 - time / 1000, **told)[0][:, :CHANNELS]
        if way.startswith("tokens") or way == "several_of_one":
            packed, count = pictures.flatten(2).transpose(1, 2), SIDE * SIDE
            if way == "tokens_before":
                return self.network(torch.cat([packed, x], 1), time, **told)[0][:, -count:]
            return self.network(torch.cat([x, packed], 1), time, **told)[0][:, :count]
        if way == "list":
            return torch.stack(self.network(list(torch.cat([x, pictures], 1)), time, **told)[0])[:, :CHANNELS]
        if way == "nested":
            both = [[*one] for one in zip(x, pictures, strict=True)]
            return torch.stack(self.network(both, time, **told)[0])[:, :CHANNELS]
        if way == "two_rows":
            rows = torch.stack([pictures.mean(-1), pictures.amax(-1)], 1).flatten(0, 1).transpose(1, 2)
            return self.network(x, time, picture=rows, **told)[0]
        if way == "kept_of_the_first":
            told |= {} if pictures is None else {"picture": pictures.flatten(2).transpose(1, 2)}
        if way.startswith("argument"):
            return self.network(x, time, picture=pictures.flatten(2).transpose(1, 2), **told)[0]
        if way.startswith(("frame", "pinned_clean")):
            return self._ask_video(x, t, told, pictures, place)
        return self.network(x, time, **told)[0]

    def _ask_video(self, x: Tensor, t: Tensor, told: dict[str, Any], pictures: Tensor, place: int) -> Tensor:
        batch = len(x)
        mask = torch.ones(1, 1, FRAMES, 1, 1)
        mask[:, :, place] = 0
        if self.way == "frames_scattered":
            mask[:, :, 2] = 0
        # A time for each frame and column: 0 where a frame is clean.
        time = (mask[0, 0, :, :, 0] * t).expand(FRAMES, SIDE).reshape(1, -1).expand(batch, -1)
        if self.way == "frame_not_stepped":
            whole = torch.cat([pictures[:, :, None], x], 2)
            tokens = self.network(whole.flatten(2).transpose(1, 2), time, **told)[0]
            return tokens.transpose(1, 2).unflatten(2, (FRAMES, SIDE, SIDE))[:, :, 1:]
        if self.way.startswith("pinned_clean"):
            return self.network(x, time, **told)[0]
        return self.network(mask * x + (1 - mask) * pictures[:, :, None], time, **told)[0]


def picture_pipeline(way: str, scheduler: Any = None) -> PicturePipeline:
    """A pipeline that tells its network pictures in one way; the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = PicturePipeline(PictureNetwork(), scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipeline.way = way
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(seed: int, side: int = SIDE) -> Tensor:
    """(3, side, side), the same for each seed."""
    return torch.randn(CHANNELS, side, SIDE, generator=torch.Generator().manual_seed(seed))


def items_of(way: str, count: int = 2) -> list[dict[str, Any]]:
    """Items with a picture of their own each, and a prompt where the pipeline takes one."""
    prompts: list[dict[str, Any]] = [{} if way == "no_prompt" else {"prompt": f"{word} boat"} for word in "abcdefghij"]
    several = way == "several_of_one"
    pictures = [[picture(i), picture(i + 50)] if several else picture(i) for i in range(count)]
    if way.startswith("pinned"):
        pictures = [picture(FIRST_PINNED + i) for i in range(count)]
    masks = [{"mask": mask_of(i)} if way in ("pinned", "pinned_anew") else {} for i in range(count)]
    return [{**prompts[i], "image": pictures[i], **masks[i]} for i in range(count)]


def mask_of(number: int) -> Tensor:
    """(1, 4, 4), 1 where the picture is made anew: two columns, from the left or from the right."""
    mask = torch.zeros(1, SIDE, SIDE)
    mask[..., 2 * (number % 2) : 2 * (number % 2) + 2] = 1
    return mask
