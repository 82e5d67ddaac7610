"""WebDataset's shards: tar archives whose members belong together by the part of their names before the first dot.

``000012.jpg``, ``000012.txt`` and ``000012.cls`` are one sample. The archive is not unpacked: its headers say where
each member lies, and an image is read from there alone.
"""

from __future__ import annotations

import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.data.image_folders import SUFFIXES, is_hidden
from fewstep.data.shard_index import Samples
from fewstep.data.text_names import LABELS, TEXTS, as_label, only_one
from fewstep.errors import UserError, one_line
from fewstep.reading import parse_json

_BLOCK = 512
_META = re.compile(r"__[^/]*__($|/)")  # of a whole shard, by webdataset's convention


@dataclass(frozen=True)
class TarShard:
    """One archive.

    Attributes:
        path: of it.
        text: of which suffix, or field of the .json, the texts are; None: .txt, or what is there.
    """

    path: Path
    text: str | None = None

    def read(self, place: tuple[int, int]) -> bytes:
        offset, size = place
        with self.path.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) < size:
            raise OSError("the shard ends before it")
        return content

    def samples(self) -> Samples:
        found = Samples()
        for key, members in self._by_key(found).items():
            self._add(found, key, members)
        return found

    def _by_key(self, found: Samples) -> dict[str, dict[str, tarfile.TarInfo]]:
        """The members of each sample by what follows the first dot of their names."""
        keys: dict[str, dict[str, tarfile.TarInfo]] = {}
        size = self.path.stat().st_size
        try:
            with tarfile.open(self.path, "r:") as archive:
                for member in archive:
                    name = member.name
                    folder, slash, base = name.rpartition("/")
                    stem, dot, suffix = base.partition(".")
                    if member.isdir():
                        continue
                    if not member.isreg() or not dot or not stem or is_hidden(Path(name)) or _META.match(name):
                        found.passed_over["no members of samples"] += 1
                    elif member.offset_data + member.size > size:
                        raise tarfile.ReadError(f"it ends inside {name}")
                    else:
                        sample = keys.setdefault(f"{folder}{slash}{stem}", {})
                        if suffix.lower() in sample:
                            found.refuse(f"{self.path.name}: {name} is there twice")
                        sample[suffix.lower()] = member
                end = archive.offset
        except (tarfile.TarError, OSError) as error:
            packed = "; archives that are compressed have to be unpacked" if _compressed(self.path) else ""
            raise UserError(f"{self.path} is no tar archive that can be read: {one_line(error)}{packed}") from error
        # tarfile takes whatever is no header for the end of an archive, and so a truncated one for a shorter one.
        if size < end + _BLOCK or any(self.read((end, _BLOCK))):
            raise UserError(f"{self.path} is truncated or damaged after {end:,} bytes; fetch it again")
        return keys

    def _add(self, found: Samples, key: str, members: dict[str, tarfile.TarInfo]) -> None:
        images = [suffix for suffix in members if f".{suffix.rpartition('.')[2]}" in SUFFIXES]
        known = {*images, "json", "cls", *TEXTS, self.text}
        for suffix in members.keys() - known:
            found.passed_over[f".{suffix}"] += 1
        if not images:
            if members.keys() & known:
                found.refuse(f"{self.path.name}: {key} has {', '.join(f'.{s}' for s in sorted(members))} and no image")
            return
        if len(images) > 1:
            both = ", ".join(sorted(images))
            found.refuse(f"{self.path.name}: {key} has several images ({both}); a key ends at its name's first dot")
            return
        member = members[images[0]]
        try:
            text, label = self._shown(members)
        except ValueError as error:
            found.refuse(f"{self.path.name}: {key} ({one_line(error)})")
            return
        found.names.append(member.name)
        found.places.append((member.offset_data, member.size))
        found.texts.append(text)
        found.labels.append(label)

    def _shown(self, members: dict[str, tarfile.TarInfo]) -> tuple[str | None, int | None]:
        """What a sample's members say of its image. Raises :class:`ValueError` where they cannot be read."""
        fields: dict[str, Any] = {}
        if "json" in members:
            fields = parse_json(self._content(members["json"]))
            if not isinstance(fields, dict):
                raise ValueError("its .json is no table")
        name = self.text or only_one(TEXTS, [*(name for name in TEXTS if name in members)] or fields)
        text: Any = None
        if name in members:
            text = self._content(members[name]).strip()
        elif name is not None:
            text = fields.get(name)
        if text is not None and not isinstance(text, str):
            raise ValueError(f"its {name} is no text")
        if "cls" in members:
            return text, as_label(self._content(members["cls"]).strip())
        place = only_one(LABELS, fields)
        return text, None if place is None or fields[place] is None else as_label(fields[place])

    def _content(self, member: tarfile.TarInfo) -> str:
        return self.read((member.offset_data, member.size)).decode("utf-8-sig")


def _compressed(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(6)
    return start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"))
