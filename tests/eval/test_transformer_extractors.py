"""DINOv2 and CLIP as extractors: small networks of the published layouts, beside their formulas."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from stub_weights import told
from torch import Tensor

from fewstep.errors import UserError
from fewstep.eval.extractors import clip_image, dinov2
from fewstep.eval.extractors.clip_image import FILE, ClipImageExtractor
from fewstep.eval.extractors.dinov2 import SIZES, Dinov2Extractor, Size, positions
from fewstep.eval.extractors.kinds import frechet_name

WIDTH, LAYERS, HEADS = 24, 2, 3
TINY = Size("t", "dinov2-tiny", WIDTH, LAYERS, HEADS, 64 * "0")
AUTHORS, HUBS = TINY.files


def pictures(num: int = 3, size: tuple[int, int] = (50, 70)) -> Tensor:
    coarse = torch.rand(num, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    return (F.interpolate(coarse, size, mode="bilinear") * 255).byte()


# --- DINOv2 -----------------------------------------------------------------------------------------------------------


def authors_state() -> dict[str, Tensor]:
    """Random tensors in the layout of the authors' file, small enough for a network of two layers."""
    draws = torch.Generator().manual_seed(1)

    def random(*shape: int, scale: float = 0.3) -> Tensor:
        return scale * torch.randn(shape, generator=draws)

    state = {
        "cls_token": random(1, 1, WIDTH),
        "pos_embed": random(1, 1 + 37**2, WIDTH, scale=1.0),
        "mask_token": random(1, WIDTH),
        "patch_embed.proj.weight": random(WIDTH, 3, 14, 14, scale=0.05),
        "patch_embed.proj.bias": random(WIDTH),
        "norm.weight": 1 + random(WIDTH),
        "norm.bias": random(WIDTH),
    }
    for layer in range(LAYERS):
        for name, shape in (
            *((f"norm{i}.{kind}", (WIDTH,)) for i in (1, 2) for kind in ("weight", "bias")),
            *((f"ls{i}.gamma", (WIDTH,)) for i in (1, 2)),
            *(("attn.qkv.weight", (3 * WIDTH, WIDTH)), ("attn.qkv.bias", (3 * WIDTH,))),
            *(("attn.proj.weight", (WIDTH, WIDTH)), ("attn.proj.bias", (WIDTH,))),
            *(("mlp.fc1.weight", (4 * WIDTH, WIDTH)), ("mlp.fc1.bias", (4 * WIDTH,))),
            *(("mlp.fc2.weight", (WIDTH, 4 * WIDTH)), ("mlp.fc2.bias", (WIDTH,))),
        ):
            state[f"blocks.{layer}.{name}"] = random(*shape) + name.startswith("norm") * name.endswith("weight")
    return state


def by_the_formula(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The class token of a vision transformer with layer scale, of images (N, 3, 224, 224)."""

    def norm(values: Tensor, name: str) -> Tensor:
        return F.layer_norm(values, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(values: Tensor, name: str) -> Tensor:
        return F.linear(values, state[f"{name}.weight"], state[f"{name}.bias"])

    tokens = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14)
    tokens = torch.cat([state["cls_token"].expand(len(x), -1, -1), tokens.flatten(2).transpose(1, 2)], dim=1)
    tokens = tokens + positions(state["pos_embed"], 16)
    for layer in (f"blocks.{i}" for i in range(LAYERS)):
        joined = linear(norm(tokens, f"{layer}.norm1"), f"{layer}.attn.qkv")
        queries, keys, values = joined.unflatten(2, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)
        tokens = tokens + state[f"{layer}.ls1.gamma"] * linear(mixed, f"{layer}.attn.proj")
        inner = F.gelu(linear(norm(tokens, f"{layer}.norm2"), f"{layer}.mlp.fc1"))
        tokens = tokens + state[f"{layer}.ls2.gamma"] * linear(inner, f"{layer}.mlp.fc2")
    return norm(tokens, "norm")[:, 0]


def hubs_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors as facebook/dinov2-* has them, written out by hand."""
    found = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.mask_token": state["mask_token"],
        "embeddings.position_embeddings": state["pos_embed"],
        "embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
        "layernorm.weight": state["norm.weight"],
        "layernorm.bias": state["norm.bias"],
    }
    for layer in range(LAYERS):
        old, new = f"blocks.{layer}", f"encoder.layer.{layer}"
        for kind in ("weight", "bias"):
            parts = state[f"{old}.attn.qkv.{kind}"].chunk(3)
            for part, value in zip(("query", "key", "value"), parts, strict=True):
                found[f"{new}.attention.attention.{part}.{kind}"] = value.clone()
            found[f"{new}.attention.output.dense.{kind}"] = state[f"{old}.attn.proj.{kind}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                found[f"{new}.{name}.{kind}"] = state[f"{old}.{name}.{kind}"]
        for i in (1, 2):
            found[f"{new}.layer_scale{i}.lambda1"] = state[f"{old}.ls{i}.gamma"]
    return found


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dinov2, "SIZES", {"large": TINY})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nowhere")


