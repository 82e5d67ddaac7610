"""Publishing a student on the Hugging Face hub: its folder as it is, the card with the repository's name filled in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fewstep.data.durable import write_text_durably
from fewstep.errors import UserError, first_line
from fewstep.export.card.card import PLACEHOLDER


def publish(folders: Sequence[Path], repository: str, private: bool = False) -> str:
    """Upload what a run exported: the whole pipeline where there is one, and a LoRA beside it as ``repository-lora``.

    Args:
        folders: that it wrote, a whole pipeline before a LoRA (:class:`fewstep.export.student.Written`).
        repository: ``owner/name``, or a name of the user's own; made where it is not there yet.
        private: make a new repository a private one.

    Returns:
        One line that says where everything is.

    Raises:
        UserError: the hub does not take it: no token, no right, no network. The folders stay as they are.
    """
    places = [_push(folder, f"{repository}{suffix}", private) for folder, suffix in zip(folders, ("", "-lora"))]
    return f"published: {', '.join(places)}"


def _push(folder: Path, repository: str, private: bool) -> str:
    from huggingface_hub import HfApi

    card = folder / "README.md"
    text = card.read_text(encoding="utf-8")
    hub = HfApi()
    try:
        made = hub.create_repo(repository, private=private or None, exist_ok=True)
        write_text_durably(card, text.replace(PLACEHOLDER, f'"{made.repo_id}"'))
        hub.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="A few-step student by fewstep")
    except Exception as error:  # the client's own errors, its transport's and the system's have no common class
        write_text_durably(card, text)
        raise UserError(
            f"the hub did not take {repository} ({first_line(error)}); the student is whole in {folder}: mend that, "
            "then --resume pushes it again"
        ) from error
    return str(made)
