"""What a decoder is given that does not come from the sample: an item's own, which goes along with its samples."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from picture_pipeline import PictureNetwork, PicturePipeline, items_of, picture
from torch import Tensor, nn

from fewstep.conditioning.conditioning import Conditioning
from fewstep.conditioning.outside import tail_of
from fewstep.recording import Recording, RecordingError, record

FRAME = 16  # entries of a frame's channel


class Halves(nn.Module):
    """An autoencoder of videos whose latents are half of their pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def encode(self, pixels: Tensor) -> Any:
        return type("Encoded", (), {"latents": pixels / self.factor})()

    def decode(self, z: Tensor) -> tuple[Tensor]:
        return (z * self.factor,)


class DecodedPipeline(PicturePipeline):
    """A frame of its video is the picture's: in the network's argument, and again before decoding."""

    way = "frame_mixed_in"
    tail = "first frame"

    def __init__(self, network: PictureNetwork, scheduler: Any, vae: Halves) -> None:
        super(PicturePipeline, self).__init__()
        self.register_modules(network=network, scheduler=scheduler, vae=vae)

    def _shown(self, x: Tensor, pictures: Tensor) -> Tensor:
        z = 3 * x - 0.5
        if self.tail == "first frame":
            z = torch.cat([pictures[:, :, None], z[:, :, 1:]], 2)
        elif self.tail == "cut":
            z = z[:, :, 2:]
        elif self.tail == "renormalised":
            z = torch.cat([z[:, :, :1] * z[:, :, 1:].std() / z[:, :, :1].std(), z[:, :, 1:]], 2)
        return (self.vae.decode(z)[0] / 2 + 0.5).clamp(0, 1).transpose(1, 2)


def recorded(tail: str) -> Recording:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = DecodedPipeline(PictureNetwork(), FlowMatchEulerDiscreteScheduler(shift=3.0), Halves())
    pipeline.tail = tail
    pipeline.set_progress_bar_config(disable=True)
    return record(pipeline, items=items_of("frame_mixed_in"))


@pytest.fixture(scope="module")
def recording() -> Recording:
    return recorded("first frame")


def test_each_items_own_frame_is_decoded(recording: Recording) -> None:
    x0 = 0.1 * torch.randn(2, *recording.sample_shape)
    told = recording.condition(items=items_of("frame_mixed_in"))
    tail = tail_of(told)
    assert tail is not None and tail.shape == (2, 3 * FRAME)
    z = recording.codec.to_decoder(x0, told)
    frames = torch.stack([picture(0), picture(1)])
    torch.testing.assert_close(z[:, :, 0], frames)
    torch.testing.assert_close(z[:, :, 1:], 3 * x0[:, :, 1:] - 0.5, rtol=0, atol=1e-5)
    videos = recording.decode(x0, told)
    torch.testing.assert_close(videos, (z + 0.5).clamp(0, 1), rtol=0, atol=1e-5)
    # Without being told of whom they are, samples show what the recorded item does.
    plain = recording.decode(x0)
    torch.testing.assert_close(plain[0], videos[0])
    assert float((plain[1] - videos[1])[:, 0].abs().max()) > 0.1 and torch.equal(plain[1][:, 1:], videos[1][:, 1:])
    assert "48 entries of each item's own" in recording.summary()


def test_a_tail_goes_with_its_sample(recording: Recording) -> None:
    one, two = recording.condition_each(items=items_of("frame_mixed_in"))
    turned = Conditioning.cat([one, two]).select([1, 0, 1])
    tails, own = tail_of(turned), [tail_of(each) for each in (one, two)]
    assert tails is not None and own[0] is not None and own[1] is not None
    assert torch.equal(tails, torch.cat([own[1], own[0], own[1]])) and not torch.equal(own[0], own[1])


def test_images_are_encoded_but_for_the_frame(recording: Recording) -> None:
    videos = torch.rand(1, 3, 4, 4, 4)
    x0 = recording.encode(videos)
    assert not bool(x0[:, :, 0].any())
    shown = recording.decode(x0)
    torch.testing.assert_close(shown[:, :, 1:], videos[:, :, 1:], rtol=0, atol=1e-5)


def test_what_is_cut_is_decoded_and_not_encoded() -> None:
    recording = recorded("cut")
    assert recording.codec.lost == 3 * FRAME and "48 entries of the sample cut" in recording.summary()
    x0 = 0.1 * torch.randn(1, *recording.sample_shape)
    torch.testing.assert_close(recording.decode(x0), (3 * x0[:, :, 2:]).clamp(0, 1), rtol=0, atol=1e-5)
    with pytest.raises(RecordingError, match="DecodedPipeline cuts 48 entries of its sample, which its network"):
        recording.encode(torch.rand(1, 3, 2, 4, 4))


def test_an_item_that_comes_to_the_decoder_in_another_form_is_refused() -> None:
    """Of a longer one the places of a tail are other entries."""
    recording = recorded("first frame")
    own = type(recording.pipeline)._shown

    def longer(pipeline: DecodedPipeline, x: Tensor, pictures: Tensor) -> Tensor:
        return own(pipeline, torch.cat([x, x], 2), pictures)

    recording.pipeline._shown = MethodType(longer, recording.pipeline)
    with pytest.raises(RecordingError, match=r"as the recorded item does: \[1, 3, 8, 4, 4\], and \[1, 3, 4, 4, 4\]"):
        recording.condition_each(items=items_of("frame_mixed_in")[:1])


def test_a_tail_that_is_not_affine_is_refused() -> None:
    recording = recorded("renormalised")
    with pytest.raises(RecordingError, match="mixes the entries of its sample before decoding"):
        recording.decode(torch.zeros(1, *recording.sample_shape))
    with pytest.raises(RecordingError, match="mixes the entries of its sample before decoding"):
        recording.encode(torch.rand(1, 3, 4, 4, 4))
