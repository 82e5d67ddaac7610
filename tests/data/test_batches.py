"""What a run is fed: prompts, labels and images from files, each mistake in one line, and keyed batches of them."""

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import tiny_pipelines
import torch
from PIL import Image

from fewstep.data import real
from fewstep.data.captioned import captioned
from fewstep.data.conditions import Conditions, read_classes, read_prompts
from fewstep.data.images import RealImages, read_idx, read_images
from fewstep.errors import UserError
from fewstep.recording import Recording, record


def picture(path: Path, value: int, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)
    return path


def idx(path: Path, array: torch.Tensor) -> None:
    data = struct.pack(f">HBB{array.dim()}I", 0, 8, array.dim(), *array.shape) + array.numpy().tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


# --- prompts and labels ----------------------------------------------------------------------------------------------


def test_prompts_are_the_lines_that_are_not_empty(tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("a cat\n\n  eine Tür \n", encoding="utf-8")
    assert read_prompts(tmp_path / "prompts.txt") == ["a cat", "eine Tür"]


def test_a_file_written_by_windows_gives_clean_prompts(tmp_path: Path):
    (tmp_path / "prompts.txt").write_bytes("a cat\r\na dog\r\n".encode("utf-8-sig"))
    assert read_prompts(tmp_path / "prompts.txt") == ["a cat", "a dog"]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r"])
def test_a_prompt_ends_at_a_newline_alone(tmp_path: Path, mark: str):
    (tmp_path / "prompts.txt").write_bytes(f"one{mark}cat\nsecond\n".encode())
    assert read_prompts(tmp_path / "prompts.txt") == [f"one{mark}cat", "second"]


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot read"), (b"\n \n", "holds no prompt"), (b"\xff\xfe\x00", "not UTF-8")]
)
def test_prompts_that_cannot_be_used_are_refused_in_one_line(tmp_path: Path, content: bytes | None, message: str):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_prompts(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "labels"), [("0-3", [0, 1, 2, 3]), ("1,5, 7-8", [1, 5, 7, 8]), ("4", [4]), ("3-3", [3])]
)
def test_classes_are_ranges_and_numbers(text: str, labels: list[int]):
    assert read_classes(text) == labels


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,", "-1", "1-", "1.5"])
def test_classes_of_another_form_are_refused(text: str):
    with pytest.raises(UserError, match="--classes takes labels"):
        read_classes(text)


def test_a_range_that_would_fill_the_memory_is_refused():
    with pytest.raises(UserError, match="more than 1,000,000 labels"):
        read_classes("0-99999999999")


# --- images ----------------------------------------------------------------------------------------------------------


def test_class_folders_give_their_names_in_alphabetical_order(tmp_path: Path):
    for name in ("shoe", "bag"):
        for k in range(2):
            picture(tmp_path / name / f"{k}.png", 100)
    images = read_images(str(tmp_path))
    assert images.captions == ["bag", "bag", "shoe", "shoe"]


def test_metadata_gives_texts_or_labels(tmp_path: Path):
    for k in range(2):
        picture(tmp_path / f"{k}.png", k)
    lines = [{"file_name": "0.png", "text": "a cat"}, {"file_name": "1.png", "text": "a dog"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert read_images(str(tmp_path)).captions == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "no.png", "text": "x"}', "no file"),
        ('{"text": "x"}', "line 1: wants file_name"),
        ("nonsense", "line 1"),
        ("[]", "line 1"),
        ('{"file_name": "0.png"}', "text or label"),
        ("", "empty"),
        ('{"file_name": "0.png", "text": null}', "line 1: the text must be a string, not None"),
        ('{"file_name": "0.png", "text": ["x"]}', "the text must be a string"),
        ('{"file_name": "0.png", "text": "x"}\n{"file_name": "0.png", "label": 1}', "line 2: give every image a text"),
        ('{"file_name": "0.png", "label": 3.7}', "line 1: wants file_name and text or label"),
        ('{"file_name": "0.png", "label": true}', "line 1: wants file_name and text or label"),
        ('{"file_name": "0.png", "text": "\xe9"}', "not UTF-8"),
    ],
)
def test_metadata_that_cannot_be_used_is_refused_by_line(tmp_path: Path, line: str, message: str):
    picture(tmp_path / "0.png", 0)
    (tmp_path / "metadata.jsonl").write_text(line, encoding="latin-1")
    with pytest.raises(UserError, match=message):
        read_images(str(tmp_path))


