"""The evaluation end to end on a tiny pipeline: schema, resuming, skips, and one clear line for every mistake."""

import importlib
import json
import shutil

import pytest
from PIL import Image
from toy_models import tiny_ddim, tiny_dit, tiny_flow, tiny_video

import fewstep
from fewstep.errors import UserError
from fewstep.eval import Model, Report, evaluate, rows, sample
from fewstep.eval.judge import Judge
from fewstep.eval.models import student_model, teacher_model
from fewstep.export.card.card import write_numbers
from fewstep.fashion import TEACHERS

OPTIONS = {
    "classes": (0, 1, 2, 3),
    "num": 16,
    "batch_size": 8,
    "latency_calls": 2,
    "teacher_steps": (1, 3),
    "columns": 4,
}


@pytest.fixture
def measured(monkeypatch):
    """The rows that were measured rather than read back."""
    done = []
    inner = rows.measure

    def measure(pipeline, model, conditions, steps, *rest):
        done.append((model.role, steps))
        return inner(pipeline, model, conditions, steps, *rest)

    # By its module: the package's attribute of that name is the function.
    monkeypatch.setattr(importlib.import_module("fewstep.eval.evaluate"), "measure", measure)
    return done


def test_report_and_grid(student, saved_dit, judge, tmp_path):
    out = tmp_path / "eval"
    options = {key: value for key, value in OPTIONS.items() if key != "classes"}
    # Classes and the teacher's guidance are those that the student's card names.
    report = evaluate([student], teacher=str(saved_dit), judge=judge, out=out, **options)

    content = json.loads((out / "report.json").read_text())
    assert [(row["model"], row["steps"], row["nfe"]) for row in content["rows"]] == [
        ("teacher", 1, 2),
        ("teacher", 3, 6),
        ("student", 1, 1),
        ("student", 4, 4),
    ]
    for row in content["rows"]:
        assert all(isinstance(value, float) for value in row["metrics"].values())
        assert {"fd_test", "agreement", "precision", "recall", "diversity"} == set(row["metrics"])
        assert row["speed"]["latency_ms"] > 0 and len(row["pictures"]) == 4
        assert all((out / picture).is_file() for picture in row["pictures"])
        assert row["relative"]["fd_test_to_floor"] == pytest.approx(row["metrics"]["fd_test"] / 0.01)
    assert content["measures"]["fd_test"]["floor"] == 0.01
    assert content["conditions"] == {"kind": "label", "shown": ["0", "1", "2", "3"]}
    assert content["rows"][1]["relative"]["fd_test_to_teacher"] == 1
    assert {"extractor", "weights_sha256", "resize", "n_gen", "n_ref", "id", "image_format"} <= set(
        content["reference"]
    )
    assert content["num"] == 16 and content["seed"] == 0 and content["versions"]["torch"]
    assert any("2 steps" in sentence and "fewstep.json" in sentence for sentence in content["skipped"])
    assert Report.load(out / "report.json").to_dict() == report.to_dict() == content

    markdown, text = (out / "report.md").read_text(), report.table()
    for word in ("FD-toy", "x teacher 3", "agreement", "recall", "latency", "floor", "NFE", "16 samples"):
        assert word in markdown and word in text
    with Image.open(out / "grid.png") as grid:
        assert grid.width > 4 * 96 and grid.height > 4 * 96


def test_finished_rows_are_not_measured_again(student, judge, tmp_path, measured):
    options = {**OPTIONS, "judge": judge, "out": tmp_path / "eval"}
    first = evaluate([student], steps=(1,), **options)
    assert measured == [("student", 1)]
    second = evaluate([student], steps=(1, 4), **options)
    assert measured == [("student", 1), ("student", 4)]
    assert second.rows[0]["metrics"] == first.rows[0]["metrics"]
    # Another seed, or other weights, is another row.
    evaluate([student], steps=(1,), **{**options, "seed": 1})
    assert len(measured) == 3
    card = json.loads((student / "fewstep.json").read_text())
    (student / "fewstep.json").write_text(json.dumps({**card, "call": {"guidance_scale": 3.0}}))
    evaluate([student], steps=(1,), **options)
    assert len(measured) == 4
    (student / "README.md").write_text("The card may quote the report without making it stale.")
    evaluate([student], steps=(1,), **options)
    assert len(measured) == 4


