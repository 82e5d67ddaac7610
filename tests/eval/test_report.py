"""A report: what stands beside each number, what it says of itself, and files that are none."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from toy_reports import MEASURES, row, toy_report

from fewstep.errors import UserError
from fewstep.eval.report import Report, protocol
from fewstep.eval.report.check import CLOCK, CONDITIONS, MEASURE, ROW, TOP

SCHEMA = json.loads(files("fewstep.eval.report").joinpath("schema.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A report's file as it is written."""
    out = tmp_path_factory.mktemp("report")
    toy_report().save(out)
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def written(content: Any, folder: Path) -> Path:
    (folder / "report.json").write_text(json.dumps(content), encoding="utf-8")
    return folder / "report.json"


def test_a_report_is_read_as_it_was_written(content: dict[str, Any], tmp_path: Path) -> None:
    assert Report.load(written(content, tmp_path)) == toy_report()
    assert Report.load(tmp_path / "report.json").to_dict() == content
    assert content["schema"] == 2 and list(content["measures"]) == list(MEASURES)
    assert content["rows"][3]["relative"] == {
        "fid_to_floor": 2.0,
        "fid_to_teacher": 1.25,
        "fd_dino_to_teacher": 120 / 95,
    }


def test_the_table_by_hand() -> None:
    lines = toy_report().table().splitlines()
    titles = re.split("  +", lines[0].strip())
    assert titles == [
        *("model", "steps", "NFE", "FID", "floor", "x floor", "x teacher 25", "FD-DINOv2 †"),
        *("CLIP score ViT-g-14", "diversity", "latency ms", "images/s", "x as fast"),
    ]
    assert re.split("  +", lines[5].strip()) == [
        *("student", "4", "4", "5.00 ±0.25", "2.50", "2.0", "1.25", "120.0", "0.331", "0.55", "80.0", "25.0"),
        "10.0 (9.5 to 10.5)",
    ]
    assert len({line.count("|") for line in toy_report().markdown().splitlines() if line.startswith("|")}) == 1


def test_what_a_report_says_of_itself() -> None:
    report = toy_report()
    assert report.headlines()[1] == (
        "student at 4 steps: FID 5.00 ±0.25 (floor 2.50, teacher at 25 steps 4.00), "
        "10.0 (9.5 to 10.5) times as fast as the teacher's 25 steps, 4 network evaluations."
    )
    for said in (
        "Every row: 1,000 samples, base seed 0; sample i has one seed in all rows.",
        f"FID: inception-2015-12-05 (weights sha256 {'ab' * 6}, resize clean, 299) against the teacher's own samples, "
        "n = 1,000.",
        "Floor of FID: 2.50, the teacher against itself with other seeds.",
        "FD-DINOv2 has no floor: the reference is statistics alone.",
        "† unverified: there is no published hash of the weights behind FD-DINOv2.",
        "Latency: median of one sample a call; images/s at batch 8; cpu x86_64, float32, 1 threads, torch 2.14.0.",
        "2 of 1,000 prompts were cut after 77 tokens.",
        "patch_fid is skipped: the pictures are too small.",
    ):
        assert said in report.table().splitlines()
        assert f"- {said}" in report.markdown().splitlines()


def test_a_number_that_training_did_not_optimise_and_diversity_are_there_or_missed() -> None:
    """In one sentence; a headline shows the independent number too."""
    whole = toy_report().table()
    assert "did not optimise" not in whole and "number of diversity" not in whole
    some = toy_report(optimised=["fid", "fd_dino"])
    assert "Training optimised FID, FD-DINOv2, or chose by it; it did not know CLIP score ViT-g-14." in some.table()
    assert "FID 5.00 ±0.25 (floor 2.50, teacher at 25 steps 4.00), CLIP score ViT-g-14 0.331 (" in some.headlines()[1]
    bare = toy_report()
    for one in bare.rows:
        one["metrics"] = {"fid": one["metrics"]["fid"]}
    bare = dataclasses.replace(bare, optimised=["fid"])
    assert "There is no number of quality here that training did not optimise." in bare.table()
    assert "There is no number of diversity here: how much the samples vary is not known." in bare.table()


