"""Where the package data lies, and the check that it is what the manifest says."""

import hashlib
import json
from pathlib import Path
from typing import Any

from fewstep.errors import UserError

DATA = Path(__file__).parent / "data"
MANIFEST = "manifest.json"
CLASSIFIER = "classifier.safetensors"
REFERENCE = "reference.safetensors"
TRAINING_IMAGES = "training_images.npz"
HELD_BACK_IMAGES = "held_back_images.npz"


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest() -> dict[str, Any]:
    """What stands in manifest.json: files with their hashes, floors, measured rows of the teachers, licence."""
    return json.loads((DATA / MANIFEST).read_text())


def verified(name: str) -> Path:
    """Path of a data file whose hash agrees with the manifest.

    Raises:
        UserError: when the file is missing or differs.
    """
    path = DATA / name
    if not path.is_file():
        raise UserError(f"{path} is missing: install fewstep again, or run python -m fewstep.eval.fashion.build all")
    if sha256(path) != manifest()["files"][name]["sha256"]:
        raise UserError(f"{path} is not the file that the manifest names: install fewstep again")
    return path
