"""Which files a teacher is loaded from: a revision, a folder inside a repository, a variant of the weights."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import list_repo_files, snapshot_download

from fewstep.errors import UserError, first_line
from fewstep.reading import read_json
from fewstep.teachers.names import embedded_name, teacher_folder

logger = logging.getLogger("fewstep")

#: The files of a network's weights, in the names of diffusers and transformers, old and new, whole and in shards.
_SHARD = r"(?:-\d{5}-of-\d{5})?"
WEIGHTS = re.compile(
    rf"(?:diffusion_pytorch_|pytorch_)?model{_SHARD}(?:\.(?P<variant>[\w-]+?))?{_SHARD}\.(?P<format>safetensors|bin)"
)
# What other libraries and older formats need, and a pipeline does not.
_FOREIGN = ["*.ckpt", "*.msgpack", "*.onnx", "*.onnx_data", "*.h5", "*.ot", "*.gguf"]


@dataclass(frozen=True)
class Source:
    """The files of a teacher.

    Attributes:
        place: a folder with a model_index.json, a single file, or a hub id.
        revision: of the hub id.
        subfolder: of the hub id or the folder that was named; of a folder, ``place`` has it.
        variant: of the weights' names, such as fp16; None for the plain ones.
    """

    place: Path | str
    revision: str | None = None
    subfolder: str | None = None
    variant: str | None = None

    @property
    def is_file(self) -> bool:
        """Whether it is a single file."""
        return isinstance(self.place, Path) and self.place.is_file()

    @property
    def words(self) -> dict[str, Any]:
        """What ``from_pretrained`` is told beside ``place``."""
        on_hub = {"revision": self.revision} if isinstance(self.place, str) else {}
        return {name: value for name, value in {**on_hub, "variant": self.variant}.items() if value is not None}

    def index(self) -> dict[str, Any]:
        """The content of its model_index.json; of a hub id it is fetched.

        Raises:
            OSError, ValueError: it cannot be read.
        """
        on_hub = {"revision": self.revision} if isinstance(self.place, str) and self.revision is not None else {}
        return dict(DiffusionPipeline.load_config(self.place, **on_hub))

    def parts(self) -> set[str]:
        """The names of the parts that its index names, each of which lies in a folder of that name.

        Raises:
            OSError, ValueError: the index cannot be read.
        """
        # The class of a pipeline with code of its own is such a pair, too; a setting of such a one may be a list.
        pairs = {n: e for n, e in self.index().items() if isinstance(e, list | tuple) and not n.startswith("_")}
        return {name for name, entry in pairs.items() if entry and isinstance(entry[0], str)}

    @property
    def told(self) -> dict[str, str]:
        """What its user has to say beside the name, to get the same files again; of a single file, its own name."""
        file = Path(self.place).name if self.is_file else None
        told = {"revision": self.revision, "subfolder": self.subfolder, "variant": self.variant, "file": file}
        return {name: value for name, value in told.items() if value is not None}


def find_source(
    name: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    flag: str = "--teacher",
    weights: bool = True,
) -> Source:
    """Find the files that a name means.

    Args:
        name: a folder, a hub id, an embedded teacher, or a ``.safetensors`` file with a whole pipeline.
        revision: a branch, tag or commit of a hub id.
        subfolder: where in a folder or repository the pipeline lies.
        variant: of the weights; None: the plain ones, or where there are none the only variant that there is.
        flag: which setting named it, for messages.
        weights: whether there must be weights.

    Raises:
        UserError: there is no such thing, it is no pipeline, or what was asked for does not belong to it.
    """
    path = teacher_folder(name)
    if embedded_name(name) is not None:
        _refuse("is embedded in this package", flag, name, revision=revision, subfolder=subfolder, variant=variant)
    if path is None:
        place = _in_repository(name, revision, subfolder, flag, weights) if subfolder is not None else name
        source = Source(place, revision, subfolder)
    else:
        _refuse("lies on this machine", flag, name, revision=revision)
        if path.is_file():
            _refuse("is a single file", flag, name, subfolder=subfolder, variant=variant)
            if path.suffix != ".safetensors":
                raise UserError(f"{flag} {name} is no safetensors file, and others are not opened")
            return Source(path)
        source = Source(path if subfolder is None else path / subfolder, None, subfolder)
    if isinstance(source.place, Path) and not (source.place / "model_index.json").is_file():
        missing = not source.place.exists()
        what = "does not exist" if missing else "is not a diffusers pipeline: it has no model_index.json"
        inside = f", folder {subfolder}," if subfolder is not None else ""
        raise UserError(f"{flag} {name}{inside} {what}")
    if isinstance(source.place, Path):
        _refuse_odd_parts(source.place, f"{flag} {name}")
    if not weights:
        return source
    return Source(source.place, revision, subfolder, _variant(source, variant, f"{flag} {name}"))


def refuse_no_table(file: Path, what: str) -> dict[str, Any]:
    """The table in a JSON file; :class:`UserError` says where there is none that ``what`` is damaged."""
    try:
        table = read_json(file)
        if not isinstance(table, dict):
            raise ValueError("it is no table")
    except (OSError, ValueError) as error:
        raise UserError(f"{what} is damaged ({first_line(error)}); fetch its files anew") from error
    return table


def _refuse_odd_parts(place: Path, teacher: str) -> None:
    """Raise for an index that is no table, and for one whose parts would be looked for elsewhere."""
    index = refuse_no_table(place / "model_index.json", f"{teacher} cannot be loaded: its model_index.json")
    if odd := [name for name in index if not re.fullmatch(r"\w+", name)]:
        raise UserError(f"{teacher} cannot be loaded: its model_index.json names {odd[0]!r}, which is no folder in it")


def _refuse(why: str, flag: str, name: str, **told: str | None) -> None:
    for setting, value in told.items():
        if value is not None:
            raise UserError(f"{flag} {name} {why}: leave out --{setting}")


def _in_repository(name: str, revision: str | None, subfolder: str, flag: str, weights: bool) -> Path:
    """A folder of a repository, fetched; diffusers' pipelines know no subfolder of their own."""
    wanted = [f"{subfolder}/*"] if weights else [f"{subfolder}/*{suffix}" for suffix in CONFIGURATION]
    try:
        root = snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=_FOREIGN)
    except Exception as error:  # of the hub, of its client, or of the connection
        raise UserError(f"{flag} {name}: its folder {subfolder} cannot be fetched: {first_line(error)}") from error
    return Path(root) / subfolder


