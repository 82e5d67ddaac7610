"""The wanted results of items: read with their rows, brought into the network's space, each for its own item."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from item_sets import picture, tiny_editor, write_items

from fewstep.cli import main
from fewstep.conditioning.item import Item
from fewstep.data.conditions import Conditions
from fewstep.data.image_opening import fitted
from fewstep.data.items import Items, read_items, values_of
from fewstep.data.pairs import PairMaker, PairSettings
from fewstep.data.targets import real_samples, target_samples
from fewstep.errors import UserError
from fewstep.programs import workbench
from fewstep.programs.pairs import make_pairs
from fewstep.recording import Recording, record
from fewstep.recording.sizes import with_sizes
from fewstep.trainers._rectified_flow_config import RectifiedFlowConfig

SIZES = ((16, 16), (24, 16))


def with_targets(folder: Path, count: int = 4, sizes: tuple[tuple[int, int], ...] = SIZES) -> Path:
    """Items whose results have a size of their own."""
    path = write_items(folder, count, sizes)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for number, row in enumerate(rows):
        picture(100 + number, (40, 32)).save(folder / f"{number}_after.png")
        row["target"] = f"{number}_after.png"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Items:
    return read_items(with_targets(tmp_path_factory.mktemp("targets")), type(tiny_editor()))


@pytest.fixture(scope="module")
def recording(items: Items) -> Recording:
    return with_sizes(record(tiny_editor(), items=items.two()), items.each)


@pytest.fixture(scope="module")
def conditions(recording: Recording, items: Items) -> Conditions:
    return Conditions(recording, items=items.each)


def test_a_result_is_no_part_of_its_item_and_is_known_with_the_run(items: Items, tmp_path: Path) -> None:
    plain = read_items(write_items(tmp_path / "plain", 4, SIZES), type(tiny_editor()))
    assert plain.keys == items.keys and len(items.contents) == 8 and plain.contents == plain.keys
    assert "target" not in items.each[0].arguments


def test_each_stands_beside_its_own_item_where_two_have_one_name() -> None:
    given = [Item({"prompt": "a", "image": picture(n), "target": picture(10 + n)}, "a name") for n in range(3)]
    items = read_items(given, type(tiny_editor()))
    own = [item.arguments["target"].tobytes() for item in given]
    assert [target.tobytes() for target in items.targets] == own and len(set(own)) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_each_is_encoded_in_the_size_of_its_own_items_sample(
    recording: Recording, conditions: Conditions, items: Items, workers: int
) -> None:
    real = target_samples(items, recording, conditions, workers=workers)
    for number, (shape, rows) in enumerate(conditions.sizes()):
        part = real.only(conditions, rows, conditions.only(rows))
        batch = part.batch(3, range(4))
        seen = {float(x0.sum()) for x0 in batch.x0}
        wanted = {}
        for row in rows:
            pixels = fitted(picture(100 + row, (40, 32)), 3, *SIZES[number][::-1])
            wanted[row] = recording.at(shape).encode(pixels[None].float() / 255)[0]
        assert batch.x0.shape[1:] == shape and len(seen) == len(rows)
        told = batch.conditioning.arguments()["sample"]
        for x0, own in zip(batch.x0, told, strict=True):
            (row,) = (row for row in rows if torch.equal(x0, wanted[row]))
            assert torch.equal(own, conditions.one(row).arguments()["sample"][0]), "another item's result"


def test_what_cannot_be_a_result_is_refused_by_its_row(
    items: Items, recording: Recording, conditions: Conditions, tmp_path: Path
) -> None:
    path = with_targets(tmp_path / "own", 3)
    rows = [json.loads(line) for line in path.read_text().splitlines()]

    def read(number: int, **changes: object) -> Items:
        changed = [{**row, **(changes if place == number else {})} for place, row in enumerate(rows)]
        path.write_text("".join(json.dumps(row) + "\n" for row in changed))
        return read_items(path, type(tiny_editor()))

    with pytest.raises(UserError, match=r"^row 2 of items\.jsonl has no target, unlike row 1 of items\.jsonl: give"):
        read(1, target=None)
    with pytest.raises(UserError, match=r"^row 3 of items\.jsonl: target: there is no file .*gone\.png"):
        read(2, target="gone.png")
    with pytest.raises(UserError, match=r"^row 2 of items\.jsonl: target: a picture is a path"):
        read(1, target=7)
    clip = Items(items.each, [], "--items x", [*items.targets[:3], [items.targets[0]] * 2])
    with pytest.raises(UserError, match=r"^row 4 of items\.jsonl: target is a clip"):
        target_samples(clip, recording, conditions)
    told = (None, tmp_path, Items(items.each, [], "--items x"), recording, conditions, "cpu")
    with pytest.raises(UserError, match="--data targets is the column target of --items x, and no row has one"):
        real_samples("targets", *told)
    with pytest.raises(UserError, match=r"images without the items.*column target, and --data targets"):
        real_samples(str(path.parent), *told)


def test_of_several_sizes_no_pairs_are_made_and_nothing_is_encoded_or_written(
    items: Items, recording: Recording, conditions: Conditions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = r"^pairs of real samples .* are of one size, and the items' samples are of 2: leave them out, or give items"
    real, settings = target_samples(items, recording, conditions), PairSettings(num=2)
    with pytest.raises(UserError, match=words):
        PairMaker(tmp_path / "pairs", recording, {}, None, conditions, settings, "cpu", real)  # type: ignore[arg-type]
    teacher = SimpleNamespace(recording=recording, refuse_next_time=lambda what: None)
    monkeypatch.setattr(workbench, "open_teacher", lambda *args, **kwargs: teacher)
    config = {"teacher": "t", "out": str(tmp_path / "run"), "items": "items", "data": "targets"}
    with pytest.raises(UserError, match=words):
        workbench.open_workbench(RectifiedFlowConfig(**config), "cpu")
    with pytest.raises(UserError, match=words):
        workbench.open_workbench(RectifiedFlowConfig(**{**config, "data": None, "inverted_pairs": "p"}), "cpu")
    assert not list(tmp_path.iterdir())


def test_pairs_of_their_results_are_a_runs_business(tmp_path: Path) -> None:
    told = {"data": "targets", "num": 2, "cpu": True, "out": str(tmp_path / "pairs")}
    path = with_targets(tmp_path / "items", 2, SIZES[:1])
    with pytest.raises(UserError, match=r"--data of fewstep pairs is of prompts .*: leave it out; fewstep distill"):
        make_pairs(tiny_editor(), items=str(path), **told)
    assert not (tmp_path / "pairs").exists()


def test_a_real_clip_begins_with_the_picture_that_its_item_is_told(tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    for number in range(3):
        picture(number).save(tmp_path / "clip" / f"{number}.png")
    picture(9).save(tmp_path / "own.png")
    rows = [{"prompt": "a", "target": "clip"}, {"prompt": "b", "target": "clip", "image": "own.png"}]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, own = read_items(tmp_path, WanImageToVideoPipeline).each
    assert values_of(first)["image"].source.name == "0.png" and values_of(own)["image"].source.name == "own.png"


@pytest.mark.soak
@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("dmd2", ["--critic_updates", "1", "--gan_weight", "0.01"]),
        ("consistency", ["--solver", "none"]),
        ("rectified_flow", ["--pair_steps", "2"]),
    ],
)
def test_methods_learn_from_the_results(
    method: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_editor().save_pretrained(tmp_path / "teacher")
    path = with_targets(tmp_path / "items", 4, SIZES[:1] if method == "rectified_flow" else SIZES)
    short = ["--max_steps", "2", "--steps", "2", "--batch_size", "2", "--cpu", "--report_to", "none"]
    words = ["--teacher", str(tmp_path / "teacher"), "--items", str(path), "--data", "targets", "--sample_steps", "0"]
    assert main(["distill", method, *words, *short, *flags, "--out", str(tmp_path / "run")]) == 0
    picture(7, (40, 32)).save(path.parent / "1_after.png")
    again = ["distill", method, *words, *short, *flags, "--out", str(tmp_path / "run"), "--resume"]
    assert main(again) == 2
    assert "--resume: --items" in capsys.readouterr().err, "another result is another run"
