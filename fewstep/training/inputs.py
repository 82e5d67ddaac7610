"""What a run reads, known by its contents: a resumed run goes on with the same teacher, prompts and data, or not.

``OUT/inputs.json`` holds a digest of every input (:mod:`fewstep.data.contents`). Where an input lies is of no account.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from diffusers import DiffusionPipeline

from fewstep.config.checks import names_of
from fewstep.config.run import RunConfig
from fewstep.data.cache_form import INDEX
from fewstep.data.conditions import read_prompts
from fewstep.data.contents import Contents, changed_folders, contents_of
from fewstep.data.durable import json_sha256, write_text_durably
from fewstep.data.fingerprint import memory_digests
from fewstep.data.latents import data_contents, read_data, refuse_unusable
from fewstep.data.shard_index import INDEX_FOLDER
from fewstep.data.targets import TARGETS
from fewstep.errors import UserError
from fewstep.reading import read_json
from fewstep.teachers.files import pipeline_files, pipeline_place
from fewstep.teachers.lora import lora_file
from fewstep.teachers.names import teacher_folder
from fewstep.teachers.source import CONFIGURATION
from fewstep.training import checkpoint

FILE = "inputs.json"
_FORMAT = "fewstep-inputs-1"
#: Settings that say which files of a teacher are meant, and are no inputs themselves.
_WHICH = frozenset({"revision", "subfolder", "variant", "teacher_variant"})
_IN_MEMORY = "teacher in memory"  # in the place of "teacher": its digests cannot be compared with those of files


def recorded_as(setting: str, in_memory: bool) -> str:
    """Under which name the digests of an input are kept; ``in_memory`` says whether the teacher was handed over so."""
    return _IN_MEMORY if in_memory and setting == "teacher" else setting


def read_inputs(out: Path) -> dict[str, Contents]:
    """The digests that were taken when the run in ``out`` began, by setting; none of a run that is new, or took none.

    Raises:
        UserError: they cannot be read.
    """
    try:
        kept = read_json(out / FILE)
        inputs, digest = dict(kept["inputs"]), kept["sha256"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out / FILE} cannot be read; choose another --out") from error
    if kept.get("format") != _FORMAT or digest != json_sha256(inputs):
        raise UserError(f"{out / FILE} is not what this version of fewstep writes; choose another --out")
    return inputs


class RunInputs:
    """The inputs of a run beside those that it began with.

    Args:
        config: of the run; its settings of the kind ``source`` name the inputs.
        pipeline: the teacher's, where it was handed over in memory.
    """

    def __init__(self, config: RunConfig, pipeline: DiffusionPipeline | None = None) -> None:
        self.config, self.pipeline, self.out = config, pipeline, Path(config.out)
        self.recorded = read_inputs(self.out)
        self.found: dict[str, Contents] = {}
        self._items: list[str] = []

    def check_here(self) -> str:
        """Look at those inputs that lie on this machine before anything is loaded.

        Images are read once, where the run did not begin with the same.

        Returns:
            One line for people where a run that was begun before took no digests of an input, else "".

        Raises:
            UserError: an input is not what the run began with, or an image cannot be read.
        """
        return self._check({name: value for name, value in self._given().items() if self._is_here(name, value)})

    def check_fetched(self, lora: Path | None, items: Sequence[str] = ()) -> str:
        """Look at those that the hub gave, once they are loaded: it may have given others than it did before.

        Args:
            lora: the file of the teacher's LoRA.
            items: what each item holds, as its key; only with the teacher it is known which columns are pictures.

        Returns and raises:
            As :meth:`check_here`.
        """
        fetched = {name: value for name, value in self._given().items() if not self._is_here(name, value)}
        fetched |= {"items": self.config.items or "of memory"} if items else {}
        self._items = list(items)
        return self._check(fetched, lora)

    def _given(self) -> dict[str, str]:
        values = {name: getattr(self.config, name) for name in sorted(names_of(type(self.config), "source") - _WHICH)}
        found = {name: value for name, value in values.items() if value is not None}
        if found.get("data") == TARGETS:  # they are known with their items
            del found["data"]
        return found

    def _is_here(self, name: str, value: str) -> bool:
        if name == "items":
            return False
        if name == "teacher_lora":
            return Path(value).exists()
        hub = name in ("teacher", "init") and teacher_folder(value) is None
        return not hub or (name == "teacher" and self.pipeline is not None)

    def _check(self, given: dict[str, str], lora: Path | None = None) -> str:
        begun, fresh, changed = (self.out / "config.yaml").exists(), [], []
        for name, value in given.items():
            key = recorded_as(name, self.pipeline is not None)
            contents = self._contents(name, value, self.recorded.get(key), lora)
            if not contents:
                continue
            self.found[key] = contents
            if key not in self.recorded:
                fresh.append(f"--{name}")
            elif folders := changed_folders(self.recorded[key], contents):
                changed.append(f"--{name} {value}{_listed(folders)}")
        if changed:
            raise UserError(
                f"--resume: {'; '.join(changed)} is not what it was when the run in {self.out} began; "
                f"put back what it was, or choose another --out{self._without_init(changed)}"
            )
        return f"the run began without digests of {', '.join(fresh)}: taken now" if begun and fresh else ""

    def write(self) -> None:
        """Keep the digests with the run."""
        inputs = {**self.recorded, **self.found}
        content = {"format": _FORMAT, "inputs": inputs, "sha256": json_sha256(inputs)}
        write_text_durably(self.out / FILE, json.dumps(content, indent=1) + "\n")

    def _without_init(self, changed: list[str]) -> str:
        alone = all(line.startswith("--init ") for line in changed)
        held = checkpoint.steps_in(self.out / "checkpoints")
        return ", or leave out --init: the checkpoint holds what came of it" if alone and held else ""

    def _contents(self, name: str, value: str, known: Contents | None, lora: Path | None) -> Contents:
        if name == "teacher" and self.pipeline is not None:
            return memory_digests(self.pipeline)
        if name == "prompts":
            prompts = read_prompts(value, self.config.data_text, self.out / INDEX_FOLDER)
            return {"": {"sha256": json_sha256(prompts)}}
        if name == "items":
            return {"": {"sha256": json_sha256(self._items)}}
        if name == "data":
            return self._images(value, known)
        if name == "teacher_lora":
            file = lora or lora_file(value)
            return contents_of(file, [file], known)
        if name == "teacher":
            # Of a method whose own setting is called variant, that of the teacher's files has another name.
            variant = getattr(self.config, "teacher_variant" if hasattr(self.config, "teacher_variant") else "variant")
            return _pipeline(pipeline_place(value, self.config.revision, self.config.subfolder), known, variant)
        if name == "init" and not (Path(value) / "checkpoints").is_dir():
            return _pipeline(pipeline_place(value), known)
        return contents_of(Path(value), _files(name, Path(value)), known)

    def _images(self, source: str, known: Contents | None) -> Contents:
        images = read_data(source, self.config.data_text, self.out / INDEX_FOLDER, progress=True)
        if known is None:
            refuse_unusable(images, progress=True)
        return data_contents(images, source, known)


def _pipeline(place: Path | None, known: Contents | None, variant: str | None = None) -> Contents:
    """Those of a pipeline's files; of a single file also those of the configuration that lies beside it."""
    if place is None:
        return {}
    if not place.is_file():
        return contents_of(place, pipeline_files(place, variant), known)
    beside = [file for file in pipeline_files(place.parent) if file.suffix in CONFIGURATION]
    return {**contents_of(place.parent, beside, known), "the single file": contents_of(place, [place])[""]}


def _files(name: str, place: Path) -> list[Path]:
    """The files that decide what an input is; none of what is not there, which its reader says."""
    if name == "init":  # the state of another run's newest checkpoint has the digests of the others
        return [checkpoint.find_latest(place / "checkpoints").folder / "state.json"]
    if name == "cache":
        return [file for file in (place / INDEX,) if file.is_file()]  # it has the others' digests
    return sorted(file for file in place.glob("*") if file.name == "about.json" or file.match("shard_*"))


def _listed(folders: list[str]) -> str:
    named = [folder or "the folder itself" for folder in folders]
    more = ", ..." if len(named) > 5 else ""
    return f" ({', '.join(named[:5])}{more})" if folders != [""] else ""
