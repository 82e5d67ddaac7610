"""What ``fewstep distill`` says before a run, and the command it ends with, which a shell and ``sample`` take."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from fewstep.cli import distill, main
from fewstep.programs.methods import methods


@pytest.mark.parametrize(
    ("told", "items", "words"),
    [
        ({"conditional": None}, None, []),
        ({"conditional": "prompt", "example": "a cat's tail"}, None, ["--prompt", "a cat's tail"]),
        ({"conditional": "prompt"}, None, ["--prompt", "a photo of a cat"]),
        ({"conditional": "label", "example": 3}, None, ["--class", "3"]),
        ({"conditional": "item", "example": {"prompt": "a"}}, "my edits.jsonl", ["--items", "my edits.jsonl"]),
        ({"conditional": "item", "example": {"prompt": "a"}}, None, ["--items", "FILE"]),
    ],
)
def test_it_says_what_the_student_is_asked_with(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    told: dict[str, Any],
    items: str | None,
    words: list[str],
) -> None:
    student = tmp_path / "a run" / "student"
    student.mkdir(parents=True)
    (student / "model_index.json").write_text("{}")
    monkeypatch.setattr(distill, "read_about", lambda folder: json.loads(json.dumps(told)))
    distill._announce(student, items)
    said, _, command = capsys.readouterr().out.strip().partition("; ")
    assert said == f"the student is in {student}"
    assert command == shlex.join(["fewstep", "sample", str(student), *words, "--out", "sample.png"])
    monkeypatch.setattr("fewstep.cli.sample.sample", lambda directory, **settings: Path(settings["out"]))
    assert main(shlex.split(command)[1:]) == 0


def test_help_before_a_method_is_named_says_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", "--help"]) == 0
    said = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert [name for name, _ in said] == ["auto", *methods()]
    assert all(line.endswith(".") for _, line in said), "each is a whole sentence of the method's file"
