"""Scorers against their published formulas, with random weights; videos, batches, prompts; files that are not there."""

from __future__ import annotations

import colorsys
import hashlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_clip import MERGES, TINY, picture_features, prompt_features, random_state, tiny_network
from torch import Tensor

from fewstep.data.durable import file_sha256
from fewstep.errors import UserError
from fewstep.eval.features import Features
from fewstep.eval.scorers import SCORERS, aesthetic, clip_score, clip_tokens, hps, open_scorer, pick
from fewstep.eval.scorers.aesthetic import AestheticHead, AestheticScorer
from fewstep.eval.scorers.clip_score import BACKBONES, clip_scorer, open_clip_scorer
from fewstep.eval.scorers.clip_shapes import as_transformers
from fewstep.eval.scorers.colour import ColourScorer
from fewstep.eval.scorers.hps import hps_scorer
from fewstep.eval.scorers.motion import MotionScorer
from fewstep.eval.scorers.pick import pick_scorer
from fewstep.eval.scorers.pixels import clip_pixels, gigagan_pixels, padded_pixels, transformers_pixels
from fewstep.eval.scorers.scorer import Scorer
from fewstep.eval.weights import MissingWeightsError, Weights

PROMPTS = ["the cat", "a red cat", "the cat", "nothing red", " ".join(["cat"] * 90)]
G, L, _ = BACKBONES


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return random_state(TINY)


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.randint(0, 256, (5, 3, 40, 33), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def cosines(state: dict[str, Tensor], pixels: Tensor, prompts: list[str]) -> Tensor:
    network = tiny_network(state)
    assert network.tokens is not None
    texts = prompt_features(state, TINY, network.tokens(prompts))
    return (picture_features(state, TINY, pixels) * texts).sum(dim=1)


def test_the_clip_score_is_the_cosine_times_what_is_common(state: dict[str, Tensor], pictures: Tensor) -> None:
    raw = clip_scorer(tiny_network(state, resize=gigagan_pixels), G, "f00d", True)
    scaled = clip_scorer(tiny_network(state), L, "f00d", True)
    expected = cosines(state, gigagan_pixels(pictures, 32), [f"A photo depicts {prompt}" for prompt in PROMPTS])
    assert (raw(pictures, PROMPTS)["clip"] - expected).abs().max() < 1e-6
    assert (
        scaled(pictures, PROMPTS)["clip"] - 100 * cosines(state, clip_pixels(pictures, 32), PROMPTS)
    ).abs().max() < 1e-4
    assert raw.names == ("clip",)
    assert "ViT-g-14 laion2b_s12b_b42k, cosine" in raw.name
    assert "ViT-L/14 openai, 100 x cosine" in scaled.name


def test_pickscore_is_the_cosine_times_the_learnt_scale(state: dict[str, Tensor], pictures: Tensor) -> None:
    scorer = pick_scorer(tiny_network(state, resize=transformers_pixels, cleaned=False), "f00d", False)
    expected = state["logit_scale"].double().exp() * cosines(state, transformers_pixels(pictures, 32), PROMPTS)
    assert (scorer(pictures, PROMPTS)["pick"] - expected).abs().max() < 1e-6


def test_hps_is_a_hundred_times_the_cosine_of_padded_pictures(state: dict[str, Tensor], pictures: Tensor) -> None:
    scorer = hps_scorer(tiny_network(state, resize=padded_pixels), "f00d", True)
    expected = 100 * cosines(state, padded_pixels(pictures, 32), PROMPTS)
    assert (scorer(pictures, PROMPTS)["hps"] - expected).abs().max() < 1e-4


def test_the_aesthetic_score_is_five_linear_layers_of_the_unit_feature(
    state: dict[str, Tensor], pictures: Tensor
) -> None:
    head = AestheticHead(12).eval()
    found = AestheticScorer(tiny_network(state), head, "f00d", True)(pictures)["aesthetic"]
    x = picture_features(state, TINY, clip_pixels(pictures, 32))
    for i in (0, 2, 4, 6, 7):
        layer = head.layers[i]
        x = x @ layer.weight.double().T + layer.bias.double()
    assert (found - x[:, 0]).abs().max() < 1e-6


def test_the_aesthetic_head_has_the_published_parameters() -> None:
    sizes = [768, 1024, 128, 64, 16, 1]
    places = (0, 2, 4, 6, 7)
    expected = {f"layers.{i}.weight": (b, a) for i, a, b in zip(places, sizes, sizes[1:])}
    expected |= {f"layers.{i}.bias": (b,) for i, b in zip(places, sizes[1:])}
    assert {name: tuple(tensor.shape) for name, tensor in AestheticHead().state_dict().items()} == expected


def test_numbers_do_not_depend_on_the_batch(state: dict[str, Tensor], pictures: Tensor) -> None:
    whole = clip_scorer(tiny_network(state), L, "f00d", True)(pictures, PROMPTS)["clip"]
    assert whole.dtype == torch.float64
    for size in (1, 2, 4):
        scorer = clip_scorer(tiny_network(state, batch_size=size), L, "f00d", True)
        assert (scorer(pictures, PROMPTS)["clip"] - whole).abs().max() < 1e-4
        alone = torch.cat([scorer(pictures[i : i + 1], PROMPTS[i : i + 1])["clip"] for i in range(5)])
        assert (alone - whole).abs().max() < 1e-4
    assert clip_scorer(tiny_network(state), L, "f00d", True)(pictures[:0], [])["clip"].shape == (0,)


def test_what_comes_after_the_cut_changes_nothing_and_what_comes_before_does(
    state: dict[str, Tensor], pictures: Tensor
) -> None:
    """Also for prompts that share no end: transformers 4's way of cutting gave all of them one feature."""
    scorer = clip_scorer(tiny_network(state), L, "f00d", True)
    start = ["the", *["cat"] * 74]
    prompts = [" ".join(words) for words in (start, [*start, "red"], ["red", *start[1:], "red"])]
    same = pictures[:1].repeat(3, 1, 1, 1)
    fits, cut, other = scorer(same, prompts)["clip"].tolist()
    assert fits == cut
    assert abs(fits - other) > 1e-3
    assert scorer.note().startswith("2 of 3 prompts are longer than the 77 tokens")


def test_a_video_has_the_mean_of_its_frames(state: dict[str, Tensor], pictures: Tensor) -> None:
    videos = torch.stack([pictures[:3], pictures[1:4]])
    for scorer in (clip_scorer(tiny_network(state, batch_size=4), L, "f00d", True), ColourScorer()):
        for name, numbers in scorer(videos, PROMPTS[:2]).items():
            frames = scorer(videos.flatten(0, 1), [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3)[name]
            assert (numbers - frames.view(2, 3).mean(dim=1)).abs().max() < 1e-4


def test_prompts_and_samples_come_in_pairs(state: dict[str, Tensor], pictures: Tensor) -> None:
    scorer = clip_scorer(tiny_network(state), L, "f00d", True)
    with pytest.raises(ValueError, match="needs the samples' prompts"):
        scorer(pictures, None)
    with pytest.raises(ValueError, match="5 samples and 2 prompts"):
        scorer(pictures, PROMPTS[:2])


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 8, 8).byte(), torch.zeros(3, 8, 8).byte()]
)
def test_other_images_are_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        ColourScorer()(images)


