"""Which files a teacher is read from: variants, revisions, folders inside, without a network."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny_pipelines import tiny_stable_diffusion

from fewstep.cli import main
from fewstep.errors import UserError
from fewstep.programs.teacher import TeacherSettings
from fewstep.teachers.source import find_source, variants

NETWORKS = ("text_encoder", "unet", "vae")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "teacher"
    tiny_stable_diffusion().save_pretrained(folder)
    return folder


def _as_variant(plain: Path, to: Path, **names: str) -> Path:
    """A copy in which the weights of parts are there under a variant's name alone."""
    shutil.copytree(plain, to)
    for part, variant in names.items():
        for path in (to / part).glob("*model.safetensors"):
            path.rename(path.with_name(f"{path.name.removesuffix('.safetensors')}.{variant}.safetensors"))
    return to


def test_the_only_variant_is_taken_by_itself(plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = _as_variant(plain, tmp_path / "half", **dict.fromkeys(NETWORKS, "fp16"))
    with caplog.at_level(logging.INFO, "fewstep"):
        settings = TeacherSettings(teacher=str(folder))
        loaded = settings.load()
    assert settings.source.told == {"variant": "fp16"} and "variant fp16 alone" in caplog.text
    weights = loaded.unet.state_dict()
    expected = DiffusionPipeline.from_pretrained(plain).unet.state_dict()
    assert all(weights[name].equal(tensor) for name, tensor in expected.items())


def test_a_setting_that_is_a_list_is_no_part(plain: Path, tmp_path: Path):
    """phase_bounds of a student of phases: no folder of that name is lacking, and its own code is what is refused."""
    shutil.copytree(plain, tmp_path / "phased")
    index = tmp_path / "phased" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"phase_bounds": [749.0]}))
    assert find_source(str(tmp_path / "phased")).parts() == find_source(str(plain)).parts()


def test_plain_weights_are_taken_where_there_are_some(plain: Path, tmp_path: Path):
    folder = _as_variant(plain, tmp_path / "both", **dict.fromkeys(NETWORKS, "fp16"))
    for part in NETWORKS:
        shutil.copytree(plain / part, folder / part, dirs_exist_ok=True)
    assert find_source(str(folder)).variant is None
    assert find_source(str(folder), variant="fp16").variant == "fp16"


def test_a_part_without_plain_weights_decides(plain: Path, tmp_path: Path):
    """diffusers takes the variant where it is and plain weights elsewhere."""
    folder = _as_variant(plain, tmp_path / "mixed", unet="bf16")
    settings = TeacherSettings(teacher=str(folder))
    assert settings.source.variant == "bf16" and settings.load().unet is not None


@pytest.mark.parametrize(
    ("names", "variant", "words"),
    [
        ({"unet": "fp16", "vae": "bf16"}, None, r"in variants alone: unet \(fp16\), vae \(bf16\).*--variant"),
        ({}, "fp16", "no weights of the variant fp16; leave out --variant"),
        ({"unet": "bf16"}, "fp16", "no weights of the variant fp16; it has: bf16"),
    ],
)
def test_variants_that_are_not_there(names: dict, variant: str | None, words: str, plain: Path, tmp_path: Path):
    folder = _as_variant(plain, tmp_path / "teacher", **names)
    with pytest.raises(UserError, match=words):
        find_source(str(folder), variant=variant)


def test_two_variants_and_no_plain_weights_have_to_be_told_apart(plain: Path, tmp_path: Path):
    folder = _as_variant(plain, tmp_path / "teacher", **dict.fromkeys(NETWORKS, "fp16"))
    for part in NETWORKS:
        for path in (folder / part).glob("*.fp16.safetensors"):
            shutil.copy(path, path.with_name(path.name.replace("fp16", "non_ema")))
    with pytest.raises(UserError, match=r"unet \(fp16, non_ema\).*--variant"):
        find_source(str(folder))
    assert find_source(str(folder), variant="non_ema").variant == "non_ema"


