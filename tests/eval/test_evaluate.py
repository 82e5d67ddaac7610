"""The evaluation end to end on a tiny pipeline: schema, resuming, skips, and one clear line for every mistake."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from toy_models import tiny_ddim, tiny_flow, tiny_video

import fewstep
from fewstep.errors import UserError
from fewstep.eval import Model, Report, evaluate, sample
from fewstep.eval.judge import Judge
from fewstep.eval.models import student_model, teacher_model
from fewstep.eval.sources import ModelSource
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
def made(monkeypatch):
    """The rows whose samples were made rather than found, with their number."""
    done = Counter()
    inner = ModelSource.make

    def make(source, indices):
        done[source.model.role, source.steps] += len(indices)
        return inner(source, indices)

    monkeypatch.setattr(ModelSource, "make", make)
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
        assert set(row["metrics"]) == {
            *("fd_test", "agreement", "precision", "recall", "density", "coverage"),
            *("diversity", "saturation", "contrast"),
        }
        assert all(isinstance(value, float) for value in row["metrics"].values())
        assert {"latency_ms", "latency_p90_ms", "images_per_second", "rounds", "batch_size"} <= set(row["speed"])
        assert row["relative"]["fd_test_to_floor"] == pytest.approx(row["metrics"]["fd_test"] / 0.01)
        for picture in row["pictures"]:
            with Image.open(out / picture) as one:
                assert one.size == (16, 16)
        assert len(row["pictures"]) == 4
    assert content["rows"][1]["relative"]["fd_test_to_teacher"] == 1
    assert content["rows"][3]["speed"]["latency_ratio_low"] <= content["rows"][3]["speed"]["latency_ratio"]
    assert content["conditions"] == {"kind": "label", "shown": ["0", "1", "2", "3"]}
    measure = content["measures"]["fd_test"]
    assert measure["floor"] == 0.01 and measure["floor_of"] == "held-back images"
    assert (measure["extractor"], measure["weights_sha256"], measure["n_ref"]) == ("toy", "f00d", 64)
    assert content["num"] == 16 and content["seed"] == 0 and content["versions"]["torch"]
    assert Report.load(out / "report.json").to_dict() == report.to_dict() == content

    markdown, text = (out / "report.md").read_text(), report.table()
    for word in ("FD-toy", "x teacher 3", "agreement", "recall", "latency", "floor", "NFE", "16 samples"):
        assert word in markdown and word in text
    with Image.open(out / "grid.png") as grid:
        assert grid.width > 4 * 96 and grid.height > 4 * 96


@pytest.mark.parametrize(
    ("change", "words"), [({"classes": (0, 1)}, "other prompts or classes"), ({"num": 8}, "another --num")]
)
def test_a_folder_is_that_of_one_protocol(student, judge, tmp_path, change, words):
    options = {**OPTIONS, "judge": judge, "out": tmp_path / "eval", "metrics": ("fd_test",), "steps": (1,)}
    evaluate([student], **options)
    before = (tmp_path / "eval" / "report.json").read_bytes()
    with pytest.raises(UserError, match=f"holds an evaluation with {words}; choose another --out"):
        evaluate([student], **{**options, **change})
    assert (tmp_path / "eval" / "report.json").read_bytes() == before
    (tmp_path / "eval" / "protocol.json").write_text("{")
    with pytest.raises(UserError, match=r"protocol\.json is damaged; remove it to go on"):
        evaluate([student], **options)


def test_what_a_checkpoint_was_chosen_by_is_said(student, judge, tmp_path):
    card = json.loads((student / "fewstep.json").read_text())
    card["training"] |= {"eval_steps": 10, "export_best": True, "eval_metric": "fd_test"}
    (student / "fewstep.json").write_text(json.dumps(card))
    options = {**OPTIONS, "judge": judge, "steps": (1,), "metrics": ("fd_test", "agreement")}
    report = evaluate([student], out=tmp_path, **options)
    assert report.optimised == ["fd_test"]
    assert "Training optimised FD-toy (test), or chose by it; it did not know agreement." in report.table()


def test_the_counts_of_the_card_are_the_default(student, saved_dit, judge, tmp_path):
    options = {**OPTIONS, "teacher_steps": None, "judge": judge, "metrics": ("fd_test",)}
    report = evaluate(
        [student], teacher=str(saved_dit), out=tmp_path, teacher_call={"num_inference_steps": 3}, **options
    )
    assert [(row["role"], row["steps"]) for row in report.rows] == [
        ("teacher", 1),
        ("teacher", 3),
        ("student", 1),
        ("student", 4),
    ]
    assert report.skipped == []
    report = evaluate([student], judge=judge, out=tmp_path, **OPTIONS, metrics=("fd_test",), steps=(1, 2))
    assert len(report.skipped) == 1 and "2 steps" in report.skipped[0] and "fewstep.json" in report.skipped[0]


def test_finished_rows_are_not_made_again(student, judge, tmp_path, made):
    options = {**OPTIONS, "judge": judge, "out": tmp_path / "eval", "metrics": ("fd_test", "diversity")}
    first = evaluate([student], steps=(1,), **options)
    second = evaluate([student], steps=(1, 4), **options)
    assert made == {("student", 1): 16, ("student", 4): 16}
    assert second.rows[0]["metrics"] == first.rows[0]["metrics"]
    # The size of a batch changes nothing; another seed, or another call, is another row.
    again = evaluate([student], steps=(1, 4), **{**options, "batch_size": 3})
    assert made.total() == 32 and [row["metrics"] for row in again.rows] == [row["metrics"] for row in second.rows]
    with pytest.raises(UserError, match="holds an evaluation with another --seed; choose another --out"):
        evaluate([student], steps=(1,), **{**options, "seed": 1})
    evaluate([student], steps=(1,), **{**options, "seed": 1, "out": tmp_path / "seed"})
    assert made.total() == 48
    card = json.loads((student / "fewstep.json").read_text())
    (student / "fewstep.json").write_text(json.dumps({**card, "call": {"guidance_scale": 3.0}}))
    evaluate([student], steps=(1,), **options)
    assert made.total() == 64
    (student / "README.md").write_text("The card may quote the report without making it stale.")
    evaluate([student], steps=(1,), **options)
    assert made.total() == 64


def test_without_an_extractor_there_is_still_a_report(tmp_path):
    model = Model("student", "student", {"guidance_scale": 2.0}, pipeline=tiny_flow())
    report = evaluate([model], prompts=["a", "bc"], steps=(2,), num=4, latency_calls=1, out=tmp_path)
    (row,) = report.rows
    assert set(row["metrics"]) == {"saturation", "contrast"} and row["nfe"] == 4 and row["speed"]["latency_ms"] > 0
    skipped = {sentence.split(" is skipped: ")[0] for sentence in report.skipped}
    assert {"fid", "kid", "fd_dino", "cmmd", "clip", "pick"} <= skipped and "motion" not in skipped
    assert "There is no number of quality here that training did not optimise." in report.table()
    assert (tmp_path / "grid.png").is_file() and "fid is skipped" in (tmp_path / "report.md").read_text()


def test_what_is_asked_for_and_not_there_stops_a_strict_evaluation(tmp_path):
    model = Model("student", "student", {"guidance_scale": 2.0}, pipeline=tiny_flow())
    options = {"prompts": ["a"], "steps": (2,), "num": 4, "out": tmp_path / "eval", "metrics": ("fid",)}
    with pytest.raises(UserError, match=r"fid cannot be measured: .*inception-2015-12-05\.pt"):
        evaluate([model], **options, strict=True)
    assert not (tmp_path / "eval").exists()


def test_what_nobody_judges_is_not_sampled_by_the_thousand(tmp_path, made):
    model = Model("mine", "student", {}, pipeline=tiny_ddim())
    evaluate([model], out=tmp_path, num=5000, batch_size=3, latency_calls=1, columns=4, steps=(1,), metrics=("speed",))
    assert made == {("student", 1): 4}


def test_a_hub_id_identifies_nothing_that_could_be_reused(saved_dit):
    assert Model("mine", "student", {}, source=str(saved_dit)).fingerprint() is not None
    assert Model("mine", "student", {}, source="owner/name").fingerprint() is None


def test_a_card_that_was_edited_keeps_its_head(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    for number in (1.0, 2.0):
        write_numbers(tmp_path, {"student, 1 step": {"NFE": number}}, "Measured so.")
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n") and card.count("## Numbers") == 1 and "2" in card


def test_the_frames_of_videos_are_judged(judge, tmp_path):
    model = Model("student", "student", pipeline=tiny_video(), kind="prompt")
    report = evaluate([model], prompts=["a"], steps=(1,), num=2, metrics=("fd_test",), judge=judge, out=tmp_path)
    # The toy takes the frames, which are half as large as the reference's images, but not so small.
    assert set(report.rows[0]["metrics"]) == {"fd_test"}
    assert (tmp_path / "grid.png").is_file()


def test_a_diverged_row_is_left_out_and_said(tmp_path):
    bad, good = tiny_ddim(), Model("good", "student", pipeline=tiny_ddim())
    bad.unet.conv_out.bias.data.fill_(float("nan"))
    models = [Model("bad", "student", pipeline=bad), good]
    report = evaluate(models, steps=(1,), num=4, metrics=("saturation",), out=tmp_path)
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
    assert len(list((tmp_path / "eval" / "samples").iterdir())) == 1
    (row,) = evaluate([], teacher="fashion-sd", teacher_call={"guidance_scale": 1.0}, **options).rows
    assert row["nfe"] == 2


def test_a_folder_that_is_called_like_an_embedded_teacher_is_none(saved_dit, student, tmp_path):
    mine = tmp_path / "mine" / "fashion-sd"
    shutil.copytree(saved_dit, mine)
    options = {**OPTIONS, "teacher_steps": (1,), "steps": (1,), "metrics": ("fd_test",), "out": tmp_path / "eval"}
    report = evaluate([], teacher=str(mine), **options)
    assert report.rows[0]["model"] == "teacher" and report.measures == {}
    assert report.skipped == [
        "fd_test is skipped: it is the distance to Fashion-MNIST's test images; to another reference it is called fd."
    ]
    with pytest.raises(UserError, match="does not say how many steps it takes"):
        sample(mine, label=1, out=tmp_path / "a.png")
    # Neither is its student one of the embedded teacher: its run says so, or the card's "./".
    card = json.loads((student / "fewstep.json").read_text())
    (student / "fewstep.json").write_text(json.dumps({**card, "base_model": "fashion-sd"}))
    assert student_model(student).embedded == "fashion-sd"
    (student.parent / "config.yaml").write_text(f"teacher: {mine}")
    report = evaluate([student], teacher=str(mine), **options)
    assert report.measures == {} and report.rows[0]["call"]["guidance_scale"] == 2.0
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


def test_samples_are_exported_once(tmp_path, caplog):
    caplog.set_level("INFO", logger="fewstep")
    model = Model("mine", "student", pipeline=tiny_flow())
    options = {"prompts": ["a", "b"], "steps": (1,), "num": 4, "metrics": ("saturation",), "out": tmp_path / "eval"}
    for _ in range(2):
        evaluate([model], export=("adm", "imagereward"), **options)
    (batch,) = (tmp_path / "eval" / "exports" / "adm").rglob("*.npz")
    with np.load(batch) as content:
        assert content["arr_0"].shape == (4, 8, 8, 3)
    assert "adm: 4 samples in" in caplog.text
    with pytest.raises(UserError, match="an export needs all images"):
        evaluate([model], export=("adm",), images="shown", **options)
    with pytest.raises(UserError, match="there is no export ade; there are geneval"):
        evaluate([model], export=("ade",), **options)


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


def test_nothing_of_a_loaded_object_is_used_again(tmp_path):
    shown = []
    for bias in (0.0, 3.0):
        pipeline = tiny_ddim()
        pipeline.unet.conv_out.bias.data.fill_(bias)
        model = Model("mine", "student", {}, pipeline=pipeline)
        report = evaluate([model], out=tmp_path, num=4, columns=4, steps=(1,), metrics=("saturation",))
        shown.append((tmp_path / report.rows[0]["pictures"][0]).read_bytes())
    assert shown[0] != shown[1]


def test_a_reference_of_another_extractor_is_refused(judge):
    judge.extractor.sha256 = "another"
    with pytest.raises(ValueError, match="was not made with"):
        Judge(judge.extractor, judge.reference)