def test_a_caption_may_hold_other_ends_of_lines(tmp_path: Path):
    picture(tmp_path / "0.png", 0)
    row = {"file_name": "0.png", "text": "one\u2028two"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_images(str(tmp_path)).captions == ["one\u2028two"]


def test_class_folders_called_by_numbers_are_those_labels(tmp_path: Path):
    for label in (2, 10):
        picture(tmp_path / str(label) / "0.png", label)
    images = read_images(str(tmp_path))
    assert dict(zip(images.captions, [file.parent.name for file in images.files])) == {2: "2", 10: "10"}


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_are_padded_to_a_side_of_32(tmp_path: Path, suffix: str):
    pixels = torch.arange(2 * 28 * 28).reshape(2, 28, 28).to(torch.uint8)
    idx(tmp_path / f"train-images-idx3-ubyte{suffix}", pixels)
    idx(tmp_path / f"train-labels-idx1-ubyte{suffix}", torch.tensor([3, 1], dtype=torch.uint8))
    images = read_images(str(tmp_path))
    assert images.captions == [3, 1]
    image = images.image(0, 1, 32, 32).float() / 255
    torch.testing.assert_close(image[0, 2:30, 2:30], pixels[0].float() / 255)
    assert not image[0, :2].any()


def test_a_truncated_idx_file_is_refused(tmp_path: Path):
    idx(tmp_path / "train-images-idx3-ubyte", torch.zeros(2, 28, 28, dtype=torch.uint8))
    data = (tmp_path / "train-images-idx3-ubyte").read_bytes()
    (tmp_path / "train-images-idx3-ubyte").write_bytes(data[:-1])
    with pytest.raises(ValueError, match="truncated"):
        read_idx(tmp_path / "train-images-idx3-ubyte")
    with pytest.raises(UserError, match="cannot be read"):
        read_images(str(tmp_path))


def test_an_idx_file_is_unpacked_no_further_than_it_says_and_may_not_say_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    packed = tmp_path / "train-images-idx3-ubyte.gz"
    idx(packed, torch.zeros(2, 28, 28, dtype=torch.uint8))
    packed.write_bytes(gzip.compress(gzip.decompress(packed.read_bytes()) + bytes(1000)))
    asked, read = [], gzip.GzipFile.read

    def noting(file: gzip.GzipFile, size: int = -1) -> bytes:
        asked.append(size)
        return read(file, size)

    monkeypatch.setattr(gzip.GzipFile, "read", noting)
    with pytest.raises(ValueError, match="not an idx file"):
        read_idx(packed)
    assert asked == [4, 12, 2 * 28 * 28 + 1]
    monkeypatch.setattr("fewstep.data.images._MOST_IDX", 1567)
    with pytest.raises(ValueError, match="says that it holds 1,568 bytes"):
        read_idx(packed)


def test_idx_files_that_do_not_belong_together_or_are_damaged_are_refused(tmp_path: Path):
    idx(tmp_path / "train-images-idx3-ubyte.gz", torch.randint(0, 255, (2, 28, 28)).to(torch.uint8))
    idx(tmp_path / "train-labels-idx1-ubyte.gz", torch.tensor([3], dtype=torch.uint8))
    with pytest.raises(UserError, match=r"do not belong together: \[2, 28, 28\], \[1\]"):
        read_images(str(tmp_path))
    data = bytearray((tmp_path / "train-images-idx3-ubyte.gz").read_bytes())
    data[60:90] = b"\xff" * 30
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(data)
    with pytest.raises(UserError, match="cannot be read"):
        read_images(str(tmp_path))


def test_a_folder_without_images_or_no_folder_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="holds no images"):
        read_images(str(tmp_path))
    with pytest.raises(UserError, match="is not a folder"):
        read_images(str(tmp_path / "nowhere"))


def test_images_cover_the_wanted_size_and_are_cropped_at_the_centre(tmp_path: Path):
    wide = Image.new("RGB", (24, 8), (0, 0, 0))
    wide.paste((255, 255, 255), (8, 0, 16, 8))
    wide.save(tmp_path / "wide.png")
    image = RealImages([tmp_path / "wide.png"], None).image(0, 3, 8, 8)
    assert image.shape == (3, 8, 8)
    assert image.min() == 255  # the white middle third


