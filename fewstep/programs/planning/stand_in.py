"""A stand-in for a teacher: the same recording on networks that are a weight times the sample.

Which roles a method calls, how often, and what flows back, depends on its settings and not on what its networks are. On
stand-ins a step costs a few milliseconds, so it is counted by playing it (:mod:`.counting`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from fewstep.conditioning.conditioning import Conditioning
from fewstep.conditioning.tree import Leaf
from fewstep.recording import Recipe, Recording
from fewstep.recording.rules.rules import OutputRule, SampleRule, TimeRule

#: Entries of a sample.
_SIZE = 2
_TEXT = "encoder_hidden_states"


class _Attention(nn.Module):
    """Of one head, to a text."""

    heads = 1

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(_SIZE, _SIZE, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(_SIZE, _SIZE)])

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """(B, N, 2) of queries (B, N, 2) and tokens (B, L, 2)."""
        keys, values = self.to_k(encoder_hidden_states), self.to_v(encoder_hidden_states)
        answer: Tensor = self.to_out[0]((self.to_q(hidden_states) @ keys.mT).softmax(-1) @ values)
        return answer


class StandIn(nn.Module):
    """A weight times the sample, with what methods look for in a network: a block to tap, an embedded time, a text."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.time_embedding = TimestepEmbedding(1, _SIZE)
        self.mid_block = nn.Linear(_SIZE, _SIZE)
        self.attention = _Attention()

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor | None = None, **_told: Any
    ) -> Tensor:
        """The answer (B, 2) to ``sample`` (B, 2) at ``timestep`` (B,), for texts (B, L, 2) where it is told such."""
        features = self.mid_block(sample[:, None])  # one token of two channels
        if encoder_hidden_states is not None:
            features = features + self.attention(features, encoder_hidden_states=encoder_hidden_states)
        return self.weight * sample + features[:, 0] + self.time_embedding(timestep[:, None].to(sample))


def stand_in(recording: Recording) -> Recording:
    """The recording of a teacher with as many networks, schedule and guidance, on stand-ins of the smallest size.

    The pipeline is the teacher's own, and is not to be run.
    """
    recipe = Recipe(
        component=recording.component,
        sample_shape=(_SIZE,),
        sample=SampleRule("sample", (), (_SIZE,), as_list=False, dtype="float32"),
        times=(TimeRule("timestep", "timestep", "float64", (), "float32"),),
        output=OutputRule(-1, stack=False, half_axis=0, permutation=(), shape=(_SIZE,), relation="same"),
        network_dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):  # their first weights are nobody else's business
        experts = tuple(replace(expert, network=StandIn()) for expert in recording.experts)
    told = {name: recording.marked[name] for name in recording.embedded}
    if _TEXT in recording.marked:
        told[_TEXT] = Leaf(torch.zeros(1, 1, _SIZE), rows=1)
    guidance = recording.guidance
    if (weighing := guidance.weighing) is not None and weighing.places:  # as many as its samples have
        ends = replace(weighing, places=(weighing.places[0], weighing.places[-1]), axis=1)
        guidance = replace(guidance, weighing=ends)
    return replace(
        recording,
        guidance=guidance,
        network=experts[0].network,
        recipe=recipe,
        marked=told,
        experts=experts,
        _negative=None if recording.negative() is None else Conditioning(told, 1),
    )