def test_a_row_cut_off_is_measured_again(student, judge, tmp_path, measured):
    options = {**OPTIONS, "judge": judge, "out": tmp_path / "eval", "steps": (1,)}
    evaluate([student], **options)
    for path in (tmp_path / "eval" / "rows").glob("*.json"):
        path.rename(path.with_name(path.name + ".part"))
    evaluate([student], **options)
    for path in (tmp_path / "eval" / "rows").glob("*.npz"):
        path.write_bytes(path.read_bytes()[:50])
    evaluate([student], **options)
    assert measured == [("student", 1)] * 3


def test_without_an_extractor_there_is_still_a_report(tmp_path):
    model = Model("student", "student", {"guidance_scale": 2.0}, pipeline=tiny_flow())
    report = evaluate([model], prompts=["a", "bc"], steps=(2,), num=4, latency_calls=1, out=tmp_path)
    (row,) = report.rows
    assert row["metrics"] == {} and {"latency_ms", "latency_p90_ms", "images_per_second"} <= set(row["speed"])
    assert row["nfe"] == 4 and report.reference is None
    assert "There is no number of quality here that training did not optimise." in report.table()
    assert "fd_test is skipped: no embedded extractor knows these images." in report.skipped
    assert (tmp_path / "grid.png").is_file() and "fd_test is skipped" in (tmp_path / "report.md").read_text()


def test_what_nobody_judges_is_not_sampled_by_the_thousand(tmp_path, monkeypatch):
    made = []
    inner = rows.generate

    def generate(pipeline, call, conditions, indices, **rest):
        made.append(len(indices))
        return inner(pipeline, call, conditions, indices, **rest)

    monkeypatch.setattr(rows, "generate", generate)
    model = Model("mine", "student", {}, pipeline=tiny_ddim())
    evaluate([model], out=tmp_path, num=5000, batch_size=3, latency_calls=1, columns=4, steps=(1,))
    assert made == [6]


def test_a_hub_id_identifies_nothing_that_could_be_reused(saved_dit):
    assert Model("mine", "student", {}, source=str(saved_dit)).fingerprint() is not None
    assert Model("mine", "student", {}, source="owner/name").fingerprint() is None


