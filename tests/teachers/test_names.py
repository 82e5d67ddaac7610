"""A card calls a teacher by a name that means something, and says nothing else of the machine."""

from pathlib import Path

import pytest

from fewstep.teachers.names import UNNAMED, base_model, called

HASH = "462165984030d82259a11f4367a4eed129e94a7b"


@pytest.mark.parametrize("inside", [f"snapshots/{HASH}", f"snapshots/{HASH}/prior", "."])
def test_a_folder_of_the_hubs_cache_is_called_by_its_hub_id(inside: str, tmp_path: Path):
    folder = tmp_path / "hub" / "models--some-one--a-model-1.5" / inside
    folder.mkdir(parents=True)
    assert base_model(str(folder)) == "some-one/a-model-1.5"
    link = tmp_path / "mine"
    link.symlink_to(folder)
    assert base_model(str(link)) == "some-one/a-model-1.5"


@pytest.mark.parametrize(
    "inside",
    [
        "checkpoint-1000",
        "diffusers",
        "checkpoints/step_00500",
        "final/fp16",
        "epoch3",
        "output/pipeline",
        HASH,
        "12",
    ],
)
def test_a_name_that_says_nothing_gives_way_to_the_one_above(inside: str, tmp_path: Path, monkeypatch):
    folder = tmp_path / "my-cats-xl" / inside
    folder.mkdir(parents=True)
    assert base_model(str(folder)) == "my-cats-xl"
    monkeypatch.chdir(folder)
    assert base_model(".") == "my-cats-xl" == base_model("./")
    assert base_model("..") == "my-cats-xl"


def test_a_name_that_says_something_stays(tmp_path: Path):
    for name in ("my-cats-xl", "stable-diffusion-v1-5", "model-of-cats", "sd3.5", "checkpointer", "2cats"):
        (tmp_path / name).mkdir()
        assert base_model(str(tmp_path / name)) == name


def test_a_single_file_is_called_without_its_suffix(tmp_path: Path):
    for name, expected in (("cats_v51.safetensors", "cats_v51"), ("model.safetensors", "my-cats")):
        path = tmp_path / "my-cats" / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
        assert base_model(str(path)) == expected


def test_where_no_name_says_anything_there_is_none_and_a_users_is_not_told(tmp_path: Path, monkeypatch):
    for users in ("home", "Users"):
        assert called(Path("/", users, "alice", "models", "diffusers")) == UNNAMED
    assert called(Path("/data/models/checkpoint-1000")) == UNNAMED == called(Path("/"))
    monkeypatch.setenv("HOME", str(tmp_path / "alice"))
    assert called(tmp_path / "alice" / "diffusers") == UNNAMED
    assert called(tmp_path / "alice" / "cats" / "diffusers") == "cats"


def test_a_folder_called_like_an_embedded_teacher_further_up(tmp_path: Path):
    folder = tmp_path / "fashion-sd" / "checkpoint-10"
    folder.mkdir(parents=True)
    assert base_model(str(folder)) == "./fashion-sd"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("mine.safetensors", "mine"),
        ("mine/checkpoint-500/pytorch_lora_weights.safetensors", "mine"),
        (f"models--a--b/snapshots/{HASH}/x.safetensors", "a/b"),
    ],
)
def test_loras_are_called_alike(path: str, expected: str, tmp_path: Path):
    assert called(tmp_path / path) == expected