def test_saturation_is_hsvs_and_contrast_the_deviation_of_luma(pictures: Tensor) -> None:
    numbers = ColourScorer()(pictures)
    for i, picture in enumerate(pictures):
        pixels = picture.flatten(1).T.double() / 255
        hsv = [colorsys.rgb_to_hsv(*pixel)[1] for pixel in pixels.tolist()]
        assert numbers["saturation"][i] == pytest.approx(sum(hsv) / len(hsv), rel=1e-9)
        luma = pixels @ torch.tensor([0.299, 0.587, 0.114]).double()
        assert numbers["contrast"][i] == pytest.approx(luma.std(correction=0).item(), rel=1e-5)


def test_grey_and_black_have_no_saturation_and_halves_the_most_contrast() -> None:
    halves = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    halves[..., :2] = 255
    red = torch.tensor([255, 0, 0]).byte().view(1, 3, 1, 1).expand(1, 3, 4, 4)
    grey = torch.full((1, 1, 4, 4), 9, dtype=torch.uint8)
    assert ColourScorer()(halves)["saturation"].item() == 0
    assert ColourScorer()(halves)["contrast"].item() == pytest.approx(0.5)
    assert ColourScorer()(red)["saturation"].item() == 1
    assert ColourScorer()(grey)["saturation"].item() == ColourScorer()(grey)["contrast"].item() == 0


class Means:
    """Two features: the mean of a picture, and what is left to 255."""

    name, sha256, resize, verified = "means", "f00d", "none", False

    def accepts(self, shape: tuple[int, ...]) -> bool:
        return True

    def __call__(self, images: Tensor) -> Features:
        mean = images.float().mean(dim=(1, 2, 3))
        return Features(torch.stack([mean, 255 - mean], dim=1), None)


def test_motion_is_the_mean_difference_of_neighbouring_frames() -> None:
    levels = torch.tensor([[0, 255, 255, 0], [10, 10, 10, 10]])
    videos = levels.byte().view(2, 4, 1, 1, 1).expand(2, 4, 3, 8, 8)
    numbers = MotionScorer(Means())(videos)
    assert numbers["motion"].tolist() == pytest.approx([2 / 3, 0])
    # From (0, 255) to (255, 0) the cosine is 0, at rest it is 1.
    assert numbers["motion_dino"].tolist() == pytest.approx([2 / 3, 0], abs=1e-6)
    assert MotionScorer().names == ("motion",)
    assert (MotionScorer(Means()).sha256, MotionScorer(Means()).verified) == ("f00d", False)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 3, 8, 8)])
def test_motion_is_of_videos(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="motion is of videos"):
        MotionScorer()(torch.zeros(shape, dtype=torch.uint8))


