"""``fewstep probe TEACHER``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fewstep.conditioning.conditioning import Conditioning
from fewstep.config.attention import AUTO, refuse_unknown_backend
from fewstep.config.parsing import Parser, parse, with_values
from fewstep.networks.attention import describe_processors
from fewstep.networks.attention_trial import use_attention_backend
from fewstep.networks.roles import make_role
from fewstep.programs.teacher import TeacherSettings, open_teacher
from fewstep.recording import Recording
from fewstep.recording.draw_effect import effect_of_draws


def run(words: Sequence[str]) -> None:
    """Print what is recorded of a pipeline, once that is proven."""
    parser = Parser(
        prog="fewstep probe", description="Show what is recorded of a pipeline; exit 0 only if it is proven."
    )
    parser.add_argument("teacher", type=str, help="folder, file, hub id, or an embedded name")
    parser.add_argument("--revision", type=str | None, default=None, help="branch, tag or commit of a hub id")
    parser.add_argument("--subfolder", type=str | None, default=None, help="where in it the pipeline lies")
    parser.add_argument("--variant", type=str | None, default=None, help="of the weights, such as fp16")
    parser.add_argument("--call", type=dict[str, Any] | None, default=None, help="JSON for its call")
    parser.add_argument("--items", type=str | None, default=None, help="with pictures; default: two made-up ones")
    parser.add_argument("--attention_backend", type=str, default=AUTO, help="try this one on its network, on a CPU")
    parser.add_argument("--trust_remote_code", type=bool, default=False, help="let it run code from its own folder")
    parsed = parse(parser, with_values(words, {"trust_remote_code"}))
    refuse_unknown_backend(parsed.attention_backend)
    settings = TeacherSettings(**{name: value for name, value in parsed.items() if name != "attention_backend"})
    recording = open_teacher(settings, "cpu", make_up=True).recording
    print(recording.summary())
    if (apart := effect_of_draws(recording)) is not None:
        text = f"two of what is drawn for an item move the network's answer by {apart:.1e} (at half time)"
        print(f"{'draws':<15}{text}; --draws K keeps several")
    print(_attention(recording, parsed.attention_backend))


def _attention(recording: Recording, backend: str) -> str:
    """The processors of its network, or what ran when a backend was tried on a copy of it."""
    if backend == AUTO:
        return f"{'attention':<15}{describe_processors(recording.network)}"
    x = torch.randn(2, *recording.sample_shape, generator=torch.Generator().manual_seed(0))
    t = torch.full((2,), 0.5, dtype=torch.float64)
    experts = {one.component: make_role(one.component, recording.of(one), trainable=True) for one in recording.experts}
    conditioning = Conditioning(recording.marked, 1).select([0, 0])
    return use_attention_backend(experts, backend, x, t, [conditioning])