def test_features_are_the_class_token_of_the_formula(tmp_path: Path, tiny):
    state = authors_state()
    torch.save(state, tmp_path / AUTHORS.name)
    extractor = Dinov2Extractor(told(tmp_path, AUTHORS), batch_size=2)
    images = pictures()
    sized = [Image.fromarray(x.permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC) for x in images]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    inputs = (torch.from_numpy(np.stack([np.array(x) for x in sized])) / 255 - mean) / std
    expected = by_the_formula(state, inputs.permute(0, 3, 1, 2))
    found = extractor(images)
    assert found.logits is None and found.features.dtype == torch.float32
    assert expected.std(0).mean() > 0.01  # pictures differ
    assert torch.allclose(found.features, expected, atol=1e-4)
    assert not extractor.verified and frechet_name(extractor) == "FD-dinov2-vit-t/14"
    assert torch.equal(extractor(images[:, :1]).features, extractor(images[:, :1].repeat(1, 3, 1, 1)).features)


def test_the_hubs_file_is_the_same_network_and_comes_second(tmp_path: Path, tiny):
    (tmp_path / "dinov2-tiny").mkdir()
    state = authors_state()
    save_file(hubs_state(state), tmp_path / HUBS.name)
    of_hub = Dinov2Extractor(told(tmp_path, HUBS))
    found = of_hub(pictures()).features
    torch.save(state, tmp_path / AUTHORS.name)
    both = Dinov2Extractor(told(tmp_path, AUTHORS, HUBS))
    assert both.sha256 != of_hub.sha256
    assert torch.allclose(both(pictures()).features, found, atol=1e-5)


def test_another_network_is_refused_by_names_and_shapes(tmp_path: Path, tiny):
    state = authors_state()
    for changed, words in (
        ({"register_tokens": torch.ones(1, 4, WIDTH)}, "it has also register_tokens"),
        ({"pos_embed": torch.ones(1, 257, WIDTH)}, f"position_embeddings is 1x257x{WIDTH}, not 1x1370x{WIDTH}"),
        ({"blocks.1.attn.qkv.bias": torch.ones(3)}, r"attention.attention.key.bias is 1, not 24"),
        ({"blocks.2.ls1.gamma": torch.ones(WIDTH)}, r"it has also encoder.layer.2.layer_scale1.lambda1"),
    ):
        torch.save({**state, **changed}, tmp_path / AUTHORS.name)
        with pytest.raises(UserError, match=words):
            Dinov2Extractor(told(tmp_path, AUTHORS))(pictures(1))
    del state["norm.bias"]
    torch.save(state, tmp_path / AUTHORS.name)
    with pytest.raises(UserError, match=r"does not fit dinov2-vit-t/14: it lacks layernorm\.bias$"):
        Dinov2Extractor(told(tmp_path, AUTHORS))(pictures(1))


