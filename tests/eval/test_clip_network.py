"""CLIP in published layouts: the published formula, strict names, every format, files missing and damaged."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_clip import (
    MERGES,
    QUICK,
    TINY,
    Archive,
    picture_features,
    prompt_features,
    published,
    random_state,
    tiny_network,
)
from torch import Tensor

from fewstep.data.durable import file_sha256
from fewstep.errors import UserError
from fewstep.eval.scorers.clip_network import ClipNetwork, open_model
from fewstep.eval.scorers.clip_shapes import VIT_B_32, VIT_G_14, VIT_H_14, VIT_L_14, ClipShape, as_transformers
from fewstep.eval.scorers.clip_tokens import ClipTokens, tokenizer_of
from fewstep.eval.scorers.files import read_clip
from fewstep.eval.scorers.pixels import clip_pixels, normalised
from fewstep.eval.weights import Found

PROMPTS = ["the cat", "a red, red cat & the 3 others", ""]


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return random_state(TINY)


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.randint(0, 256, (3, 3, 41, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def found(path: Path) -> Found:
    return Found(path, file_sha256(path), False)


def opened(path: Path, shape: ClipShape = TINY) -> ClipNetwork:
    tokens = ClipTokens(tokenizer_of(MERGES), shape.context, cleaned=True)
    return ClipNetwork(open_model(shape, found(path), "cpu"), tokens, clip_pixels)


@pytest.mark.parametrize("shape", [TINY, QUICK], ids=["gelu", "quick_gelu"])
def test_features_are_those_of_the_published_formula(shape: ClipShape, pictures: Tensor) -> None:
    state = random_state(shape)
    network = tiny_network(state, shape)
    expected = picture_features(state, shape, clip_pixels(pictures, 32))
    assert (network.of_pictures(pictures) - expected).abs().max() < 1e-5
    assert network.tokens is not None
    expected = prompt_features(state, shape, network.tokens(PROMPTS))
    assert (network.of_prompts(PROMPTS) - expected).abs().max() < 1e-5


def test_features_are_those_of_open_clip(state: dict[str, Tensor], pictures: Tensor) -> None:
    open_clip = pytest.importorskip("open_clip")
    image = {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8, "mlp_ratio": 1.25}
    text = {"vocab_size": TINY.vocabulary, "width": 16, "heads": 2, "layers": 3, "mlp_ratio": 1.5}
    theirs = open_clip.CLIP(embed_dim=12, vision_cfg=image, text_cfg=text).eval()
    theirs.load_state_dict(state)
    network = tiny_network(state)
    assert network.tokens is not None
    with torch.no_grad():
        seen = normalised(clip_pixels(pictures, 32))
        assert (network.of_pictures(pictures) - theirs.encode_image(seen, normalize=True)).abs().max() < 1e-5
        texts = theirs.encode_text(network.tokens(PROMPTS), normalize=True)
        assert (network.of_prompts(PROMPTS) - texts).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("shape", "tensors", "numbers"),
    [
        (VIT_B_32, 302, 151_277_313),
        (VIT_L_14, 446, 427_616_513),
        (VIT_H_14, 686, 986_109_441),
        (VIT_G_14, 782, 1_366_678_273),
    ],
    ids=["ViT-B/32", "ViT-L/14", "ViT-H-14", "ViT-g-14"],
)
def test_the_published_names_and_shapes_are_exactly_the_networks(shape: ClipShape, tensors: int, numbers: int) -> None:
    from transformers import CLIPModel

    with torch.device("meta"):
        state = {name: torch.empty(size) for name, size in published(shape).items()}
        wanted = CLIPModel(shape.config()).state_dict()
    assert sum(tensor.numel() for tensor in state.values()) == numbers
    assert len(state) == tensors
    ours = as_transformers(state)
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in wanted.items()}


def test_a_file_of_every_format_gives_the_same_network(
    state: dict[str, Tensor], pictures: Tensor, tmp_path: Path
) -> None:
    expected = tiny_network(state).cosines(pictures, PROMPTS, "a test")
    numbers = {f"{part}_model.embeddings.position_ids": torch.arange(77) for part in ("text", "vision")}
    sizes = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(77), "vocab_size": torch.tensor(9)}
    torch.save(state, tmp_path / "open_clip.bin")
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "checkpoint.pt")
    torch.save(as_transformers(state) | numbers, tmp_path / "transformers.bin")
    save_file(state, tmp_path / "open_clip.safetensors")
    save_file(as_transformers(state) | numbers, tmp_path / "transformers.safetensors")
    torch.jit.script(Archive(state | sizes)).save(tmp_path / "openai.pt")
    for path in sorted(tmp_path.iterdir()):
        assert torch.equal(opened(path).cosines(pictures, PROMPTS, "a test"), expected), path.name


def test_weights_in_half_precision_are_used_in_single(
    state: dict[str, Tensor], pictures: Tensor, tmp_path: Path
) -> None:
    torch.save({name: tensor.half() for name, tensor in state.items()}, tmp_path / "half.pt")
    rounded = tiny_network({name: tensor.half().float() for name, tensor in state.items()})
    network = opened(tmp_path / "half.pt")
    assert {p.dtype for p in network.model.parameters()} == {torch.float32}
    assert torch.equal(network.of_pictures(pictures), rounded.of_pictures(pictures))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("visual.proj"), "lacks visual_projection.weight"),
        (lambda s: s.update({"visual.extra": torch.zeros(2)}), "has also visual.extra"),
        (lambda s: s.update({"ln_final.bias": torch.zeros(2)}), "final_layer_norm.bias is 2, not 16"),
        (lambda s: s.update({"transformer.resblocks.0.attn.in_proj_bias": torch.zeros(47)}), "lacks text_model"),
        (lambda s: s.update({"logit_scale": torch.zeros(1)}), "logit_scale"),
    ],
    ids=["missing", "more", "another shape", "no three projections", "a list of one"],
)
def test_other_names_and_shapes_are_refused(state: dict[str, Tensor], change, said: str, tmp_path: Path) -> None:
    changed = dict(state)
    change(changed)
    torch.save(changed, tmp_path / "other.pt")
    with pytest.raises(UserError, match="does not fit CLIPModel") as error:
        opened(tmp_path / "other.pt")
    assert said in str(error.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half an archive", b"<!doctype html>"])
@pytest.mark.parametrize("name", ["clip.pt", "clip.safetensors"])
def test_what_is_no_file_of_weights_is_one_sentence(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read_clip(found(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_torchscript_archive_that_ends_early_is_one_sentence(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.jit.script(Archive(state)).save(tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / "part.pt", "w") as part:
        for name in whole.namelist():
            if "/data/" not in name:
                part.writestr(name, whole.read(name))
    with pytest.raises(UserError, match="is no file of weights") as error:
        read_clip(found(tmp_path / "part.pt"))
    assert "\n" not in str(error.value)
