"""What stands in for a pipeline's networks while it is walked: right shapes, no arithmetic, and all that they are told.

So a walk costs no pass of the denoiser, the control network or the image encoder, whatever their size.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fewstep.export.errors import ExportError
from fewstep.export.related.classes import CONTROL
from fewstep.recording import Recording
from fewstep.recording.pipeline import modules_of
from fewstep.recording.watch.capture import capture_changes
from fewstep.recording.watch.hooks import method_replaced
from fewstep.recording.watch.observation import NetworkCall

# What a control network adds to the denoiser's blocks, and to its middle or its single blocks: nothing.
_NO_CONTROL: tuple[tuple[Tensor, ...], None] = ((), None)


@dataclass(frozen=True)
class StandIns:
    """What a recording's networks return, and the size of its pictures.

    Attributes:
        recording: of the teacher; the student's networks are told and return tensors of the same shapes.
        pixels: (C, H, W) of an image, (C, F, H, W) of a video, at the recorded call.
    """

    recording: Recording
    pixels: tuple[int, ...]

    @classmethod
    def of(cls, recording: Recording) -> StandIns:
        """Those of a recording whose pipeline has a decoder.

        Raises:
            RecordingError: its way to the decoder is no map that can be read off.
        """
        codec = recording.codec
        decoder: Any = getattr(recording.pipeline, codec.decoder or "")
        # Fake tensors have shapes alone, so that decoding one costs nothing.
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            decoded = decoder.decode(torch.empty(1, *codec.shape, dtype=recording.dtype), return_dict=False)[0]
        return cls(recording, tuple(decoded.shape[1:]))

    def picture(self, number: int) -> Tensor:
        """What a picture is in the network's space: unit noise, (1, *sample_shape), float64; other numbers, others."""
        generator = torch.Generator().manual_seed(2_718_281 + number)
        return torch.randn(1, *self.recording.sample_shape, generator=generator, dtype=torch.float64)

    def encoded(self, pixels: Tensor, number: int) -> Encoded:
        """What the encoder says of pictures (B, C, H, W) or (B, C, F, H, W): picture ``number``, and picture 0 of grey.

        Raises:
            ExportError: they have not the recorded size.
        """
        is_grey = bool(pixels.min() == pixels.max())
        latents = self.recording.codec.to_decoder(self.picture(0 if is_grey else number))
        if tuple(pixels.shape[-2:]) != self.pixels[-2:]:
            height, width = pixels.shape[-2:]
            own = " x ".join(map(str, self.pixels[-2:]))
            raise ExportError(f"it brings a picture of {own} to {height} x {width}, which the student was not made for")
        if pixels.dim() == 5 and pixels.shape[2] == 1:  # the first frame of a video, or an image as one
            latents = latents[:, :, :1]
        return Encoded(latents.to(pixels).expand(len(pixels), *latents.shape[1:]).clone())


@dataclass(frozen=True)
class Encoded:
    """What any of diffusers' encoders returns, of known latents: a distribution without spread, or the tensor."""

    latents: Tensor

    @property
    def latent_dist(self) -> Encoded:
        """Itself: sample and mode are the latents."""
        return self

    @property
    def latent(self) -> Tensor:
        """The word of AutoencoderDC."""
        return self.latents

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """The latents, without a draw."""
        return self.latents

    def mode(self) -> Tensor:
        """The latents."""
        return self.latents

    def __getitem__(self, index: int) -> Encoded:
        return (self,)[index]


@dataclass
class Heard:
    """The calls of the networks that were stood in for, in their order."""

    calls: list[NetworkCall] = field(default_factory=list)

    def of(self, *components: str) -> list[NetworkCall]:
        """Those of some networks alone."""
        return [call for call in self.calls if call.component in components]


@contextlib.contextmanager
def stood_in(pipeline: Any, stand_ins: StandIns, picture: int, heard: Heard) -> Iterator[None]:
    """Inside, the pipeline's denoisers, control network and encoder of pictures are stood in for.

    Args:
        pipeline: the student's, or a relative of its parts.
        stand_ins: of the recording.
        picture: the number of the picture that every picture is.
        heard: is told what they are told.
    """
    recording = stand_ins.recording
    networks = modules_of(pipeline)
    with contextlib.ExitStack() as stack:
        # At every call diffusers asks each part of each network, thousands of them, whether it is offloaded, several
        # times; those of the twins are not, and none but the text encoder's run, which is not trained here.
        for network in networks.values():
            stack.enter_context(method_replaced(network, "modules", functools.partial(_itself, network)))
        for name in (*recording.components, CONTROL):
            if name in networks:
                answer = _NO_CONTROL if name == CONTROL else recording.codec.stub
                telling = _telling(networks[name], name, answer, heard)
                stack.enter_context(method_replaced(networks[name], "forward", telling))
        decoder = recording.codec.decoder
        if decoder in networks:

            def encode(pixels: Tensor, *_: Any, **__: Any) -> Encoded:
                return stand_ins.encoded(pixels, picture)

            stack.enter_context(method_replaced(networks[decoder], "encode", encode))
        yield


@contextlib.contextmanager
def remembering(pipeline: Any, *others: str) -> Iterator[None]:
    """Inside, a network that is asked the same again answers from memory: a prompt is encoded once, not once a walk.

    Args:
        pipeline: whose networks.
        others: the names of those that are stood in for.
    """
    with contextlib.ExitStack() as stack:
        for name, network in modules_of(pipeline).items():
            if name not in others:
                stack.enter_context(method_replaced(network, "forward", _from_memory(network)))
        yield


def _itself(network: nn.Module) -> Iterator[nn.Module]:
    yield network


def _telling(network: nn.Module, name: str, answer: Any, heard: Heard) -> Callable[..., Any]:
    forward = network.forward
    signature = inspect.signature(forward)

    @functools.wraps(forward)
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs).arguments
        before = heard.of(name)
        told = capture_changes(bound, before[-1].arguments if before else {})
        heard.calls.append(NetworkCall(name, told))
        return answer

    return stand_in


def _from_memory(network: nn.Module) -> Callable[..., Any]:
    forward = network.forward
    memory: list[tuple[dict[str, Any], Any]] = []

    @functools.wraps(forward)
    def recall(*args: Any, **kwargs: Any) -> Any:
        asked = {**{str(place): value for place, value in enumerate(args)}, **kwargs}
        for known, answer in memory:
            if known.keys() == asked.keys() and all(capture_changes(asked, known)[n] is known[n] for n in asked):
                return answer
        answer = forward(*args, **kwargs)
        memory.append((asked, answer))
        return answer

    return recall