#: The ends of the names of what a pipeline is built from, tokenizers included, except weights.
CONFIGURATION = (".json", ".txt", ".model", ".jinja")


def _variant(source: Source, wanted: str | None, teacher: str) -> str | None:
    """The variant to ask for; None for plain weights, and where nobody knows which files there are."""
    files = _files(source)
    held = variants(files) if files is not None else {}
    lacking = {part: found for part, found in held.items() if None not in found}
    if wanted is not None:
        if held and not any(wanted in found for found in held.values()):
            known = sorted({one for found in held.values() for one in found if one is not None})
            raise UserError(
                f"{teacher} has no weights of the variant {wanted}; "
                + (f"it has: {', '.join(known)}" if known else "leave out --variant")
            )
        return wanted
    if not lacking:
        return None
    shared = sorted(set.intersection(*(set(found) for found in lacking.values())), key=str)
    if len(shared) != 1:
        each = ", ".join(f"{part} ({', '.join(sorted(map(str, found)))})" for part, found in sorted(lacking.items()))
        raise UserError(f"{teacher} has its weights in variants alone: {each}; say which by --variant")
    logger.info(f"{teacher}: there are weights of the variant {shared[0]} alone, and they are taken")
    return shared[0]


def variants(files: Iterable[str]) -> dict[str, set[str | None]]:
    """The variants in which each part's weights are there, None for the plain ones.

    Args:
        files: paths inside a pipeline's folder, of any kind.
    """
    held: dict[str, set[str | None]] = {}
    for file in map(PurePosixPath, files):
        match = WEIGHTS.fullmatch(file.name)
        if match is not None and len(file.parts) == 2:
            held.setdefault(file.parts[0], set()).add(match["variant"])
    return held


def _files(source: Source) -> list[str] | None:
    """The files of the parts that a pipeline is made of; None where the hub does not tell."""
    place = source.place
    if isinstance(place, str):
        try:
            files = list_repo_files(place, revision=source.revision)
        except Exception:  # without a connection, what was fetched before is all there is
            try:
                place = Path(snapshot_download(place, revision=source.revision, local_files_only=True))
            except Exception:  # it is for from_pretrained to say what is wrong
                return None
    if isinstance(place, Path):
        files = [path.relative_to(place).as_posix() for path in place.glob("*/*")]
    try:
        parts = source.parts()
    except (OSError, ValueError):  # it is for from_pretrained to say what is wrong
        return None
    return [file for file in files if file.partition("/")[0] in parts]