def test_places_are_read_where_the_authors_network_reads_them():
    """Of a table that grows by one from patch to patch, the bicubic value is about the place itself, off the edge."""
    ramp = torch.arange(37.0).view(1, 37, 1, 1).expand(1, 37, 37, 2)
    table = torch.cat([torch.full((1, 1, 2), -5.0), ramp.reshape(1, 37**2, 2)], dim=1)
    found = positions(table, 16)
    assert found.shape == (1, 257, 2) and torch.equal(found[:, 0], table[:, 0])
    rows = found[0, 1:, 0].view(16, 16)
    expected = (torch.arange(16) + 0.5) * 37 / 16.1 - 0.5
    assert torch.allclose(rows[1:14], expected[1:14, None].expand(-1, 16), atol=0.06)
    # Without the authors' 0.1, as transformers' network does it, a place lies up to 0.2 patches further on.
    assert (13.5 * 37 / 16 - 0.5) - rows[13, 0] > 0.12
    assert torch.equal(positions(table[:, :257], 16), table[:, :257])


def test_the_published_sizes_are_those_of_the_published_file():
    layout = dinov2._layout(SIZES["large"])
    numbers = sum(torch.Size(shape).numel() for shape in layout.values())
    assert 0 < SIZES["large"].bytes - 4 * numbers < 1e-3 * SIZES["large"].bytes
    assert [size.name for size in SIZES.values()] == ["dinov2-vit-l/14", "dinov2-vit-b/14", "dinov2-vit-s/14"]
    assert SIZES["base"].files[0].name == "dinov2_vitb14_pretrain.pth"
    assert SIZES["small"].files[1].name == "dinov2-small/model.safetensors"


# --- CLIP -------------------------------------------------------------------------------------------------------------


def small_clip():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=336,
        patch_size=112,
        projection_dim=10,
    )
    torch.manual_seed(0)
    return CLIPVisionModelWithProjection(config).eval()


@pytest.fixture
def clip_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A whole CLIP as the hub has it: with the tower of texts, a temperature, and numbers of positions."""
    state = dict(small_clip().state_dict())
    others = {
        "vision_model.embeddings.position_ids": torch.arange(10)[None],
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "text_projection.weight": torch.ones(10, 10),
        "logit_scale": torch.tensor(4.6),
    }
    (tmp_path / FILE.name).parent.mkdir()
    torch.save({**state, **others}, tmp_path / FILE.name)
    monkeypatch.setattr(clip_image, "_empty", small_clip)
    return tmp_path


def test_embeddings_are_of_the_middle_and_of_length_one(clip_folder: Path):
    images = pictures()
    found = ClipImageExtractor(told(clip_folder, FILE), batch_size=2)(images).features
    middles = [Image.fromarray(x.permute(1, 2, 0).numpy()).crop((10, 0, 60, 50)) for x in images]
    sized = np.stack([np.array(x.resize((336, 336), Image.Resampling.BICUBIC)) for x in middles])
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    with torch.no_grad():
        inputs = ((torch.from_numpy(sized) / 255 - mean) / std).permute(0, 3, 1, 2)
        expected = small_clip()(pixel_values=inputs).image_embeds
    assert torch.allclose(found.norm(dim=1), torch.ones(3), atol=1e-6)
    assert torch.allclose(found, F.normalize(expected, dim=1), atol=1e-5)


def test_a_clip_of_another_layout_is_refused(clip_folder: Path):
    state = torch.load(clip_folder / FILE.name, weights_only=True)
    del state["visual_projection.weight"]
    torch.save(state, clip_folder / FILE.name)
    with pytest.raises(
        UserError, match=r"does not fit CLIPVisionModelWithProjection: it lacks visual_projection\.weight"
    ):
        ClipImageExtractor(told(clip_folder, FILE))(pictures(1))


def test_the_published_clip_is_a_large_one():
    """304.3 million parameters of images, in a file that has 123.7 million more of texts."""
    network = clip_image._empty()
    numbers = sum(parameter.numel() for parameter in network.parameters())
    assert all(parameter.is_meta for parameter in network.parameters())
    of_texts = 123_650_304  # CLIP ViT-L's tower of texts (12 layers of width 768, 49,408 words) and its projection
    assert 0 < FILE.size - 4 * (numbers + of_texts) < 1e-3 * FILE.size
