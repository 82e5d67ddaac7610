"""A few samples as one picture."""

import pytest
from PIL import Image
from toy_models import tiny_dit

from fewstep.errors import UserError
from fewstep.eval import sample


def test_sample_writes_a_picture(student, tmp_path):
    path = sample(student, label=3, out=tmp_path / "new" / "one.png", seed=4)
    with Image.open(path) as one:
        assert one.size == (16, 16) and one.mode == "L"
    again = sample(student.parent, label=3, out=tmp_path / "again.png", seed=4)
    assert again.read_bytes() == path.read_bytes()
    with Image.open(sample(student, label=3, steps=1, num=5, out=tmp_path / "five.png")) as five:
        assert five.width > 3 * 16 and five.height > 2 * 16


def test_sample_takes_the_files_that_are_told(tmp_path):
    """Of a repository of several; an embedded one has one set."""
    tiny_dit().save_pretrained(tmp_path / "both" / "inner", variant="fp16", safe_serialization=True)
    told = {"label": 3, "steps": 2, "subfolder": "inner", "variant": "fp16"}
    assert sample(tmp_path / "both", **told, out=tmp_path / "one.png").is_file()
    with pytest.raises(UserError, match="bf16"):
        sample(tmp_path / "both", **{**told, "variant": "bf16"}, out=tmp_path / "two.png")
    with pytest.raises(UserError, match="fashion-flow is embedded, and has one set of files; leave out variant"):
        sample("fashion-flow", label=3, variant="fp16", out=tmp_path / "three.png")


def test_sample_refuses_other_files_of_a_student(student, tmp_path):
    with pytest.raises(UserError, match="is a student, which has one set of files; leave out variant"):
        sample(student, label=3, variant="fp16", out=tmp_path / "one.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": 1, "out": "x.jpg"}, "must end in .png"),
        ({"out": "x.png"}, "needs a class"),
        ({"label": 1, "steps": 2, "out": "x.png"}, "does not hold"),
        ({"label": 1, "steps": 9, "out": "x.png"}, "trained for 4"),
    ],
)
def test_sample_names_mistakes(student, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        sample(student, **{**options, "out": tmp_path / "new" / options["out"]})
    assert not (tmp_path / "new").exists()