def test_a_strangers_name_stays_a_name() -> None:
    evil = "a|b <script>alert(1)</script> [x](http://a.b)\nc\x1b[31m"
    report = toy_report(rows=[row("student", 1, (1.0, 0.1, 2.0, 0.3, 0.4, 5.0), model=evil)], notes=[evil])
    text = report.markdown()
    assert "<script" not in text and not re.search(r"(?<!\\)\]\(http", text) and "\x1b" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in rows}) == 1 and len(rows) == 3
    # A terminal is not steered.
    assert report.table().count(r"[x](http://a.b) c\x1b[31m") == 3 and "\x1b" not in report.table()


def test_what_cannot_be_read_again_is_not_written(tmp_path: Path) -> None:
    report = toy_report()
    report.rows[0]["metrics"]["fid"] = float("nan")
    with pytest.raises(ValueError, match="its row 1 has a number that is none, or is not finite"):
        report.save(tmp_path)
    floorless = {"fid": dataclasses.replace(MEASURES["fid"], floor=None, floor_of=None)}
    with pytest.raises(ValueError, match="'fid' is a Fréchet distance with neither a floor nor a reason"):
        toy_report(measures=MEASURES | floorless).save(tmp_path)
    assert not list(tmp_path.iterdir())


def _set(*path: str | int, to: Any) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for name in path[:-1]:
            content = content[name]
        content[path[-1]] = to

    return change


def _drop(*path: str | int) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for name in path[:-1]:
            content = content[name]
        del content[path[-1]]

    return change


#: (what is done to a report's file, what the refusal says, whether the JSON Schema sees it)
WRONG: dict[str, tuple[Callable[[Any], None], str, bool]] = {
    "an older schema": (_set("schema", to=1), "is a report of schema 1, and this version reads 2: run", True),
    "no schema": (_drop("schema"), "it has no schema", True),
    "a schema that is a word": (_set("schema", to="2"), "its schema is no whole number", True),
    "no rows": (_set("rows", to=[]), "it has no rows", True),
    "an unknown name": (_set("extra", to=1), "it has an unknown 'extra'", True),
    "no digest": (_drop("protocol", "digest"), "its protocol has no digest", True),
    "another protocol": (_set("protocol", "num", to=5), "its protocol does not fit its digest", False),
    "no number of samples": (_set("num", to=None), "its num is null, and it joins no reports", True),
    "a measure without a title": (_set("measures", "fid", "title", to=" "), "'fid' has no title", True),
    "a measure without a name": (_drop("measures", "fid", "resize"), "its measure 'fid': it has no resize", True),
    "an unknown name in a measure": (_set("measures", "fid", "x", to=1), "'fid': it has an unknown 'x'", True),
    "a format that reaches out": (_set("measures", "fid", "format", to="{0.__class__}"), "'fid' has the format", True),
    "a format without an end": (_set("measures", "fid", "format", to="{:999999999d}"), "'fid' has the format", True),
    "a direction that is none": (_set("measures", "fid", "better", to="up"), "'fid' is better 'up'", True),
    "a floor of nothing": (_set("measures", "fid", "floor_of", to=None), "'fid' does not say what its floor", True),
    "a floor that is no number": (_set("measures", "fid", "floor", to="2"), "its floor is no whole number or", True),
    "an infinite floor": (_set("measures", "fid", "floor", to=float("inf")), "'fid' has a floor that is no", False),
    "a hash that is none": (_set("measures", "fid", "weights_sha256", to="zz"), "'fid' has a weights_sha256", True),
    "a role that is none": (_set("rows", 0, "role", to="king"), "its row 1 has the role 'king'", True),
    "no steps": (_set("rows", 0, "steps", to=0), "its row 1 has steps, num or nfe that cannot be", True),
    "a number that is a word": (_set("rows", 1, "metrics", "fid", to="5"), "its row 2 has a number that is none", True),
    "a number that is a switch": (_set("rows", 1, "metrics", "fid", to=True), "its row 2 has a number that is", True),
    "not a number": (_set("rows", 1, "metrics", "fid", to=float("nan")), "its row 2 has a number that is", False),
    "a number too large": (_set("rows", 1, "metrics", "fid", to=10**400), "its row 2 has a number that is", False),
    "a latency that is a word": (_set("rows", 1, "speed", "latency_ms", to="fast"), "its row 2 has a number", True),
    "a number of no measure": (_set("rows", 0, "metrics", "x", to=1.0), "'x' that its measures do not name", False),
    "a spread of nothing": (_set("rows", 0, "spread", "x", to=1.0), "a spread of 'x' and no such number", False),
    "a picture elsewhere": (_set("rows", 0, "pictures", to=["../a.png"]), "its row 1 has a picture elsewhere", True),
    "a picture at a root": (_set("rows", 0, "pictures", to=["/a.png"]), "its row 1 has a picture elsewhere", True),
    "a picture of another kind": (_set("rows", 0, "pictures", to=["a.svg"]), "a picture that is no .png", True),
    "a picture that is a number": (_set("rows", 0, "pictures", to=[3]), "its row 1 has a picture elsewhere", True),
    "conditions of no kind": (_set("conditions", "kind", to="smell"), "its conditions are of no known kind", True),
    "a condition that is a number": (_set("conditions", "shown", to=[1]), "one of its conditions, notes", True),
    "a note that is a table": (_set("notes", to=[{}]), "one of its conditions, notes", True),
    "a version that is a number": (_set("versions", "torch", to=2), "one of its versions is no text", True),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_file_that_is_no_report_gets_one_line(wrong: str, content: dict[str, Any], tmp_path: Path) -> None:
    change, says, _ = WRONG[wrong]
    spoilt = copy.deepcopy(content)
    change(spoilt)
    with pytest.raises(UserError, match=re.escape(says)) as error:
        Report.load(written(spoilt, tmp_path))
    assert "\n" not in str(error.value) and "report.json" in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '{"schema": 2}', '{"schema": 2, "schema": 2}'])