def test_a_card_that_was_edited_keeps_its_head(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    for number in (1.0, 2.0):
        write_numbers(tmp_path, {"student, 1 step": {"NFE": number}}, "Measured so.")
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n") and card.count("## Numbers") == 1 and "2" in card


def test_videos_are_shown_by_their_middle_and_not_judged(judge, tmp_path):
    model = Model("student", "student", pipeline=tiny_video(), kind="prompt")
    report = evaluate([model], prompts=["a"], steps=(1,), num=2, metrics=("fd_test",), judge=judge, out=tmp_path)
    assert report.rows[0]["metrics"] == {} and report.skipped == [
        "fd_test is skipped: the extractor takes another size."
    ]
    assert (tmp_path / "grid.png").is_file()


def test_a_diverged_row_is_left_out_and_said(tmp_path):
    bad, good = tiny_ddim(), Model("good", "student", pipeline=tiny_ddim())
    bad.unet.conv_out.bias.data.fill_(float("nan"))
    report = evaluate([Model("bad", "student", pipeline=bad), good], steps=(1,), num=4, metrics=(), out=tmp_path)
    assert [row["model"] for row in report.rows] == ["good"]
    assert report.skipped == ["bad at 1 step is left out: the images hold NaN or infinity."]


def test_an_embedded_teacher_runs_at_its_stated_guidance(saved_dit, judge, tmp_path, monkeypatch):
    monkeypatch.setattr("fewstep.fashion.DATA", tmp_path)
    shutil.copytree(saved_dit, tmp_path / "fashion-sd")
    stated = TEACHERS["fashion-sd"].guidance_scale
    options = {**OPTIONS, "teacher_steps": (2,), "judge": judge, "out": tmp_path / "eval"}
    # By its name and by its folder it is the same teacher, and the same row.
    for teacher in ("fashion-sd", str(tmp_path / "fashion-sd")):
        (row,) = evaluate([], teacher=teacher, **options).rows
        assert row["model"] == "teacher fashion-sd" and row["call"]["guidance_scale"] == stated and row["nfe"] == 4
    assert len(list((tmp_path / "eval" / "rows").glob("*.json"))) == 1
    (row,) = evaluate([], teacher="fashion-sd", teacher_call={"guidance_scale": 1.0}, **options).rows
    assert row["nfe"] == 2


def test_a_folder_that_is_called_like_an_embedded_teacher_is_none(saved_dit, student, tmp_path):
    mine = tmp_path / "mine" / "fashion-sd"
    shutil.copytree(saved_dit, mine)
    options = {**OPTIONS, "teacher_steps": (1,), "steps": (1,), "metrics": ("fd_test",), "out": tmp_path / "eval"}
    report = evaluate([], teacher=str(mine), **options)
    assert report.rows[0]["model"] == "teacher" and report.reference is None
    assert report.skipped == ["fd_test is skipped: no embedded extractor knows these images."]
    with pytest.raises(UserError, match="does not say how many steps it takes"):
        sample(mine, label=1, out=tmp_path / "a.png")
    # Neither is its student one of the embedded teacher: its run says so, or the card's "./".
    card = json.loads((student / "fewstep.json").read_text())
    (student / "fewstep.json").write_text(json.dumps({**card, "base_model": "fashion-sd"}))
    assert student_model(student).embedded == "fashion-sd"
    (student.parent / "config.yaml").write_text(f"teacher: {mine}")
    report = evaluate([student], teacher=str(mine), **options)
    assert report.reference is None and report.rows[0]["call"]["guidance_scale"] == 2.0
    (student.parent / "config.yaml").unlink()
    (student / "fewstep.json").write_text(json.dumps({**card, "base_model": "./fashion-sd"}))
    assert student_model(student).embedded is None
    assert Model("mine", "teacher", source="owner/fashion-sd", base_model="owner/fashion-sd").embedded is None


def test_a_guidance_that_nobody_stated_is_said(saved_dit, judge, tmp_path):
    report = evaluate([], teacher=str(saved_dit), judge=judge, out=tmp_path, **{**OPTIONS, "teacher_steps": (1,)})
    assert "teacher ran at its pipeline's default guidance_scale, 4.0: its call states none." in report.notes


def test_a_teacher_takes_the_guidance_of_its_own_students_alone(saved_dit, student, tmp_path):
    other = tmp_path / "other" / "dit"
    shutil.copytree(saved_dit, other)
    (student.parent / "config.yaml").write_text(f"teacher: {saved_dit}")
    students = [student_model(student)]
    assert teacher_model(saved_dit, students=students).call == {"guidance_scale": 2.0}
    assert teacher_model(other, students=students).call == {}


def test_several_students_get_distinct_names(student, judge, tmp_path):
    shutil.copytree(student.parent, tmp_path / "teacherless" / "run")
    report = evaluate(
        [student, tmp_path / "teacherless" / "run"], judge=judge, out=tmp_path / "eval", steps=(1,), **OPTIONS
    )
    assert [row["model"] for row in report.rows] == ["student 1 (run)", "student 2 (run)"]


def test_a_loaded_student_is_the_same_as_its_folder(student, judge, tmp_path):
    options = {**OPTIONS, "judge": judge, "steps": (1, 4), "metrics": ("fd_test", "agreement")}
    one = evaluate([student], out=tmp_path / "folder", **options)
    other = evaluate([fewstep.load(student)], out=tmp_path / "object", **options)
    assert [row["metrics"] for row in one.rows] == [row["metrics"] for row in other.rows]
    # Nothing identifies an object, so nothing of it is kept.
    assert not list((tmp_path / "object" / "rows").iterdir())


def test_a_reference_of_another_extractor_is_refused(judge):
    judge.extractor.sha256 = "another"
    with pytest.raises(ValueError, match="was not made with"):
        Judge(judge.extractor, judge.reference)


MISTAKES = {
    "no such folder": (lambda student: ["/nowhere/at/all"], {}, "there is no folder"),
    "no pipeline": (lambda student: [student / "scheduler"], {}, "no model_index.json"),
    "no card": (lambda student: [student], {}, "it has no fewstep.json"),
    "no such teacher": (lambda student: [], {"teacher": "/nowhere/at/all"}, "does not exist"),
    "no student": (lambda student: [tiny_ddim()], {}, "a DDIMPipeline is no student"),
    "nothing": (lambda student: [], {}, "nothing to evaluate"),
    "zero steps": (lambda student: [student], {"steps": (0,)}, "step count must be at least 1"),
    "no samples": (lambda student: [student], {"num": 0}, "num must be at least 1"),
    "unknown metric": (lambda student: [student], {"metrics": ("fid",)}, "unknown metric fid"),
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
        sample(student, **{**options, "out": tmp_path / options["out"]})