# --- from files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with every scorer's files, tiny networks in the place of the published ones."""
    monkeypatch.setattr(clip_tokens, "_COUNT", len(MERGES))
    monkeypatch.setattr(clip_tokens, "_SHA256", hashlib.sha256("\n".join(MERGES).encode()).hexdigest())
    monkeypatch.setattr(clip_score, "BACKBONES", tuple(replace(one, shape=TINY) for one in BACKBONES))
    for module, name in ((pick, "VIT_H_14"), (hps, "VIT_H_14"), (aesthetic, "VIT_L_14")):
        monkeypatch.setattr(module, name, TINY)
    monkeypatch.setattr(aesthetic, "AestheticHead", lambda: AestheticHead(12))
    for name in ("clip-vit-large-patch14", "PickScore_v1"):
        (tmp_path / name).mkdir()
    (tmp_path / "clip-vit-large-patch14/merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES))
    save_file(as_transformers(state), tmp_path / "clip-vit-large-patch14/model.safetensors")
    save_file(as_transformers(state), tmp_path / "PickScore_v1/model.safetensors")
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "HPS_v2.1_compressed.pt")
    torch.save(AestheticHead(12).state_dict(), tmp_path / aesthetic.HEAD.name)
    return tmp_path


def told(folder: Path) -> Weights:
    """Weights whose hashes somebody vouches for."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return Weights(folder, {path.relative_to(folder).as_posix(): file_sha256(path) for path in files})


@pytest.mark.parametrize("group", ["clip", "pick", "hps", "aesthetic"])
def test_a_scorer_is_opened_from_its_files(
    group: str, folder: Path, state: dict[str, Tensor], pictures: Tensor
) -> None:
    scorer: Scorer = open_scorer(group, told(folder))
    numbers = scorer(pictures, PROMPTS)
    assert set(numbers) == set(scorer.names)
    assert all(number.shape == (5,) and number.dtype == torch.float64 for number in numbers.values())
    assert not scorer.verified  # by the user's word, not by a published hash
    assert scorer.sha256 in {file_sha256(path) for path in folder.rglob("*") if path.is_file()}
    if group == "clip":
        assert "ViT-L/14 openai" in scorer.name
        assert (numbers["clip"] - 100 * cosines(state, clip_pixels(pictures, 32), PROMPTS)).abs().max() < 1e-4


@pytest.mark.parametrize("group", ["clip", "pick", "hps", "aesthetic"])
def test_a_file_that_is_missing_is_one_sentence(group: str, tmp_path: Path) -> None:
    with pytest.raises(MissingWeightsError, match="is missing") as error:
        open_scorer(group, Weights(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["HPS_v2.1_compressed.pt", "ViT-L-14.pt", "ViT-B-32.pt", aesthetic.HEAD.name])
def test_a_file_that_is_not_the_published_one_is_refused(name: str, folder: Path) -> None:
    (folder / name).write_bytes(b"half of it")
    group = {"HPS_v2.1_compressed.pt": "hps", aesthetic.HEAD.name: "aesthetic"}.get(name, "clip")
    if name == "ViT-B-32.pt":
        (folder / "clip-vit-large-patch14/model.safetensors").unlink()
    with pytest.raises(UserError, match="damaged"):
        open_scorer(group, Weights(folder))


def test_scorers_without_weights_need_no_folder() -> None:
    assert open_scorer("saturation", Weights()).names == ("saturation", "contrast")
    assert open_scorer("motion", Weights(), extractor=Means()).names == ("motion", "motion_dino")


def test_a_backbone_is_chosen_by_its_name(folder: Path) -> None:
    assert "ViT-L/14 openai" in open_clip_scorer(told(folder), backbone="ViT-L/14 openai").name
    with pytest.raises(MissingWeightsError, match=r"^CLIP-ViT-g-14"):
        open_clip_scorer(told(folder), backbone="ViT-g-14 laion2b_s12b_b42k")
    with pytest.raises(UserError, match="no CLIP backbone is called 'ViT-B/16'"):
        open_clip_scorer(told(folder), backbone="ViT-B/16")


def test_an_unknown_group_is_said_with_all_there_are() -> None:
    with pytest.raises(UserError, match=", ".join(SCORERS)):
        open_scorer("beauty", Weights())


def test_the_page_of_scorers_names_every_file_with_its_hash_and_every_number() -> None:
    page = (Path(__file__).parents[2] / "docs" / "scorers.md").read_text(encoding="utf-8")
    files = [
        *clip_tokens.MERGES,
        *pick.FILES,
        *hps.FILES,
        aesthetic.HEAD,
        *(file for b in BACKBONES for file in b.files),
    ]
    for file in files:
        assert file.sha256 is None or f"`{file.sha256}`" in page, file.name
        assert f"`{file.name}`" in page or file.name.startswith("CLIP-ViT-g-14-laion2B-s12B-b42K/"), file.name
    assert set(re.findall(r"`([0-9a-f]{64})`", page)) == {file.sha256 for file in files} - {None}
    assert set(re.findall(r"^\| `(\w+)` \| `", page, re.M)) == set(SCORERS)