def test_images_are_seen_as_they_are_meant_to_be(tmp_path: Path):
    """A phone's portrait lies on its side in the file, 16 bits are no clipped 8, and what is transparent is white."""
    standing = Image.new("L", (8, 8))
    standing.paste(255, (0, 0, 8, 4))
    turned = Image.Exif()
    turned[0x0112] = 6  # turn it a quarter to the right
    standing.rotate(90).save(tmp_path / "turned.png", exif=turned)
    Image.fromarray(np.full((8, 8), 65535 // 4, np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    images = RealImages([tmp_path / f"{name}.png" for name in ("turned", "deep", "clear")], None)
    assert torch.equal(
        images.image(0, 1, 8, 8), torch.tensor([255] * 4 + [0] * 4, dtype=torch.uint8).reshape(1, 8, 1).expand(1, 8, 8)
    )
    assert float(images.image(1, 1, 8, 8).float().mean()) == pytest.approx(255 / 4, abs=1)
    assert bool((images.image(2, 3, 8, 8) == 255).all())


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"broken\.png is not an image"):
        RealImages([tmp_path / "broken.png"], None).image(0, 3, 8, 8)


# --- batches, with a real text-to-image pipeline ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def recording() -> Recording:
    return record(tiny_pipelines.tiny_stable_diffusion())


PROMPTS = ["a cat", "a dog", "a tree"]


def test_conditions_come_in_a_keyed_order_that_covers_all_items(recording: Recording):
    conditions = Conditions(recording, prompts=PROMPTS)
    assert len(conditions) == 3
    whole = conditions.batch(0, range(6)).arguments()["encoder_hidden_states"]
    parts = [conditions.batch(0, [place]).arguments()["encoder_hidden_states"] for place in range(6)]
    assert torch.equal(whole, torch.cat(parts))
    items = conditions.select([0, 1, 2]).arguments()["encoder_hidden_states"]
    for epoch in (whole[:3], whole[3:]):
        found = [int((items == row).flatten(1).all(1).nonzero()) for row in epoch]
        assert sorted(found) == [0, 1, 2]


@pytest.mark.parametrize("given", [{}, {"labels": [0, 1]}])
def test_conditions_of_the_wrong_kind_are_refused(recording: Recording, given: dict):
    with pytest.raises(UserError, match="takes --prompts FILE"):
        Conditions(recording, **given)


@pytest.mark.parametrize("label", [-1, 1000, 5000])
def test_labels_that_the_network_does_not_know_are_refused(label: int):
    """Label 1000 is the null label of guidance behind a thousand classes."""
    recording = record(tiny_pipelines.tiny_dit())
    assert len(Conditions(recording, labels=[0, 999])) == 2
    with pytest.raises(UserError, match=rf"0\.\.999, and {label} is not"):
        Conditions(recording, labels=[0, label])


def test_so_many_are_kept_as_their_bytes_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of items are of several sizes, and of whatever dtype the encoder gives."""
    monkeypatch.setattr(real, "_CACHE_LIMIT", 100)
    read: list[int] = []

    def pixels(row: int) -> torch.Tensor:
        read.append(row)
        return torch.full((1, 2, 2), row, dtype=torch.uint8)

    def encode(row: int, shown: torch.Tensor) -> torch.Tensor:
        return shown.repeat(1, 1, 1 + row, 1).double()  # 32 bytes, 64 bytes, 96 bytes

    known = real.Encoded(3, pixels, encode)
    for row in (0, 1, 2, 0, 1, 2):
        assert torch.equal(known.x0([row]), encode(row, torch.full((1, 1, 2, 2), row / 255)))
    assert read == [0, 1, 2, 2], "the third has no room beside the first two"


def test_real_samples_are_encoded_images_with_the_conditions_of_their_captions(recording: Recording, tmp_path: Path):
    for k, name in enumerate(("bag", "shoe")):
        picture(tmp_path / name / "0.png", 40 + 150 * k, size=(30, 20))
    conditions = Conditions(recording, prompts=PROMPTS)
    real = captioned(read_images(str(tmp_path)), recording, conditions)
    batch = real.batch(0, range(4))
    assert batch.x0.shape == (4, *recording.sample_shape)
    expected = recording.condition(prompts=["bag", "shoe"]).arguments()["encoder_hidden_states"]
    brightness = batch.x0.flatten(1).mean(1)
    bags = batch.conditioning.arguments()["encoder_hidden_states"].flatten(1) == expected[0].flatten()
    bags = bags.all(1)
    assert bags.sum() == 2
    # Each caption goes with its own image, whichever of the two comes first.
    assert brightness[bags].unique().numel() == brightness[~bags].unique().numel() == 1
    assert brightness[bags][0] != brightness[~bags][0]
    assert torch.equal(real.batch(0, [2]).x0, batch.x0[2:3])


def test_labels_that_count_the_prompts_mean_those_prompts(recording: Recording):
    images = RealImages(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), [2, 0, 1])
    conditions = Conditions(recording, prompts=PROMPTS)
    batch = captioned(images, recording, conditions).batch(0, range(3))
    texts = batch.conditioning.arguments()["encoder_hidden_states"]
    items = conditions.select([0, 1, 2]).arguments()["encoder_hidden_states"]
    assert sorted(int((items == row).flatten(1).all(1).nonzero()) for row in texts) == [0, 1, 2]


def test_images_without_captions_are_refused_where_the_teacher_needs_them(recording: Recording):
    images = RealImages(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), None)
    with pytest.raises(UserError, match="without captions"):
        captioned(images, recording, Conditions(recording, prompts=PROMPTS))
