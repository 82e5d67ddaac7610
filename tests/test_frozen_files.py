"""Files of pipelines/ that lie in students' folders as copies, and are trusted because they are known to the letter."""

import hashlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "pipelines"
FROZEN = {
    "flow_map.py": "4d6d3d6014ff2f1261f95e5bb64e82840bd99b71626e3e176b3598c46d5501d9",
    "multi_student.py": "444dcc9cef41eff7f3eca90606c2846e9102a4446420e69989400bac7e702d63",
    "nasa.py": "f1db09234ca71bd29f83a694963b22b1582964bfed817ac01b3aea5cffda09e2",
    "phased.py": "67f717e7b68cb1bdec105bdefafe8428b917f443ba5360336478e91ae09ab735",
    "speed_up.py": "aa2bb1a04fc4c8cc0d9922dc8ca09c9c942572122d7a38bd02e01dc289437d7d",
    "tcd_flow.py": "d0c5047946a32549a45157eed321b71d8716b40544339a6c954ad2a4bc69e789",
}


@pytest.mark.parametrize("name", FROZEN)
def test_copies_in_saved_students_are_still_known(name: str) -> None:
    """Whoever changes such a file makes every student saved before ask for ``trust_remote_code``."""
    assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == FROZEN[name]
