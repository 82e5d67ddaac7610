"""Images that are encoded once: the same batches as from the images, bound to their teacher, complete or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import image_sets
import pytest
import torch
from diffusers import DiffusionPipeline
from image_sets import CAPTIONS, FORMS, jpeg
from PIL import Image
from tiny_pipelines import tiny_ddim, tiny_dit, tiny_stable_diffusion

from fewstep.cli import main
from fewstep.data.captioned import captioned
from fewstep.data.conditions import Conditions
from fewstep.data.contents import changed_folders
from fewstep.data.images import read_images
from fewstep.data.latents import LatentMaker, Latents, data_contents, read_data
from fewstep.data.shards import Shards
from fewstep.errors import UserError
from fewstep.programs.cache import cache
from fewstep.recording import Recording, record


@pytest.fixture(scope="module")
def recording() -> Recording:
    return record(tiny_stable_diffusion())


@pytest.fixture(scope="module")
def conditions(recording: Recording) -> Conditions:
    return Conditions(recording, prompts=list(dict.fromkeys(CAPTIONS)))


def encoded(recording: Recording, source: Path, out: Path, resume: bool = False, **how: Any) -> LatentMaker:
    """A folder with two images in a file, made by one process."""
    settings = {"shard_size": 2, "dtype": "float32", **how}
    maker = LatentMaker(out, recording, read_images(str(source)), str(source), **settings, resume=resume)
    maker.run(workers=2)
    return maker


@pytest.mark.parametrize("form", ["tar", "parquet", "metadata.jsonl", "texts beside"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_bit_equal_to_those_of_the_images(
    tmp_path: Path, recording: Recording, conditions: Conditions, form: str, workers: int
):
    source = FORMS[form](tmp_path / "data")
    encoded(recording, source, tmp_path / "latents")
    images = captioned(read_images(str(source)), recording, conditions)
    latents = captioned(read_data(str(tmp_path / "latents")), recording, conditions, workers=workers)
    assert latents.note == "--data: 7 images, encoded already"
    for first in range(0, 12, 3):
        expected, found = (one.batch(0, range(first, first + 3)) for one in (images, latents))
        texts = [one.conditioning.arguments()["encoder_hidden_states"] for one in (expected, found)]
        assert torch.equal(expected.x0, found.x0) and torch.equal(*texts)
        latents.announce(0, range(first + 3, first + 6))


def test_labels_and_class_folders_are_kept(tmp_path: Path):
    dit = record(tiny_dit())
    labels = Conditions(dit, labels=range(4))
    for name in ("bag", "empty", "shoe"):
        (tmp_path / "named" / name).mkdir(parents=True)
        if name != "empty":
            Image.new("RGB", (9, 9), (len(name), 1, 1)).save(tmp_path / "named" / name / "0.png")
    image_sets.tars(tmp_path / "tars")
    for source, rows in (("named", [0, 2]), ("tars", [k % 3 for k in range(7)])):
        encoded(dit, tmp_path / source, tmp_path / f"{source} latents")
        latents = read_data(str(tmp_path / f"{source} latents"))
        assert captioned(latents, dit, labels).rows_among(labels) == rows


def test_a_pipeline_of_pixels_has_latents_too(tmp_path: Path):
    ddim = record(tiny_ddim())
    source = image_sets.tars(tmp_path / "data")
    encoded(ddim, source, tmp_path / "latents", dtype="float16")
    conditions = Conditions(ddim)
    expected, found = (
        captioned(data, ddim, conditions).batch(0, range(5)).x0
        for data in (read_images(str(source)), read_data(str(tmp_path / "latents")))
    )
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_several_processes_make_what_one_makes_and_a_killed_one_is_gone_on_with(tmp_path: Path, recording: Recording):
    source = image_sets.tars(tmp_path / "data")
    alone = encoded(recording, source, tmp_path / "alone").shards
    for rank in (1, 0):
        how = {"shard_size": 2, "dtype": "float32", "resume": True}
        maker = LatentMaker(tmp_path / "shared", recording, read_images(str(source)), str(source), **how)
        if rank == 1:
            maker.run(1, 2)
            with pytest.raises(UserError, match="is not complete; go on with it by fewstep cache --data"):
                read_data(str(tmp_path / "shared"))
        else:
            maker.run(0, 2)
    names = [alone.path(number).name for number in alone.numbers]
    assert len(names) == 4
    for name in names:
        assert (tmp_path / "shared" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    # What is whole is not made again; what is damaged is.
    damaged, kept = (alone.path(number) for number in (1, 2))
    content, before = damaged.read_bytes(), kept.stat().st_mtime_ns
    damaged.write_bytes(content[:-4] + b"\0\0\0\0")
    encoded(recording, source, tmp_path / "alone", resume=True)
    assert damaged.read_bytes() == content and kept.stat().st_mtime_ns == before


def test_another_teacher_or_another_size_is_refused(tmp_path: Path, recording: Recording, conditions: Conditions):
    encoded(recording, image_sets.tars(tmp_path / "data"), tmp_path / "latents")
    latents = read_data(str(tmp_path / "latents"))
    other = tiny_stable_diffusion()
    with torch.no_grad():
        next(iter(other.vae.parameters())).view(-1)[0].add_(1)
    with pytest.raises(UserError, match=r"are of another teacher: its encoder differs; make others by fewstep cache"):
        captioned(latents, record(other), conditions)
    with pytest.raises(UserError, match=r"another teacher: its map, shape, size differ"):
        captioned(latents, record(tiny_stable_diffusion(), height=32, width=32), conditions)


def test_other_images_are_not_gone_on_with(tmp_path: Path, recording: Recording):
    source = image_sets.tars(tmp_path / "data")
    encoded(recording, source, tmp_path / "latents")
    image_sets.two_samples(source / "shard-00001.tar", a_cls="0", b_cls="1")
    with pytest.raises(UserError, match="was begun with another images, num"):
        encoded(recording, source, tmp_path / "latents", resume=True)


def test_images_that_cannot_be_read_are_named_when_all_others_are_done(tmp_path: Path, recording: Recording):
    source = image_sets.folder_of_pairs(tmp_path / "data")
    for k in (2, 5):
        (source / f"{k:04}.jpg").write_bytes(jpeg(k)[:100])
    with pytest.raises(UserError, match=r"2 images cannot be encoded: .*0002\.jpg .*0005\.jpg is not an image"):
        encoded(recording, source, tmp_path / "latents")
    assert sorted(path.name for path in (tmp_path / "latents").glob("shard_*")) == [
        "shard_000000.safetensors",
        "shard_000003.safetensors",
    ]


def test_latents_are_known_by_their_contents(tmp_path: Path, recording: Recording):
    source = image_sets.tars(tmp_path / "data")
    shards = encoded(recording, source, tmp_path / "latents").shards
    known = data_contents(Latents(tmp_path / "latents"), str(tmp_path / "latents"))
    whole = shards.column(1, "x0")
    texts = {name: shards.column(1, name) for name in ("texts", "texts_ends", "captions")}
    Shards(shards.folder, shards.about, shards.maker).write(1, {"x0": whole + 1, **texts})
    now = data_contents(Latents(tmp_path / "latents"), str(tmp_path / "latents"))
    assert changed_folders(known, now) != []


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.soak
def test_the_command_encodes_and_a_run_trains_on_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tiny_stable_diffusion().save_pretrained(tmp_path / "teacher")
    source, out = image_sets.tars(tmp_path / "data"), tmp_path / "latents"
    words = ["cache", "--teacher", str(tmp_path / "teacher"), "--data", str(source), "--out", str(out), "--cpu"]
    assert main([*words, "--shard_size", "4"]) == 0
    assert f"--data {out} reads it" in capsys.readouterr().out
    assert main([*words, "--shard_size", "4"]) == 2
    assert "add --resume to go on with it" in capsys.readouterr().err
    assert main([*words, "--shard_size", "4", "--resume"]) == 0
    run = ["distill", "consistency", "--variant", "ect", "--teacher", str(tmp_path / "teacher"), "--data", str(out)]
    run += ["--prompts", str(source), "--out", str(tmp_path / "run"), "--max_steps", "1", "--batch_size", "2", "--cpu"]
    run += ["--lora_rank", "2", "--steps", "1", "--sample_steps", "0", "--report_to", "none"]
    assert main(run) == 0
    inputs = json.loads((tmp_path / "run" / "inputs.json").read_text())["inputs"]
    assert inputs["data"][""]["files"] == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompts": ["a"], "data": "x"}, "give one of --prompts, --classes, --items and --data"),
        ({"data": "x", "dtype": "int8"}, "--dtype must be one of float32, float16, bfloat16"),
        ({"data": "nowhere"}, "is not a folder, and no shards"),
        ({"data": "nowhere", "data_workers": -1}, "--data_workers must not be negative"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, given: dict[str, Any], message: str):
    pipeline: DiffusionPipeline = tiny_ddim()
    with pytest.raises(UserError, match=message):
        cache(pipeline, tmp_path / "out", cpu=True, **given)
