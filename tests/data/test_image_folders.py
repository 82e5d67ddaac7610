"""A class keeps its number, hidden things are no data, and what is passed over or cannot be read is said."""

import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_pipelines import tiny_ddim, tiny_dit, tiny_stable_diffusion

from fewstep.cli import main
from fewstep.data.captioned import captioned
from fewstep.data.conditions import Conditions
from fewstep.data.images import read_images
from fewstep.errors import UserError
from fewstep.programs.pairs import make_pairs
from fewstep.recording import Recording, record


def picture(path: Path, value: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (value, value, value)).save(path)
    return path


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """Three classes: bag (0), boot (1), shoe (2)."""
    for place, name in enumerate(("bag", "boot", "shoe")):
        picture(tmp_path / "shop" / name / "0.png", 40 * place)
    return tmp_path / "shop"


@pytest.fixture(scope="module")
def dit() -> Recording:
    return record(tiny_dit())


def labels(folder: Path, recording: Recording) -> dict[str, int]:
    """Of each image's folder, the label that its image is given."""
    images = read_images(str(folder))
    real = captioned(images, recording, Conditions(recording, labels=range(20)))
    return {file.parent.name: row for file, row in zip(images.files, real._rows, strict=True)}


def hidden_folder(shop: Path) -> None:
    picture(shop / ".ipynb_checkpoints" / "0.png")


def zip_of_a_mac(shop: Path) -> None:
    picture(shop / "__MACOSX" / "bag" / "._0.png")
    (shop / "bag" / "._0.png").write_bytes(b"\x00\x05\x16\x07")


def files_beside(shop: Path) -> None:
    picture(shop / "overview.png")
    (shop / "LICENSE").touch()


def nested(shop: Path) -> None:
    picture(shop / "boot" / "originals" / "0.png")
    (shop / "boot" / "album.png").mkdir()


@pytest.mark.parametrize(
    ("add", "said"),
    [
        (hidden_folder, "1 file passed over: 1 hidden"),
        (zip_of_a_mac, "2 files passed over: 2 hidden"),
        (files_beside, "2 files passed over: 1 without a suffix, 1 beside the class folders"),
        (nested, "1 file passed over: 1 in folders inside a class folder"),
    ],
)
def test_what_is_no_data_shifts_no_label_and_is_counted(shop: Path, dit: Recording, add, said: str):
    add(shop)
    assert labels(shop, dit) == {"bag": 0, "boot": 1, "shoe": 2}
    assert said in read_images(str(shop)).passed_over


@pytest.mark.parametrize("content", [None, "0.tiff", ".DS_Store"])
def test_a_class_without_images_keeps_its_number(shop: Path, dit: Recording, content: str | None):
    (shop / "boot" / "0.png").unlink()
    if content is not None:
        (shop / "boot" / content).touch()
    assert labels(shop, dit) == {"bag": 0, "shoe": 2}
    note = captioned(read_images(str(shop)), dit, Conditions(dit, labels=range(3))).note
    assert "2 images in 3 class folders, as labels: bag is 0, boot is 1, without an image, shoe is 2" in note
    assert note.endswith({None: "shoe is 2", "0.tiff": "1 .tiff", ".DS_Store": "1 hidden"}[content])


def test_folders_called_by_numbers_are_those_labels_whatever_lies_beside_them(tmp_path: Path, dit: Recording):
    for name in ("2", "10"):
        picture(tmp_path / name / "0.png")
    for name in ("7", "notes"):
        (tmp_path / name).mkdir()
    assert labels(tmp_path, dit) == {"2": 2, "10": 10}
    picture(tmp_path / "notes" / "0.png")  # now nobody knows what 10 is: the number, or the first in the alphabet
    with pytest.raises(UserError, match=r"called by numbers \(10\) and one called 'notes'"):
        labels(tmp_path, dit)


def test_numbered_folders_count_the_prompts_though_one_is_empty(tmp_path: Path):
    recording = record(tiny_stable_diffusion())
    conditions = Conditions(recording, prompts=["a cat", "a dog", "a tree"])
    for name in ("0", "2"):
        picture(tmp_path / name / "0.png")
    (tmp_path / "1").mkdir()
    real = captioned(read_images(str(tmp_path)), recording, conditions)
    assert real._conditions is conditions and real._rows == [0, 2]
    assert "as prompts: 0 is 'a cat', 1 without an image, 2 is 'a tree'" in real.note


