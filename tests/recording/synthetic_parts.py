"""Traits that pipelines are known to have, schedulers of every family, and the modules of a synthetic pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor, nn

CHANNELS, SIDE, WIDTH, FRAMES = 3, 4, 8, 5


@dataclass(frozen=True)
class Traits:
    """How a `TraitPipeline` differs from the plainest one. See the pipeline for what each word means."""

    layout: str = "first"  # first, last, list, five_axes, packed
    padded: str = ""  # front, back: a constant beside the sample's channels
    in_place: bool = False
    time: str = "batch"  # scalar, one, batch, cast, frames, truncated, thousandth, reversed, atan, own
    next_time: bool = False
    output: str = "same"  # same, half_negated, x0
    text: str = "fixed"  # fixed, longest, single_trimmed, mask_when_ragged, ragged_list, per_frame, nested
    tables: str = ""  # tuple, list, complex, batch_ids, text_ids
    guidance: str = "batched"  # none, batched, sequential
    positive_first: bool = False
    plus_one: bool = False  # pos + w (pos - neg)
    off: str = "one"  # one, zero, only_one, above_one
    negative: str = "empty"  # empty, zeros, stock
    linear: bool = True
    own_grid: str = ""  # quadratic, linear_quadratic, integers
    dynamic_shift: bool = False
    scaled: bool = False  # scale_model_input
    projection: bool = False


#: Every trait that is recorded, proven and trained, as the arguments of `Traits`.
RECORDABLE: list[dict[str, Any]] = [
    *({"layout": layout} for layout in ("first", "last", "list", "five_axes", "packed")),
    *({"padded": padded, "layout": layout} for padded in ("front", "back") for layout in ("first", "last")),
    {"in_place": True},
    *({"time": time} for time in ("scalar", "one", "frames", "truncated", "thousandth", "reversed")),
    {"next_time": True},
    {"next_time": True, "time": "frames"},
    {"next_time": True, "own_grid": "quadratic"},
    {"output": "half_negated"},
    {"output": "half_negated", "layout": "last"},
    {"output": "x0"},
    {"output": "x0", "in_place": True},
    *(
        {"text": text, "guidance": guidance, "negative": "stock"}
        for text in ("fixed", "longest", "single_trimmed", "mask_when_ragged", "ragged_list", "per_frame", "nested")
        for guidance in ("batched", "sequential")
    ),
    *({"tables": tables} for tables in ("tuple", "list", "complex", "batch_ids")),
    {"tables": "text_ids", "text": "longest"},
    *({"off": off} for off in ("zero", "only_one", "above_one")),
    {"guidance": "none"},
    *(
        {"guidance": guidance, "positive_first": True, **formula}
        for guidance in ("batched", "sequential")
        for formula in ({}, {"plus_one": True, "off": "zero"})
    ),
    *({"guidance": guidance, "plus_one": True, "off": "zero"} for guidance in ("batched", "sequential")),
    {"negative": "zeros"},
    {"linear": False},
    {"own_grid": "quadratic"},
    {"own_grid": "linear_quadratic"},
    {"dynamic_shift": True},
    {"projection": True},
]
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_TABLE = {**_BETAS, "clip_sample": False}
#: Every family of schedulers: what makes one, and the traits of a pipeline that suits it.
SCHEDULERS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "epsilon": (lambda: DDIMScheduler(**_TABLE), {}),
    "v": (lambda: DDIMScheduler(**_TABLE, prediction_type="v_prediction"), {}),
    "x0": (lambda: DDIMScheduler(**_TABLE, prediction_type="sample"), {}),
    "zero_snr": (
        lambda: DDIMScheduler(**_TABLE, prediction_type="v_prediction", rescale_betas_zero_snr=True),
        {"time": "scalar"},
    ),
    "snr_shift": (
        lambda: CogVideoXDDIMScheduler(prediction_type="v_prediction", snr_shift_scale=3.0),
        {},
    ),
    "euler": (lambda: EulerDiscreteScheduler(**_BETAS), {"scaled": True}),
    "edm": (EDMEulerScheduler, {"scaled": True, "time": "own"}),
    "continuous_v": (
        lambda: EulerDiscreteScheduler(
            prediction_type="v_prediction",
            timestep_type="continuous",
            use_karras_sigmas=True,
            sigma_min=0.002,
            sigma_max=700.0,
            timestep_spacing="leading",
        ),
        {"scaled": True, "time": "own"},
    ),
    "static_shift": (lambda: FlowMatchEulerDiscreteScheduler(shift=5.0), {}),
    "integer_flow": (
        lambda: UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        {},
    ),
}


class _Part:
    """What diffusers asks of a module that it moves."""

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


class Projection(_Part, nn.Linear):
    """A module that runs before the network."""


class TextEncoder(_Part, nn.Module):
    """Characters to vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(128, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


class CrossAttention(nn.Module):
    """What the text says, through one linear layer where adapters can sit."""

    def __init__(self) -> None:
        super().__init__()
        self.to_out = nn.Linear(WIDTH, 32)

    def forward(self, told: Tensor) -> Tensor:
        return self.to_out(told)


class Denoiser(_Part, nn.Module):
    """A small network that reacts to all it is told."""

    def __init__(self, traits: Traits) -> None:
        super().__init__()
        self.traits = traits
        n = CHANNELS * SIDE * SIDE
        self.enter, self.time, self.text = nn.Linear(n, 32), nn.Linear(16, 32), CrossAttention()
        self.leave = nn.Linear(32, 2 * n if traits.output == "half_negated" else n)

    def forward(
        self,
        hidden_states: Any,
        timestep: Any,
        text: Any,
        mask: Tensor | None = None,
        next_timestep: Any = None,
        rotary: Any = None,
        ids: Tensor | None = None,
        scale: int = 1,
        return_dict: bool = False,
    ) -> tuple[Any]:
        x = torch.stack(hidden_states) if isinstance(hidden_states, list) else hidden_states
        if self.traits.padded:
            axis = -1 if self.traits.layout == "last" else 1
            extra = x.shape[axis] - CHANNELS
            x = x.narrow(axis, extra if self.traits.padded == "front" else 0, CHANNELS) + x.mean()
        batch, shape = len(x), x.shape[1:]
        h = self.enter(x.flatten(1)) + self._moment(timestep, batch)
        if next_timestep is not None:
            h = h + 0.5 * self._moment(next_timestep, batch)
        if isinstance(text, dict):
            text = text["rows"]["all"]
        if isinstance(text, list):
            told = torch.stack([one.mean(0) for one in text])
        elif mask is not None:
            told = (text * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        else:
            told = text.mean(1)
        if len(told) != batch:  # repeated once per frame
            told = told.view(batch, -1, WIDTH).mean(1)
        h = torch.tanh(h + self.text(told) + self._position(rotary, ids))
        out = self.leave(h)
        if self.traits.output == "half_negated":
            last = self.traits.layout == "last"
            out = out.view(batch, *shape[:-1], -1) if last else out.view(batch, -1, *shape[1:])
        else:
            out = out.view(batch, *shape)
        return (list(out.unbind()) if isinstance(hidden_states, list) else out,)

    def _moment(self, timestep: Any, batch: int) -> Tensor:
        t = torch.as_tensor(timestep).float()
        t = t.reshape(-1).expand(batch) if t.numel() == 1 else t.reshape(batch, -1).mean(1)
        t = t if self.traits.time in ("thousandth", "reversed", "atan", "own") else t / 1000
        angles = t[:, None] * 3 + torch.arange(16)
        return self.time(torch.sin(angles).to(self.time.weight.dtype)).to(self.enter.weight.dtype)

    def _position(self, rotary: Any, ids: Tensor | None) -> Tensor:
        total = torch.zeros((), dtype=self.enter.weight.dtype)
        for table in rotary if isinstance(rotary, list | tuple) else [rotary]:
            if table is not None:
                total = total + (table.real if table.is_complex() else table).mean().to(self.enter.weight.dtype)
        return total if ids is None else total + ids.mean().div(10).to(self.enter.weight.dtype)
