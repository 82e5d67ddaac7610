"""Samples are made once: whatever the size of a batch, the number of processes, and who was killed meanwhile."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from forked import forked, well
from PIL import Image
from toy_models import ToyExtractor, tiny_ddim, tiny_video

from fewstep.errors import UserError
from fewstep.eval.conditions import SampleConditions
from fewstep.eval.features import Extractor
from fewstep.eval.models import Model
from fewstep.eval.samples import Made, SampleSet
from fewstep.eval.sources import ImageSource, ModelSource
from fewstep.eval.viewers import views_of
from fewstep.training.distributed import Processes, join_launch
from tests.faults import Faults, every_fault

NUM = 150  # samples, in three chunks


class Known(Model):
    """A model in memory that something identifies."""

    def fingerprint(self) -> str | None:
        return "known"


def source(num: int = NUM, seed: int = 0, model: type[Model] = Known) -> ModelSource:
    return ModelSource(
        model("mine", "student", {}, pipeline=tiny_ddim()), SampleConditions(), 1, num, seed, tiny_ddim, ("cpu",)
    )


def samples(
    out: Path,
    *,
    batch_size: int = 64,
    processes: Processes | None = None,
    extractors: dict[str, Extractor] | None = None,
    kept: int = NUM,
    of: ModelSource | ImageSource | None = None,
) -> SampleSet:
    made = SampleSet(
        of or source(),
        out,
        views_of({"toy": ToyExtractor()} if extractors is None else extractors, {}),
        kept,
        batch_size,
        processes or Processes(),
    )
    made.complete()
    return made


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    samples(out)
    return out


@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_size_of_a_batch_changes_nothing(whole: Path, tmp_path: Path, batch_size: int) -> None:
    samples(tmp_path, batch_size=batch_size)
    assert files(tmp_path) == files(whole)


def test_two_processes_make_what_one_does(whole: Path, tmp_path: Path) -> None:
    def work(rank: int) -> None:
        launch = join_launch(cpu=True)
        made = samples(tmp_path / "out", processes=Processes(launch.process_index, launch.num_processes))
        column = made.column("toy", "features")
        assert column is not None and len(column) == NUM

    well(2, work, tmp_path / "said")
    assert files(tmp_path / "out") == files(whole)


def test_a_kill_in_the_middle_loses_one_chunk_at_most(whole: Path, tmp_path: Path) -> None:
    def killed(rank: int) -> None:
        made, inner = [], ModelSource.make

        def make(self, indices):
            if made:
                os.kill(os.getpid(), signal.SIGKILL)
            made.append(indices)
            return inner(self, indices)

        ModelSource.make = make
        samples(tmp_path / "out")

    (end,) = forked(1, killed, tmp_path / "said")
    assert end.code == -signal.SIGKILL
    kept = {name: content for name, content in files(tmp_path / "out").items() if "shard_000000" in name}
    assert len(kept) == 2 and kept.items() <= files(whole).items()
    again = source()
    made: list[int] = []
    inner = again.make
    again.make = lambda indices: (made.extend(indices), inner(indices))[1]
    samples(tmp_path / "out", of=again)
    assert made == list(range(64, NUM)) and files(tmp_path / "out") == files(whole)


def test_another_extractor_looks_at_the_pictures_that_are_there(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "out")
    other = ToyExtractor()
    other.sha256 = "beef"
    again = source()
    again.make = lambda indices: pytest.fail("they are there")
    made = samples(tmp_path / "out", extractors={"toy": ToyExtractor(), "other": other}, of=again)
    assert torch.equal(made.column("other", "features"), made.column("toy", "features")) and other.calls == 3


@pytest.mark.parametrize("damage", ["cut", "gone", "other"])
def test_a_picture_that_is_not_what_was_kept_is_made_again(whole: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(whole, tmp_path / "out")
    (picture,) = (tmp_path / "out").rglob("000070.png")
    if damage == "cut":
        picture.write_bytes(picture.read_bytes()[:30])
    elif damage == "gone":
        picture.unlink()
    else:
        Image.new("L", (8, 8)).save(picture)
    samples(tmp_path / "out")
    assert files(tmp_path / "out") == files(whole)


def test_a_shard_that_is_damaged_is_made_again(whole: Path, tmp_path: Path) -> None:
    for shard in sorted((whole / "features").rglob("shard_*")) + sorted((whole / "samples").rglob("shard_*")):
        shutil.copytree(whole, tmp_path / "out")
        place = tmp_path / "out" / shard.relative_to(whole)
        place.write_bytes(shard.read_bytes()[:-9])
        samples(tmp_path / "out")
        assert files(tmp_path / "out") == files(whole)
        shutil.rmtree(tmp_path / "out")


def test_the_manifest_says_where_every_picture_came_from(whole: Path) -> None:
    (manifest,) = whole.rglob("manifest.jsonl")
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(NUM)) and {line["seed"] for line in lines} == {0}
    assert all((manifest.parent / line["file"]).is_file() and len(line["sha256"]) == 64 for line in lines)


def test_pictures_come_back_as_they_were(tmp_path: Path) -> None:
    video = ModelSource(
        Known("mine", "student", {}, pipeline=tiny_video()),
        SampleConditions("prompt", ("a", "b")),
        1,
        3,
        0,
        tiny_video,
        ("cpu",),
    )
    made = samples(tmp_path, of=video)
    assert made.shape == (5, 1, 8, 8)
    assert torch.equal(made.pictures(3), torch.cat([one.images for one in video.make([0, 1, 2])]))
    features = made.column("toy", "features")
    assert features is not None and features.shape == (3, 5, 6)


def test_only_the_shown_pictures_are_kept_where_that_is_asked(whole: Path, tmp_path: Path) -> None:
    made = samples(tmp_path, kept=4)
    assert len(list(tmp_path.rglob("*.png"))) == 4 and made.pictures(10).shape == (4, 1, 8, 8)
    theirs = {name: content for name, content in files(whole).items() if name.startswith("features")}
    assert theirs.items() <= files(tmp_path).items()


def test_what_one_process_cannot_make_every_process_hears(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        launch = join_launch(cpu=True)
        broken = source()
        broken.make = lambda indices: (_ for _ in ()).throw(UserError(f"no room for sample {indices[0]}"))
        with pytest.raises(UserError, match="no room for sample"):
            samples(tmp_path / "out", of=broken, processes=Processes(launch.process_index, launch.num_processes))

    well(2, work, tmp_path / "said")


def test_images_of_another_size_are_refused_or_cropped(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for number, size in enumerate([(8, 8), (16, 8)]):
        Image.new("RGB", size, (number * 90, 0, 0)).save(tmp_path / "data" / f"{number}.png")
    with pytest.raises(UserError, match=r"1.png of the reference has 16x8 pixels, and the samples 8x8: add --ref"):
        samples(tmp_path / "out", of=ImageSource(str(tmp_path / "data"), (3, 8, 8), False))
    made = samples(tmp_path / "out", of=ImageSource(str(tmp_path / "data"), (3, 8, 8), True))
    assert made.pictures(2).shape == (2, 3, 8, 8) and made.pictures(2)[1, 0].eq(90).all()


def test_a_disk_that_is_full_says_so_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"No space left on device.*make room, and start again"):
        samples(tmp_path)


@pytest.mark.parametrize("kind", ["death", "power", "full"])
def test_faults_at_any_operation_are_made_good(kind: str, tmp_path: Path) -> None:
    class Grey(ModelSource):
        def make(self, indices):
            yield Made(torch.full((len(indices), 1, 8, 8), 7, dtype=torch.uint8), 2.0)

    of = Grey(source().model, SampleConditions(), 1, 2, 0, tiny_ddim, ("cpu",))

    def make(root: Path) -> None:
        samples(root, of=of)

    make(tmp_path)
    whole = files(tmp_path)

    def check(root: Path, fault: Faults) -> None:
        make(root)
        kept = {name: content for name, content in files(root).items() if not name.endswith(".partial")}
        assert kept == whole, fault.happened

    every_fault(kind, make, check, at_least=15)