def test_many_classes_are_one_short_line(tmp_path: Path, dit: Recording):
    for number in range(200):
        (tmp_path / f"class_{number:03d}").mkdir()
    picture(tmp_path / "class_000" / "0.png")
    note = captioned(read_images(str(tmp_path)), dit, Conditions(dit, labels=[0])).note
    assert "class_000 is 0," in note and note.endswith("..., class_199 is 199, without an image") and len(note) < 1000


def test_images_that_a_metadata_file_does_not_list_are_counted(tmp_path: Path):
    picture(tmp_path / "in" / "a.png"), picture(tmp_path / "b.png"), picture(tmp_path / ".c.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "in/a.png", "text": "x"}\n')
    assert read_images(str(tmp_path)).passed_over == "; 1 file passed over: 1 not in metadata.jsonl"


def test_a_folder_whose_images_lie_too_deep_says_so(tmp_path: Path):
    picture(tmp_path / "train" / "cat" / "0.png")
    with pytest.raises(UserError, match=r"holds no images .*1 in folders inside a class folder"):
        read_images(str(tmp_path))


# --- files that cannot be read ---------------------------------------------------------------------------------------


def damaged(shop: Path) -> list[str]:
    """Five files that look like images: their names."""
    whole = (shop / "bag" / "0.png").read_bytes()
    (shop / "bag" / "cut.png").write_bytes(whole[: len(whole) // 2])
    noise = Image.fromarray(torch.randint(0, 255, (64, 64, 3), dtype=torch.uint8).numpy())
    noise.save(shop / "bag" / "cut.jpg")
    os.truncate(shop / "bag" / "cut.jpg", 1500)
    (shop / "boot" / "page.png").write_text("<html>404</html>")
    (shop / "shoe" / "empty.webp").touch()
    (shop / "shoe" / "gone.png").symlink_to(shop / "nowhere.png")
    return ["cut.png", "cut.jpg", "page.png", "empty.webp", "gone.png"]


def test_every_image_that_cannot_be_read_is_named(shop: Path):
    names = damaged(shop)
    with pytest.raises(UserError, match=r"5 of 8 images of --data cannot be read") as caught:
        read_images(str(shop)).refuse_unreadable()
    assert all(name in str(caught.value) for name in names) and "\n" not in str(caught.value)
    for name in names:
        next(shop.rglob(name)).unlink() if name != "gone.png" else (shop / "shoe" / name).unlink()
    read_images(str(shop)).refuse_unreadable()


def test_pairs_are_not_begun_on_an_image_that_cannot_be_read(tmp_path: Path):
    picture(tmp_path / "data" / "0.png"), (tmp_path / "data" / "1.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"1 of 2 images .*1\.png"):
        make_pairs(tiny_ddim(), data=str(tmp_path / "data"), out=str(tmp_path / "pairs"), cpu=True)
    assert not (tmp_path / "pairs").exists()


def test_a_run_names_it_before_its_first_step_and_says_what_its_folders_are(shop: Path, tmp_path: Path, capfd, caplog):
    tiny_dit().save_pretrained(tmp_path / "teacher")
    (shop / "boot" / "0.png").rename(shop / "boot" / "._0.png")
    (shop / "shoe" / "broken.png").write_bytes(b"no picture")
    words = ["distill", "consistency", "--teacher", str(tmp_path / "teacher"), "--classes", "0-2", "--data", str(shop)]
    words += ["--out", str(tmp_path / "run"), "--max_steps", "1", "--batch_size", "2", "--steps", "1", "--cpu"]
    words += ["--variant", "ect", "--sample_steps", "0", "--report_to", "none"]
    assert main(words) == 2
    assert "broken.png" in capfd.readouterr().err and not (tmp_path / "run" / "config.yaml").exists()
    (shop / "shoe" / "broken.png").unlink()
    assert main(words) == 0
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("--data")]
    assert lines == [
        "--data: 2 images in 3 class folders, as labels: bag is 0, boot is 1, without an image, shoe is 2; "
        "1 file passed over: 1 hidden"
    ]
