"""Files of pipelines/ that lie in students' folders as copies, and are trusted because they are known to the letter."""

import hashlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "pipelines"
FROZEN = {
    "flow_map.py": "ce00fbfc76f33f20ed8df4bb60c5b4a24aa18fef11e72a7481b7ca90e9788fda",
    "multi_student.py": "444dcc9cef41eff7f3eca90606c2846e9102a4446420e69989400bac7e702d63",
    "nasa.py": "f1db09234ca71bd29f83a694963b22b1582964bfed817ac01b3aea5cffda09e2",
    "phased.py": "67f717e7b68cb1bdec105bdefafe8428b917f443ba5360336478e91ae09ab735",
    "speed_up.py": "aa2bb1a04fc4c8cc0d9922dc8ca09c9c942572122d7a38bd02e01dc289437d7d",
    "tcd_flow.py": "d0c5047946a32549a45157eed321b71d8716b40544339a6c954ad2a4bc69e789",
    "warped_flow.py": "fab1994427fce16f08dd9dc9e83d6596cef2b19271c23d7b385d2259b58e9dc0",
}


@pytest.mark.parametrize("name", FROZEN)
def test_copies_in_saved_students_are_still_known(name: str) -> None:
    """Where such a file changes, every student that was saved before asks for ``trust_remote_code``."""
    assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == FROZEN[name]
