"""The package data is there, is what the manifest says, and loads without pickle and without a network."""

import json

import pytest
import torch

from fewstep.errors import UserError
from fewstep.fashion import CLASSES, PROMPTS, TEACHERS, files, load_classifier, reference, teacher_path, training_images
from fewstep.fashion.classifier import extract

MEGABYTES_8 = 8_000_000
SAFE_SUFFIXES = {".json", ".safetensors", ".npz", ".txt"}


def test_every_file_is_in_the_manifest_with_its_hash():
    named = files.manifest()["files"]
    present = {str(path.relative_to(files.DATA)): path for path in files.DATA.rglob("*") if path.is_file()}
    present.pop(files.MANIFEST)
    assert set(present) == set(named)
    for name, path in present.items():
        assert files.sha256(path) == named[name]["sha256"], name
        assert path.stat().st_size == named[name]["bytes"], name


def test_no_file_is_a_pickle():
    assert {path.suffix for path in files.DATA.rglob("*") if path.is_file()} <= SAFE_SUFFIXES


def test_json_files_name_no_folder_of_the_building_machine():
    for path in files.DATA.rglob("*.json"):
        text = path.read_text()
        assert "_name_or_path" not in text, path
        json.loads(text)


def test_manifest_states_licence_floors_and_measured_rows():
    manifest = files.manifest()
    assert "MIT" in manifest["dataset_licence"]
    assert "1708.07747" in manifest["citation"]
    assert set(manifest["floors"]) == {"real", "autoencoder"}
    for name, teacher in TEACHERS.items():
        table = manifest["teachers"][name]
        assert table["guidance_scale"] == teacher.guidance_scale
        assert table["command"].startswith("python -m fewstep.eval.fashion.build table")
        rows = {(row["steps"], row["guidance_scale"]): row for row in table["rows"] if not row["even_grid"]}
        shipped = rows[teacher.steps, teacher.guidance_scale]
        assert shipped["agreement"] > 0.9
        # The metric must be able to tell methods apart: its floor is about half of what the teacher reaches, or less.
        floor = 0.55 if not teacher.looks else 1.0  # a part of each of its samples is a real picture
        assert manifest["floors"]["real"] < manifest["floors"]["autoencoder"] <= floor * shipped["fd"]
        for steps in (1, 2, 4):
            assert rows[steps, teacher.guidance_scale]["fd"] > shipped["fd"]


def test_the_teacher_that_looks_is_as_good_as_it_has_to_be():
    """FD and agreement at its own steps, and it keeps most of what a blind one would lose."""
    table = files.manifest()["teachers"]["fashion-inpaint"]
    (shipped,) = [row for row in table["rows"] if row["steps"] == TEACHERS["fashion-inpaint"].steps]
    assert shipped["fd"] <= 1.2 and shipped["agreement"] >= 0.95
    assert shipped["kept"] - table["kept_floors"]["blind"] > 0.03


@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_is_at_most_8_megabytes(name):
    assert sum(path.stat().st_size for path in teacher_path(name).rglob("*") if path.is_file()) <= MEGABYTES_8


def test_unknown_teacher_names_the_known_ones():
    with pytest.raises(ValueError, match="fashion-sd, fashion-flow, fashion-inpaint"):
        teacher_path("fashion-gan")


def test_ten_classes_and_prompts():
    assert len(CLASSES) == len(PROMPTS) == 10
    assert all(prompt.endswith(name) for name, prompt in zip(CLASSES, PROMPTS))


def test_training_images_are_balanced_padded_and_recognised():
    images, labels = training_images()
    assert images.dtype == torch.uint8 and images.shape == (10_000, 1, 32, 32)
    assert labels.dtype == torch.int64 and labels.bincount().tolist() == [1000] * 10
    assert images[..., :2].max() == 0 and images[..., -2:, :].max() == 0
    chosen = torch.arange(0, 10_000, 10)
    _, logits = extract(load_classifier(), images[chosen])
    assert (logits.argmax(dim=1) == labels[chosen]).double().mean() > 0.9


def test_classifier_gives_64_live_features_and_rejects_other_shapes():
    classifier = load_classifier()
    features, logits = classifier(torch.rand(3, 1, 32, 32))
    assert features.shape == (3, 64) and features.dtype == torch.float32 and logits.shape == (3, 10)
    assert not any(parameter.requires_grad for parameter in classifier.parameters())
    with pytest.raises(ValueError, match=r"\(B, 1, 32, 32\)"):
        classifier(torch.rand(3, 1, 28, 28))


def test_reference_belongs_to_the_classifier():
    stored = reference()
    assert stored.features.shape == (10_000, 64) and stored.features.dtype == torch.float16
    assert stored.labels.dtype == torch.int64 and stored.labels.bincount().tolist() == [1000] * 10
    assert stored.mean.shape == (64,) and stored.mean.dtype == torch.float64
    assert stored.covariance.shape == (64, 64) and stored.covariance.dtype == torch.float64
    assert (stored.features.double().mean(dim=0) - stored.mean).abs().max() < 1e-3
    assert stored.features.max(dim=0).values.min() > 0, "a feature is zero on every test image"
    assert stored.classifier_sha256 == files.sha256(files.DATA / files.CLASSIFIER)


def test_a_changed_file_is_refused(tmp_path, monkeypatch):
    content = (files.DATA / files.CLASSIFIER).read_bytes()
    (tmp_path / files.CLASSIFIER).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (tmp_path / files.MANIFEST).write_text(json.dumps(files.manifest()))
    monkeypatch.setattr(files, "DATA", tmp_path)
    with pytest.raises(UserError, match="not the file"):
        load_classifier()
    (tmp_path / files.CLASSIFIER).unlink()
    with pytest.raises(UserError, match="missing"):
        load_classifier()