def test_a_file_of_something_else_gets_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(UserError, match=r"report\.json is no report") as error:
        Report.load(tmp_path / "report.json")
    assert "\n" not in str(error.value)


def test_the_schema_file_says_the_same(content: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is in the extra 'test'")
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    validator = jsonschema.Draft202012Validator(SCHEMA)
    assert validator.is_valid(content)
    for name, (change, _, seen) in WRONG.items():
        spoilt = copy.deepcopy(content)
        change(spoilt)
        assert validator.is_valid(spoilt) is not seen, name


def test_the_schema_file_has_every_name() -> None:
    """Those of the reader's own check, which are those of the dataclass."""
    row = SCHEMA["properties"]["rows"]["items"]
    assert SCHEMA["properties"].keys() == TOP.keys() == toy_report().to_dict().keys()
    assert row["properties"].keys() == ROW.keys()
    assert tuple(row["properties"]["speed"]["properties"]) == CLOCK
    measure = SCHEMA["properties"]["measures"]["additionalProperties"]
    assert measure["properties"].keys() == MEASURE.keys() == dataclasses.asdict(MEASURES["fid"]).keys()
    assert SCHEMA["properties"]["conditions"]["properties"].keys() == CONDITIONS.keys()


def test_the_page_of_the_schema_has_every_name() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
    for names in (TOP, MEASURE, ROW, CLOCK):
        assert [name for name in names if f"`{name}`" not in page] == []


def test_the_digest_of_a_protocol_follows_its_fields() -> None:
    one = protocol(num=5, seed=0, conditions_sha256="a", image_format="png")
    assert one["digest"] == protocol(image_format="png", conditions_sha256="a", seed=0, num=5)["digest"]
    assert one["digest"] != protocol(num=6, seed=0, conditions_sha256="a", image_format="png")["digest"]
