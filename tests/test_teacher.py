"""What is read of a teacher before anything is trained."""

from pathlib import Path

import pytest

from fewstep.fashion import teacher_path
from fewstep.teacher import embedded_name, teacher_license

OTHER = {"license": "other", "license_name": "research", "license_link": "https://example.org"}


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\n---\n", {"license": "mit"}),
        ("---\nlicense: other\nlicense_name: research\nlicense_link: https://example.org\n---\n", OTHER),
        ("---\nlicense: [a\n---\n", {}),
        ("no front matter", {}),
    ],
)
def test_the_licence_is_what_the_card_says_and_a_broken_card_is_none(
    card: str, expected: dict[str, str], tmp_path: Path
):
    (tmp_path / "README.md").write_text(card)
    assert teacher_license(str(tmp_path)) == expected


def test_a_teacher_without_a_card_has_no_licence(tmp_path: Path):
    assert teacher_license(str(tmp_path)) == {}


def test_an_embedded_teacher_is_known_by_its_name_and_by_its_folder(tmp_path: Path):
    """A pipeline in memory says only where it was loaded from, and its guidance must be the stated one, not 7.5."""
    assert embedded_name("fashion-sd") == "fashion-sd"
    assert embedded_name(str(teacher_path("fashion-flow"))) == "fashion-flow"
    assert embedded_name(str(tmp_path)) is None
    assert embedded_name("owner/fashion-sd") is None
