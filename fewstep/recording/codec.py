"""Between images and the network's space: the map is read off from the pipeline's own way to its decoder.

After its last step a pipeline reorders, scales and shifts the sample and hands it to its decoder. Zeros, ones and index
ramps in place of that last sample show this map; its inverse takes what the encoder gives into the network's space. A
pipeline without a decoder takes pixels, and the map leads from the sample to the image.

Of a pipeline that is told pictures some entries of the decoder's input may come from the item (a first frame), and some
of the sample may not come to it (frames that stand for references): such samples are decoded, and no images are encoded
where the network is told entries that the decoder never sees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.conditioning.outside import tail_of
from fewstep.conditioning.ragged import AnyConditioning
from fewstep.recording.errors import RecordingError
from fewstep.recording.pipeline import evaluating, find_decoder, modules_of
from fewstep.recording.recorded import Recorded
from fewstep.recording.watch.finite import refuse_unfinite_images
from fewstep.recording.watch.observation import Observation, Stub

# Ramps count in digits of this base, which every dtype holds with room for the map's scale and offset.
_BASE = 16
_STEPS = 3


@dataclass(eq=False, repr=False)
class Codec:
    """The two ways between x0 (B, *sample_shape) and images, for one recording.

    Attributes:
        recording: whose pipeline it is.
        decoder: the component with `encode` and `decode`; None: the pipeline's samples are pixels.
        shape: per-sample shape of what the decoder is given (or of the image).
        index: (n,) for each entry of that, flattened, the entry of the flattened sample it comes from.
        scale: (n,) float64, and
        offset: (n,) float64: entry = scale * sample[index] + offset.
        stub: what the network returned once; stands in for it while the pipeline is run for its tail only.
        tail: (k,) int64, the entries of the decoder's input that come from an item; their scale is 0, and their offset
            is the recorded item's. None: there are none.
        lost: how many entries of the sample the network is told and the decoder is not.
    """

    recording: Recorded
    decoder: str | None
    shape: tuple[int, ...]
    index: Tensor
    scale: Tensor
    offset: Tensor
    stub: Any
    tail: Tensor | None = None
    lost: int = 0

    def describe(self) -> str:
        """One line for people."""
        kind = f"{self.decoder} with input {list(self.shape)}" if self.decoder else f"pixels {list(self.shape)}"
        moved = "" if torch.equal(self.index, torch.arange(len(self.index))) else ", reordered"
        scales = sorted(set(self.scale[self._own].float().round(decimals=5).tolist()))
        scale = f"{scales[0]:g}" if len(scales) == 1 else f"{scales[0]:g}..{scales[-1]:g}"
        own = "" if self.tail is None else f", {len(self.tail)} entries of each item's own"
        lost = f", {self.lost} entries of the sample cut" if self.lost else ""
        return f"{kind}, scale {scale}{moved}{own}{lost}"

    @property
    def _own(self) -> Tensor:
        """Which entries of the decoder's input come from the sample: bool (n,)."""
        own = torch.ones(len(self.index), dtype=torch.bool)
        return own if self.tail is None else own.index_fill(0, self.tail, False)

    @property
    def centred(self) -> bool:
        """Whether the decoder's images lie in [-1, 1] instead of [0, 1]."""
        return self.decoder is not None and _centred(self.recording.pipeline)

    def to_decoder(self, x0: Tensor, conditioning: AnyConditioning | None = None) -> Tensor:
        """x0 (B, *sample_shape) -> what the decoder is given (B, *shape).

        With the ``conditioning`` of the B samples their items' own entries stand in it; else the recorded item's.
        """
        flat = x0.reshape(len(x0), -1).double()[:, self.index.to(x0.device)]
        z = flat * self.scale.to(x0.device) + self.offset.to(x0.device)
        tail = None if conditioning is None else tail_of(conditioning)
        if self.tail is not None and tail is not None:
            z = z.index_copy(1, self.tail.to(z.device), tail.to(z))
        return z.reshape(len(x0), *self.shape).to(x0.dtype)

    def from_decoder(self, z: Tensor) -> Tensor:
        """The inverse of `to_decoder`; entries that no decoder sees and no network is told are 0.

        Raises:
            RecordingError: the network is told entries that the decoder is not.
        """
        if self.lost:
            raise RecordingError(
                f"{type(self.recording.pipeline).__name__} cuts {self.lost} entries of its sample, which its network "
                "is told, before decoding: what they are for an image is not known, so no images can be learnt from; "
                "leave out --data"
            )
        own = self._own.to(z.device)
        flat = (z.reshape(len(z), -1).double() - self.offset.to(z.device))[:, own] / self.scale.to(z.device)[own]
        x0 = flat.new_zeros(len(z), math.prod(self.recording.sample_shape))
        x0[:, self.index.to(z.device)[own]] = flat
        return x0.reshape(len(z), *self.recording.sample_shape).to(z.dtype)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W), or videos (B, C, F, H, W), in [0, 1] -> x0 (B, *sample_shape).

        Raises:
            RecordingError: images of another size than the recorded one.
        """
        if self.decoder is None:
            self._check(tuple(images.shape[1:]), self.shape, "images")
            return self.from_decoder(images)
        vae: Any = getattr(self.recording.pipeline, self.decoder)
        parameter = next(vae.parameters())
        pixels = (images * 2 - 1 if _centred(self.recording.pipeline) else images).to(parameter)
        if len(self.shape) == 4 and pixels.dim() == 4:
            pixels = pixels.unsqueeze(2)  # a video decoder in an image pipeline: one frame
        with evaluating(vae):
            z = _latents(vae.encode(pixels))
        refuse_unfinite_images(self.recording.pipeline, self.decoder, z, "to images")
        self._check(tuple(z.shape[1:]), self.shape, "images whose latents")
        return self.from_decoder(z.to(self.recording.dtype))

    @torch.no_grad()
    def decode(self, x0: Tensor, conditioning: AnyConditioning | None = None) -> Tensor:
        """x0 (B, *sample_shape) -> images (B, C, H, W), or videos (B, C, F, H, W), float32 in [0, 1].

        The pipeline itself runs, one sample at a time, with its last step's result replaced and its network skipped.
        Where it changes samples outside of its network, its decoder is given what :meth:`to_decoder` says of them.

        Raises:
            RecordingError: x0 of another shape, or the decoder makes NaN of it.
        """
        self._check(tuple(x0.shape[1:]), self.recording.sample_shape, "x0")
        made = []
        for number, one in enumerate(x0.split(1)):
            told = None if conditioning is None else conditioning.select([number])
            given = None if self.recording.between is None else self.to_decoder(one, told)
            made.append(_images(_tail(self.recording, self.stub, one, decoder_input=given).result))
        images = torch.cat(made)
        if self.decoder is not None:
            refuse_unfinite_images(self.recording.pipeline, self.decoder, images, "after the last step")
        return images

    def _check(self, got: tuple[int, ...], wanted: tuple[int, ...], what: str) -> None:
        if got != wanted:
            raise RecordingError(
                f"{what} have shape {list(got)} and the recording holds for {list(wanted)}; "
                "resize them, or record with their height, width and num_frames"
            )


def read_codec(recording: Recorded) -> Codec:
    """Read the map off.

    Raises:
        RecordingError: what the decoder is given is not a reordering of the sample with a scale and an offset.
    """
    seen = recording.subject.run(_STEPS, steps=1)
    call = seen.steps[0].calls[-1]
    decoder = find_decoder(recording.pipeline)
    kind = type(recording.pipeline).__name__
    count = math.prod(recording.sample_shape)
    pictured = recording.conditional == "item"
    tail = None if recording.between is None else recording.between.tail

    def send(sample: Tensor) -> Tensor:
        x = sample.reshape(1, *recording.sample_shape).to(seen.steps[0].sample)
        run = _tail(recording, call.output, x, stop_at_decode=decoder is not None)
        z = run.decoder_input if decoder is not None else _images(run.result)
        whole = z is not None and (pictured or z.numel() == count)
        if z is None or not whole or len(z) != 1:
            got = "nothing" if z is None else list(z.shape)
            raise RecordingError(
                f"{kind} makes {got} of a sample of shape {list(recording.sample_shape)}; no map to invert"
            )
        return z.double().cpu()

    # A pixel pipeline clips its images to [0, 1]: stay where it does not, which is around zero.
    unit = 1.0 if decoder is not None else 0.5
    zero = send(torch.zeros(count))
    offset, scale = zero.flatten(), ((send(torch.full((count,), unit)) - zero) / unit).flatten()
    own = torch.ones(len(scale), dtype=torch.bool)
    own = own if tail is None else own.index_fill(0, tail, False)
    if not bool(scale.isfinite().all()):
        raise RecordingError(f"{kind} mixes the entries of its sample before decoding; no map to invert")
    if bool((scale[own].abs() < 1e-6).any()):
        raise RecordingError(f"{kind} drops a part of its sample before decoding; no map to invert")
    # What is an item's own has no scale; rounding may have left some.
    scale = scale.where(own, torch.zeros_like(scale))
    numbers, index, factor = torch.arange(count), torch.zeros(len(scale), dtype=torch.long), 1
    while factor < count:
        digit = ((numbers // factor) % _BASE).float() / _BASE * unit
        read = ((send(digit).flatten() - offset) / scale.where(own, torch.ones_like(scale)) / unit * _BASE) * own
        if bool((read - read.round()).abs().max() > 0.25):
            raise RecordingError(f"{kind} mixes the entries of its sample before decoding; no map to invert")
        index += read.round().long() * factor
        factor *= _BASE
    used = torch.zeros(count, dtype=torch.bool)
    if int(index.max()) >= count or len(index[own].unique()) < int(own.sum()):
        raise RecordingError(f"{kind} uses some entries of its sample twice before decoding; no map to invert")
    used[index[own]] = True
    lost = int((recording.recipe.read.flatten() & ~used).sum()) if pictured else 0
    return Codec(recording, decoder, tuple(zero.shape[1:]), index, scale, offset, call.output, tail, lost)


def _tail(
    recording: Recorded, stub: Any, x0: Tensor, *, stop_at_decode: bool = False, decoder_input: Tensor | None = None
) -> Observation:
    """Run the pipeline with every step's result replaced by `x0` and the network skipped; of what it pins, nothing."""
    return recording.subject.run(
        _STEPS,
        None if recording.between is None else [recording.between.bare],
        replace=lambda _index, sample: x0.to(sample),
        stub=Stub(recording.components, stub),
        stop_at_decode=stop_at_decode,
        decoder_input=decoder_input,
    )