def test_names_of_weights_in_all_their_forms():
    files = [
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "vae/diffusion_pytorch_model.bin",
        "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
        "text_encoder/model.fp16-00001-of-00002.safetensors",
        "text_encoder_2/model-00001-of-00002.fp16.safetensors",
        "text_encoder_3/pytorch_model.bf16.bin",
        "text_encoder_3/flax_model.msgpack",
        "unet/openvino_model.bin",
        "model.safetensors",
        "transformer/original/model.fp8.safetensors",
    ]
    assert variants(files) == {
        "unet": {"fp16"},
        "vae": {None},
        "transformer": {None},
        "text_encoder": {"fp16"},
        "text_encoder_2": {"fp16"},
        "text_encoder_3": {"bf16"},
    }


def test_a_pipeline_inside_a_folder(plain: Path, tmp_path: Path):
    shutil.copytree(plain, tmp_path / "family" / "small")
    settings = TeacherSettings(teacher=str(tmp_path / "family"), subfolder="small")
    assert settings.load().unet is not None and settings.source.told == {"subfolder": "small"}
    with pytest.raises(UserError, match=r"family, folder large, does not exist"):
        find_source(str(tmp_path / "family"), subfolder="large")


@pytest.mark.parametrize(
    ("name", "told", "words"),
    [
        ("fashion-sd", {"revision": "main"}, "is embedded in this package: leave out --revision"),
        ("fashion-sd", {"variant": "fp16"}, "leave out --variant"),
        ("fashion-flow", {"subfolder": "a"}, "leave out --subfolder"),
        ("FOLDER", {"revision": "main"}, "lies on this machine: leave out --revision"),
    ],
)
def test_what_does_not_belong_to_a_teacher(name: str, told: dict, words: str, plain: Path):
    with pytest.raises(UserError, match=words):
        find_source(str(plain) if name == "FOLDER" else name, **told)


# --- the hub's cache, which is all there is without a connection ----------------------------------------------------


@pytest.fixture
def on_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a folder into the hub's cache as a revision of some/teacher."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.HF_HUB_CACHE", str(cache), raising=False)

    def put(folder: Path, revision: str, commit: str, inside: str = ".") -> None:
        repository = cache / "models--some--teacher"
        shutil.copytree(folder, repository / "snapshots" / commit / inside)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)

    return put


def _shaken(plain: Path, to: Path) -> Path:
    shutil.copytree(plain, to)
    path = to / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    return to


def test_a_revision_of_a_hub_id(plain: Path, tmp_path: Path, on_hub: Callable[..., None]):
    on_hub(plain, "main", "a" * 40)
    on_hub(_shaken(plain, tmp_path / "other"), "fixed", "b" * 40)
    one, other = (
        TeacherSettings(teacher="some/teacher", revision=revision).load().unet.state_dict()
        for revision in (None, "fixed")
    )
    assert all(other[name].equal(tensor + 1) for name, tensor in one.items())


def test_a_hub_id_with_one_variant(plain: Path, tmp_path: Path, on_hub: Callable[..., None]):
    on_hub(_as_variant(plain, tmp_path / "half", **dict.fromkeys(NETWORKS, "fp16")), "main", "a" * 40)
    settings = TeacherSettings(teacher="some/teacher")
    assert settings.load().unet is not None and settings.source.told == {"variant": "fp16"}


def test_a_pipeline_inside_a_repository(plain: Path, on_hub: Callable[..., None], capsys: pytest.CaptureFixture[str]):
    on_hub(plain, "main", "a" * 40, "prior")
    settings = TeacherSettings(teacher="some/teacher", subfolder="prior")
    assert settings.load().unet is not None
    assert main(["probe", "some/teacher", "--subfolder", "prior"]) == 0
    assert main(["probe", "some/teacher", "--subfolder", "decoder"]) == 2
    assert "some/teacher, folder decoder, does not exist" in capsys.readouterr().err
