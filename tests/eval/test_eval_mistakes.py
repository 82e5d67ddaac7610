"""One clear line for every mistake in an evaluation, before anything is written."""

import json

import pytest
from toy_models import tiny_ddim

from fewstep.errors import UserError
from fewstep.eval import evaluate

MISTAKES = {
    "no such folder": (lambda student: ["/nowhere/at/all"], {}, "there is no folder"),
    "no pipeline": (lambda student: [student / "scheduler"], {}, "no model_index.json"),
    "no card": (lambda student: [student], {}, "it has no fewstep.json"),
    "no such teacher": (lambda student: [], {"teacher": "/nowhere/at/all"}, "does not exist"),
    "no student": (lambda student: [tiny_ddim()], {}, "a DDIMPipeline is no student"),
    "nothing": (lambda student: [], {}, "nothing to evaluate"),
    "zero steps": (lambda student: [student], {"steps": (0,)}, "step count must be at least 1"),
    "no samples": (lambda student: [student], {"num": 0}, "num must be at least 1"),
    "unknown metric": (lambda student: [student], {"metrics": ("fidd",)}, "the unknown fidd"),
    "unknown reference": (lambda student: [student], {"reference": "/nowhere/at/all"}, "does not exist: give auto"),
    "no teacher to compare with": (lambda student: [student], {"reference": "teacher"}, "needs the teacher"),
    "both": (lambda student: [student], {"prompts": ("a",), "classes": (1,)}, "by prompts, by classes, by items or"),
    "unknown mode": (lambda student: [student], {"fid_mode": "dirty"}, "fid_mode must be one of clean"),
    "unknown option": (lambda student: [student], {"stepz": (1,)}, "unknown option stepz"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_line(mistake, student, tmp_path):
    students, options, message = MISTAKES[mistake]
    if mistake == "no card":
        (student / "fewstep.json").unlink()
    with pytest.raises(UserError, match=message) as error:
        evaluate(students(student), out=tmp_path / "eval", **options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "eval").exists()


@pytest.mark.parametrize(("card", "message"), [("{", "is damaged"), ('{"call": {}}', "how many steps")])
def test_a_broken_card_is_named(student, tmp_path, card, message):
    (student / "fewstep.json").write_text(card)
    with pytest.raises(UserError, match=message):
        evaluate([student], out=tmp_path / "eval")


def test_missing_conditions_and_unwritable_folders_are_named(student, tmp_path):
    card = json.loads((student / "fewstep.json").read_text())
    (student / "fewstep.json").write_text(json.dumps({**card, "training": {}}))
    with pytest.raises(UserError, match="takes class labels, and none were given"):
        evaluate([student], out=tmp_path / "eval")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write into"):
        evaluate([student], out=tmp_path / "file", classes=(1,))
    with pytest.raises(UserError, match="nothing could be evaluated: student is not run at 8 steps"):
        evaluate([student], out=tmp_path / "eval", classes=(1,), steps=(8,))