def _centred(pipeline: Any) -> bool:
    """Whether the pipeline's decoder works in [-1, 1], which its image processor says (default: it does).

    A representation autoencoder (diffusers' AutoencoderRAE) has pixels in [0, 1], whatever its pipeline.
    """
    decoder = find_decoder(pipeline)
    if decoder is not None and type(getattr(pipeline, decoder)).__name__ == "AutoencoderRAE":
        return False
    for name in ("image_processor", "video_processor"):
        config = getattr(getattr(pipeline, name, None), "config", None)
        if config is not None and "do_normalize" in config:
            return bool(config["do_normalize"])
    return True


def refuse_no_encoder(pipeline: Any) -> None:
    """Raise where images cannot be brought into a pipeline's latents, as its autoencoder only decodes.

    Raises:
        RecordingError: that is so.
    """
    for name, module in modules_of(pipeline).items():
        if not callable(getattr(module, "decode", None)):
            continue
        if not callable(getattr(module, "encode", None)) or getattr(module, "encoder", module) is None:
            raise RecordingError(
                f"the {name} of this {type(pipeline).__name__}, of class {type(module).__name__}, has no encoder, so "
                "that no real images can be learnt from; leave out --data, or give the pipeline a whole autoencoder"
            )


def _latents(encoded: Any) -> Tensor:
    """The latents in what an encoder returns: the mode of a distribution, or the tensor itself."""
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mode()
    for name in ("latent", "latents"):
        if hasattr(encoded, name):
            return getattr(encoded, name)
    raise RecordingError(
        f"the encoder returned a {type(encoded).__name__} without latents; encoding cannot be recorded: leave out "
        "--data"
    )


def _images(result: Any) -> Tensor:
    """What a pipeline returned, as float32 images (B, C, H, W) or videos (B, C, F, H, W) in [0, 1]."""
    value = result[0] if isinstance(result, list | tuple) else next(iter(result.values()))
    if isinstance(value, list):
        value = np.stack([np.asarray(v) for v in value]) if not isinstance(value[0], Tensor) else torch.stack(value)
    if isinstance(value, np.ndarray):  # channels last
        value = torch.from_numpy(np.moveaxis(value, -1, -3))
    value = value.float().cpu()
    return value.transpose(1, 2) if value.dim() == 5 else value
