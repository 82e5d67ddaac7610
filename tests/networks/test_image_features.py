"""Features of what samples show: the stand-ins, given networks of transformers, and what cannot be loaded."""

import json
from pathlib import Path

import pytest
import torch
from tiny_pipelines import tiny_ddim, tiny_flow, tiny_stable_diffusion
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SamVisionConfig,
    SamVisionModel,
)

from fewstep.errors import UserError
from fewstep.networks.heads import LevelHeads
from fewstep.networks.image_features import DrawnLevels, image_features_of, open_vision
from fewstep.networks.perceptual import images_of
from fewstep.recording import record

VISION = {
    "sam": lambda: SamVisionModel(
        SamVisionConfig(
            hidden_size=16, num_hidden_layers=8, num_attention_heads=2, image_size=32, patch_size=8, mlp_dim=16,
            output_channels=8, window_size=2, global_attn_indexes=[1, 3],
        )
    ),
    "dinov2": lambda: Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=8, num_attention_heads=2, image_size=28, patch_size=14)
    ),
    "clip": lambda: CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=28,
            patch_size=14,
        )
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def recordings():
    return {"latent": record(tiny_stable_diffusion()), "flow": record(tiny_flow()), "pixels": record(tiny_ddim())}


def some(recording, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, *recording.sample_shape, generator=generator)


@pytest.mark.parametrize("kind", ["latent", "flow"])
def test_the_stand_in_of_latent_teachers_is_their_encoder(recordings, kind: str):
    recording = recordings[kind]
    features = image_features_of(recording, None, "cpu")
    assert "a stand-in" in features.about
    x0 = some(recording).requires_grad_()
    levels = features(x0)
    vae = recording.pipeline.vae
    pixels = images_of(recording)(x0) * 2 - 1
    x, expected = vae.encoder.conv_in(pixels), []
    for block in vae.encoder.down_blocks:
        x = block(x)
        expected.append(x)
    assert len(levels) == len(expected) > 1
    torch.testing.assert_close(levels, expected)
    assert torch.autograd.grad(sum(level.sum() for level in levels), x0)[0].abs().min() > 0


def test_the_stand_in_of_pixels_is_always_the_same_and_not_trained(recordings):
    recording = recordings["pixels"]
    x0 = some(recording).requires_grad_()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = image_features_of(recording, None, "cpu")(x0)
        torch.manual_seed(2)
        second = image_features_of(recording, None, "cpu")(x0)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    side = recording.sample_shape[-1]
    assert [level.shape[1:] for level in first] == [
        (w, side >> k, side >> k) for k, w in enumerate(DrawnLevels.WIDTHS, 1)
    ]
    assert not any(p.requires_grad for p in DrawnLevels(3).parameters())
    assert 0.3 < first[-1].std() / first[0].std() < 3  # no level fades
    assert torch.autograd.grad(first[-1].sum(), x0)[0].abs().sum() > 0


@pytest.mark.parametrize("name", VISION)
def test_blocks_of_a_given_network_at_even_depths(recordings, tmp_path: Path, name: str):
    torch.manual_seed(0)
    model = VISION[name]().eval()
    model.save_pretrained(tmp_path / name)
    (tmp_path / name / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    )
    recording = recordings["latent"]
    x0 = some(recording).requires_grad_()
    levels = image_features_of(recording, str(tmp_path / name), "cpu")(x0)
    depths = {"sam": (1, 3, 5, 7), "dinov2": (1, 3, 5, 7), "clip": (0, 1, 2)}[name]
    side = model.config.image_size
    pixels = torch.nn.functional.interpolate(images_of(recording)(x0), (side, side), mode="bilinear", antialias=True)
    expected = model(pixel_values=pixels * 2 - 1, output_hidden_states=True).hidden_states
    torch.testing.assert_close(levels, [expected[depth + 1].flatten(1, -2) for depth in depths])
    assert torch.autograd.grad(levels[0].sum(), x0)[0].abs().sum() > 0
    heads = LevelHeads(levels, seed=0)
    assert heads(levels).shape == (2, len(depths))


def test_what_is_no_vision_network_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"--feature_extractor .*nothing cannot be loaded"):
        open_vision(str(tmp_path / "nothing"), "cpu")
    pickled = tmp_path / "pickled"
    model = VISION["dinov2"]()
    model.config.save_pretrained(pickled)
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        open_vision(str(pickled), "cpu")
    words = tmp_path / "words"
    tiny_stable_diffusion().text_encoder.save_pretrained(words)
    with pytest.raises(UserError, match="says no image size or has no blocks"):
        open_vision(str(words), "cpu")
