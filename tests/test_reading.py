"""What somebody else wrote is read in bounds: no depth, no aliases and no name that is there twice gets through."""

from pathlib import Path

import pytest
import yaml

from fewstep import reading
from fewstep.reading import inside, misfit, parse_json, read_json, read_yaml


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' is there twice"),
        ("[" * 200 + "]" * 200, "too deep"),
        ("[" * 100_000 + "]" * 100_000, "too deep"),
        ("1" * 5000, "digits"),
    ],
)
def test_json_that_is_none_or_too_deep(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=reason):
        read_json(tmp_path / "a.json")


def test_json_of_a_usual_depth_is_read() -> None:
    text = '{"a": ' + "[" * 90 + "1" + "]" * 90 + ', "b": null}'
    assert parse_json(text)["b"] is None


# Nine aliases of nine aliases: 9 ** 3 nodes here, and a harmless stand-in for what has nine such lines.
NESTED = f"a: &a [{', '.join(['1'] * 9)}]\nb: &b [{', '.join(['*a'] * 9)}]\nc: [{', '.join(['*b'] * 9)}]\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 1\nb: {c: 1, c: 2}", "'c' is there twice"),
        ("a: " + "[" * 200 + "]" * 200, "too deep"),
        ("a: !!python/object/apply:os.getcwd []", "python/object"),
        ("a: !!python/name:os.getcwd", "python/name"),
        ("a: [1", "expected"),
        ("a: 1\n--- b", "single document"),
        ("a: &a [*a]", "what it lies in"),
        (NESTED, "aliases grow too large"),
    ],
)
def test_yaml_that_is_refused(text: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_MOST_NODES", 500)
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=reason):
        read_yaml(tmp_path / "a.yaml")


def test_yaml_within_bounds_is_read_as_ever(tmp_path: Path) -> None:
    text = f"{NESTED}base: &base {{x: 1}}\nmore:\n  <<: *base\n  y: 2\nz: [{{x: 1}}, {{x: 2}}]\nx: x\n"
    (tmp_path / "a.yaml").write_text(text)
    assert read_yaml(tmp_path / "a.yaml") == yaml.safe_load(text)


def test_a_file_of_another_size_than_any_of_ours_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_MOST_BYTES", 10)
    (tmp_path / "a.json").write_text("[1, 2, 3, 4]")
    for read in (read_json, read_yaml):
        with pytest.raises(ValueError, match="more than 10 bytes"):
            read(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["../a", "/etc/a", "a/../../b", "", ".", None, 3, "a\0b"])
def test_a_name_that_leads_out_of_a_folder(name: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file in this folder"):
        inside(tmp_path, name)


def test_a_name_inside_a_folder(tmp_path: Path) -> None:
    assert inside(tmp_path, "scheduler/a.json") == tmp_path / "scheduler" / "a.json"


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ([], "it is no table"),
        ({}, "it has no n"),
        ({"n": "1"}, "its n is no whole number"),
        ({"n": True}, "its n is no whole number"),
        ({"n": 1, "more": 3}, "its more is no list or null"),
        ({"n": 1, "more": None}, None),
        ({"n": 1}, None),
    ],
)
def test_what_of_a_table_does_not_fit(table: object, reason: str | None) -> None:
    assert misfit(table, {"n": int, "more": (list, type(None))}, optional=("more",)) == reason
