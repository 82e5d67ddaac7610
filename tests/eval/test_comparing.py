"""What samples are compared with: the teacher's own samples, a folder of images, or statistics, each with its floor."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toy_models import ToyExtractor, tiny_ddim, tiny_dit

from fewstep.errors import UserError
from fewstep.eval import Model, Report, evaluate
from fewstep.eval.conditions import SampleConditions
from fewstep.eval.features import Features
from fewstep.eval.generate import generate
from fewstep.eval.metrics.frechet import feature_statistics, frechet_distance
from fewstep.eval.sources import reference_seed
from fewstep.eval.stats_files import FeatureStatistics, write_stats

NUM = 70
LABELS = SampleConditions("label", (0, 1, 2, 3), (0, 1, 2, 3))


class Toy(ToyExtractor):
    """Any size; it does not classify."""

    def accepts(self, shape: tuple[int, ...]) -> bool:
        return True

    def __call__(self, images: torch.Tensor) -> Features:
        return Features(super().__call__(images).features, None)


def run(saved_dit: Path, out: Path, metrics: tuple[str, ...] = ("fid", "fd_dino", "kid"), **more: object) -> Report:
    options = {"classes": (0, 1, 2, 3), "num": NUM, "batch_size": 35, "teacher_steps": (1, 2), "out": out, **more}
    toys = {"inception": Toy(), "dino": Toy()}
    return evaluate([], teacher=str(saved_dit), extractors=toys, metrics=metrics, **options)


def features(steps: int, seed: int) -> torch.Tensor:
    pipeline = tiny_dit()
    made = generate(pipeline, {"num_inference_steps": steps}, LABELS, range(NUM), seed=seed, batch_size=NUM)
    return Toy()(torch.cat([batch.images for batch in made])).features


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "dit"
    tiny_dit().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 16, 16), dtype=np.uint8)
    for number, one in enumerate(pixels):
        Image.fromarray(one).save(folder / f"{number:02d}.png")
    return folder


def test_the_teachers_own_samples_have_other_seeds_and_its_own_row_is_the_floor(teacher: Path, tmp_path: Path) -> None:
    report = run(teacher, tmp_path, teacher_call={"num_inference_steps": 2})
    mine, others = features(1, 0), features(2, reference_seed(0))
    expected = frechet_distance(*feature_statistics(mine), *feature_statistics(others))
    assert report.rows[0]["metrics"]["fid"] == pytest.approx(expected, rel=1e-5)
    own = report.rows[1]["metrics"]
    for name in ("fid", "fd_dino", "kid"):
        measure = report.measures[name]
        assert measure.floor == own[name] and measure.n_ref == NUM
        assert measure.floor_of == "the teacher, 2 steps against itself with other seeds"
    # The floor is of the order of what sampling alone makes, and is not zero: no sample is compared with itself.
    assert 0 < own["fid"] < report.rows[0]["metrics"]["fid"]
    again = frechet_distance(*feature_statistics(features(2, 0)), *feature_statistics(others))
    assert own["fid"] == pytest.approx(again, rel=1e-5)


def test_the_row_that_is_the_floor_is_there_whatever_steps_are_asked_for(teacher: Path, tmp_path: Path) -> None:
    report = run(teacher, tmp_path, teacher_steps=(1,), teacher_call={"num_inference_steps": 2})
    assert [row["steps"] for row in report.rows] == [1, 2] and report.measures["fid"].floor is not None


def test_a_folder_of_images_has_its_own_halves_as_the_floor(teacher: Path, images: Path, tmp_path: Path) -> None:
    report = run(teacher, tmp_path, reference=str(images))
    pixels = [torch.from_numpy(np.array(Image.open(path)))[None] for path in sorted(images.iterdir())]
    seen = Toy()(torch.stack(pixels)).features
    expected = frechet_distance(*feature_statistics(features(1, 0)), *feature_statistics(seen))
    assert report.rows[0]["metrics"]["fid"] == pytest.approx(expected, rel=1e-5)
    halves = frechet_distance(*feature_statistics(seen[::2]), *feature_statistics(seen[1::2]))
    measure = report.measures["fid"]
    assert measure.floor == pytest.approx(halves, rel=1e-6) and "half" in measure.floor_of and measure.n_ref == 40
    # What it was seen as is kept, and serves in its place.
    again = run(teacher, tmp_path / "again", reference=str(tmp_path / "stats" / "inception.npz"), metrics=("fid",))
    assert again.rows[0]["metrics"]["fid"] == pytest.approx(report.rows[0]["metrics"]["fid"], rel=1e-9)
    assert again.measures["fid"].n_ref == 40
    # Another folder that is called and counts the same is told from it.
    (images / "00.png").write_bytes((images / "01.png").read_bytes())
    other = run(teacher, tmp_path / "other", reference=str(images))
    assert other.measures["fid"].reference == measure.reference and other.reference != report.reference


def test_statistics_are_those_of_their_extractor(teacher: Path, images: Path, tmp_path: Path) -> None:
    toy = Toy()
    mean, covariance = feature_statistics(features(2, 5))
    write_stats(tmp_path / "ours.npz", FeatureStatistics(mean, covariance, NUM, toy.name, toy.sha256, toy.resize))
    np.savez(tmp_path / "edm.npz", mu=mean.numpy(), sigma=covariance.numpy())
    expected = frechet_distance(*feature_statistics(features(1, 0)), mean, covariance)
    for name in ("ours", "edm"):
        report = run(teacher, tmp_path / name, reference=str(tmp_path / f"{name}.npz"), metrics=("fid", "kid"))
        assert report.rows[0]["metrics"] == {"fid": pytest.approx(expected, rel=1e-5)}
        measure = report.measures["fid"]
        assert measure.floor is None and measure.floor_of
        assert any("kid is skipped" in said and "statistics alone" in said for said in report.skipped)


def test_statistics_that_nobody_here_made_are_refused(teacher: Path, tmp_path: Path) -> None:
    write_stats(tmp_path / "a.npz", FeatureStatistics(torch.zeros(6), torch.eye(6), 9, "another", "b" * 64, "none"))
    with pytest.raises(UserError, match=r"the statistics of .*a\.npz are of another, which judges nothing here"):
        run(teacher, tmp_path / "out", reference=str(tmp_path / "a.npz"))
    np.savez(tmp_path / "wide.npz", mu=np.zeros(7), sigma=np.eye(7))
    with pytest.raises(UserError, match="are of 7 features, and toy has 6"):
        run(teacher, tmp_path / "out", reference=str(tmp_path / "wide.npz"))
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(UserError, match="neither a folder of images nor a file of statistics"):
        run(teacher, tmp_path / "out", reference=str(tmp_path / "file.txt"))


def test_images_of_another_size_are_refused_unless_they_are_cropped(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    for number in range(4):
        Image.new("RGB", (24, 20), (number * 50, 0, 9)).save(tmp_path / "large" / f"{number}.png")
    with pytest.raises(UserError, match="has 24x20 pixels, and the samples 16x16: add --reference_crop"):
        run(teacher, tmp_path / "out", reference=str(tmp_path / "large"))
    report = run(teacher, tmp_path / "out", reference=str(tmp_path / "large"), reference_crop=True)
    assert report.measures["fid"].n_ref == 4


def test_too_few_samples_are_said(teacher: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1 samples of the teacher.* cannot be compared with: .*N >= 2"):
        run(teacher, tmp_path / "teacher", num=1)
    report = run(teacher, tmp_path / "images", num=1, metrics=("fid", "saturation"), reference=str(images))
    assert set(report.rows[0]["metrics"]) == {"saturation", "contrast"}
    assert "fid is skipped: a Fréchet distance needs at least 2 samples." in report.skipped


def test_without_a_reference_what_needs_none_is_measured(tmp_path: Path) -> None:
    model = Model("mine", "student", pipeline=tiny_ddim())
    report = evaluate(
        [model], extractors={"dino": Toy()}, metrics=("fd_dino", "diversity"), steps=(1,), num=8, out=tmp_path
    )
    assert set(report.rows[0]["metrics"]) == {"diversity"}
    assert "fd_dino is skipped: there is nothing to compare with (--reference)." in report.skipped


def test_memorisation_is_the_distance_to_what_was_learnt(teacher: Path, images: Path, tmp_path: Path) -> None:
    report = run(teacher, tmp_path, metrics=("memorisation",), train_data=str(images))
    pixels = [torch.from_numpy(np.array(Image.open(path)))[None] for path in sorted(images.iterdir())]
    distances = torch.cdist(features(1, 0).double(), Toy()(torch.stack(pixels)).features.double()).min(1).values
    assert report.rows[0]["metrics"]["memorisation"] == pytest.approx(distances.median().item(), rel=1e-4)
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["measures"]["memorisation"]["better"] == "near"
