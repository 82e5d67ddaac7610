"""A recording: what was learnt of a pipeline, with the way to its images and the proof that it holds."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fewstep.conditioning.conditioning import Conditioning
from fewstep.conditioning.ragged import AnyConditioning
from fewstep.recording.codec import Codec, read_codec
from fewstep.recording.errors import RecordingError
from fewstep.recording.pipeline import find_scheduler
from fewstep.recording.proof.proof import Proof, prove
from fewstep.recording.recorded import Recorded
from fewstep.recording.rules.dtypes import dtype_name
from fewstep.recording.watch.encoded_once import encoded_once


@dataclass(frozen=True, eq=False, repr=False)
class Recording(Recorded):
    """What a pipeline's recorder returns: :class:`Recorded`, able to encode, to decode and to prove itself.

    Attributes:
        proof: the last one, None before :meth:`prove`.
    """

    proof: Proof | None = None
    #: What the autoencoder made of the items' pictures, until they are proven.
    _encoded: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def codec(self) -> Codec:
        """The way between images and the network's space, read off from the pipeline when it is first wanted."""
        with self._encoded_once():
            return read_codec(self)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W), or videos (B, C, F, H, W), in [0, 1] -> x0 (B, *sample_shape).

        Raises:
            RecordingError: the pipeline's way to its images is not a reordering with a scale and an offset.
        """
        return self.codec.encode(images)

    def decode(self, x0: Tensor, conditioning: AnyConditioning | None = None) -> Tensor:
        """x0 (B, *sample_shape) -> images (B, C, H, W) or videos (B, C, F, H, W) in [0, 1], by its own tail.

        What of them comes from an item is that of the B samples' ``conditioning``, or without one the recorded item's.
        """
        return self.at(tuple(x0.shape[1:])).codec.decode(x0, conditioning)

    def at(self, shape: tuple[int, ...]) -> Recording:
        """That of samples of a shape, where items have samples of several."""
        return next((one for one in self.sizes if one.sample_shape == shape and isinstance(one, Recording)), self)

    def prove(self, seed: int = 0) -> Proof:
        """Compare own calls of the network with the pipeline's on fresh samples, and decode one.

        Raises:
            RecordingError: they differ; the message says what was compared and by how much. Or the decoder makes NaN of
                noise of unit size.
        """
        with self._encoded_once():
            proof = prove(self, seed)
            self._check_decoder(seed)
        self._encoded.clear()
        object.__setattr__(self, "proof", proof)  # remembered; everything else is frozen
        return proof

    def _encoded_once(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.conditional != "item" else encoded_once(self.pipeline, self._encoded)

    def _check_decoder(self, seed: int) -> None:
        try:
            codec = self.codec
        except RecordingError:  # what no codec can be read off of is never decoded by fewstep
            return
        parameter = next(self.network.parameters())
        x0 = torch.randn(1, *self.sample_shape, generator=torch.Generator().manual_seed(seed))
        codec.decode(x0.to(parameter.device, self.dtype))

    def summary(self) -> str:
        """What was found out, as a table for people."""
        sample = self.recipe.sample
        form = f"{'list of ' if sample.as_list else ''}{list(sample.shape)} per sample, {sample.dtype}"
        if sample.pad_axis:
            form += f", axis {sample.pad_axis} padded by {sample.pad[0]} and {sample.pad[1]} of {sample.fill:g}"
        rows = [
            ("pipeline", type(self.pipeline).__name__),
            *(("component", text) for text in self._describe_experts()),
            ("sample", f"{sample.argument}: {form}; in the scheduler's space {list(self.sample_shape)}"),
            *(("time", rule.describe()) for rule in self.recipe.times),
            ("output", self.recipe.output.describe()),
            *(("beside it", second.describe()) for second in [self.recipe.second] if second is not None),
            ("conditional on", self.conditional or "nothing"),
            *(("conditioning", text) for text in Conditioning(self.marked, 1).describe()),
            *(("told", text) for text in (self.told.describe() if self.told is not None else [])),
            *(("outside of it", text) for text in (self.between.describe() if self.between is not None else [])),
            ("guidance", self.guidance.describe()),
            ("scheduler", type(getattr(self.pipeline, find_scheduler(self.pipeline))).__name__),
            ("schedule", f"{type(self.schedule).__name__}, prediction {self.prediction_type}"),
            ("initial noise", f"x{self.initial_noise_scale:g} in the network's input"),
            ("call", ", ".join(f"{k}={v!r}" for k, v in self.call.items()) or "no further arguments"),
        ]
        try:
            rows.append(("codec", self.codec.describe()))
        except RecordingError as error:
            rows.append(("codec", f"none, so no training on images: {error}"))
        if self.proof is not None:
            rows += [("proof", text) for text in self.proof.describe()]
        return "\n".join(f"{name:<15}{text}" for name, text in rows)

    def _describe_experts(self) -> list[str]:
        texts = [f"{e.component} ({type(e.network).__name__}, {dtype_name(self.dtype)})" for e in self.experts]
        if len(texts) == 1:
            return texts
        bounds = [f" from timestep {e.lowest:g} up" if e.lowest > -torch.inf else " below" for e in self.experts]
        return [text + bound for text, bound in zip(texts, bounds, strict=True)]
