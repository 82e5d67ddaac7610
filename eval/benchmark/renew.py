"""Bind the kept results to rewritten files of an embedded teacher, once it is proved that they compute the same.

    python -m fewstep.eval.benchmark.renew --before DIR

A result is bound to its teacher by the digest of the teacher's files, so that other weights make it stale. Where only
the form of the files has changed, nothing needs to be trained again: this shows it, to the bit, and writes the new
digest into the results. ``DIR`` is the data folder as it was, with its manifest, as
``git archive REVISION fewstep/fashion/data | tar x -C SOMEWHERE`` gives it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from fewstep.config.parsing import Parser, parse
from fewstep.data.durable import write_text_durably
from fewstep.errors import UserError, one_line
from fewstep.eval.benchmark.cell_results import RESULTS, Result
from fewstep.eval.benchmark.cells import digest
from fewstep.fashion import PROMPTS, TEACHERS
from fewstep.fashion.files import DATA, MANIFEST, sha256
from fewstep.fashion.items import inpainting_items

#: What of a part's configuration says how it was saved, or how long its table of positions is: not what it computes.
_FORM = frozenset({"transformers_version", "_diffusers_version", "_name_or_path", "max_position_embeddings"})
_POSITIONS = "position_embedding.weight"
_WORDS = (*PROMPTS, "", "Zebra 7", "a photo of a very long and quite unknown sort of footwear")


def renew(before: Path, after: Path, results: Path) -> list[Path]:
    """Prove every teacher whose files differ the same, then write the new digests. Returns the files written.

    Args:
        before: the data folder that the results belong to.
        after: the data folder as it is.
        results: folder of what is kept of cells.

    Raises:
        UserError: a folder has no manifest, or a teacher does not compute what it did; nothing is written then.
    """
    old, new = _digests(before), _digests(after)
    renewed = {old[name]: new[name] for name in old if old[name] != new[name]}
    for name in old:
        if old[name] != new[name] and (difference := next(differences(before / name, after / name, name), None)):
            raise UserError(f"{name} is another teacher than the one in {before}: {difference}")
    written = []
    for path in sorted(results.glob("*.json")):
        result = Result(**json.loads(path.read_text(encoding="utf-8")))
        theirs = result.content["teacher"]
        if theirs["files"] not in renewed or digest(result.content) != result.hash:
            continue
        content = {**result.content, "teacher": {**theirs, "files": renewed[theirs["files"]]}}
        write_text_durably(
            path, json.dumps(asdict(replace(result, content=content, hash=digest(content))), indent=1) + "\n"
        )
        written.append(path)
    return written


def differences(before: Path, after: Path, name: str) -> Iterator[str]:
    """Where two folders of one embedded teacher do not compute the same, to the bit; nothing where they do.

    Compared are parts and their configurations, all weights (a table of positions may have become longer), what the
    tokenizers make of prompts, what encoders with such a table make of every length of tokens, and pictures of the
    stated call.
    """
    old, new = (DiffusionPipeline.from_pretrained(folder) for folder in (before, after))
    if type(old) is not type(new) or old.components.keys() != new.components.keys():
        yield "its pipeline has other parts"
        return
    for part, was in old.components.items():
        yield from (f"{part} {what}" for what in _part_differences(was, new.components[part]))
    for steps in (2, TEACHERS[name].steps):
        if not torch.equal(*(_pictures(pipeline, name, steps) for pipeline in (old, new))):
            yield f"its pictures at {steps} steps differ"


def _part_differences(old: Any, new: Any) -> Iterator[str]:
    if type(old) is not type(new):
        yield f"was {type(old).__name__} and is {type(new).__name__}"
        return
    if hasattr(old, "get_vocab"):
        if [old(word).input_ids for word in _WORDS] != [new(word).input_ids for word in _WORDS]:
            yield "tokenizes otherwise"
        if old.model_max_length != new.model_max_length:
            yield "cuts at another length"
        return
    if hasattr(old, "config") and _settings(old) != _settings(new):
        yield "is configured otherwise"
    if isinstance(old, nn.Module):
        yield from _weight_differences(old.state_dict(), new.state_dict())
        if hasattr(old.config, "max_position_embeddings"):
            yield from _encoding_differences(old, new)


def _settings(part: Any) -> dict[str, Any]:
    config = part.config.to_dict() if hasattr(part.config, "to_dict") else dict(part.config)
    return {name: value for name, value in config.items() if name not in _FORM}


def _weight_differences(old: dict[str, torch.Tensor], new: dict[str, torch.Tensor]) -> Iterator[str]:
    if old.keys() != new.keys():
        yield "has other weights"
        return
    for name, weight in old.items():
        same = new[name][: len(weight)] if name.endswith(_POSITIONS) else new[name]
        if weight.dtype != same.dtype or not torch.equal(weight, same):
            yield f"has another {name}"


def _encoding_differences(old: Any, new: Any) -> Iterator[str]:
    """Tokens at random, at every length that both encoders have positions for."""
    generator = torch.Generator().manual_seed(0)
    for length in range(1, min(old.config.max_position_embeddings, new.config.max_position_embeddings) + 1):
        tokens = torch.randint(old.config.vocab_size, (4, length), generator=generator)
        with torch.no_grad():
            answers = [encoder(tokens, output_hidden_states=True) for encoder in (old, new)]
        if not all(torch.equal(was, now) for was, now in zip(*map(_tensors, answers), strict=True)):
            yield f"encodes {length} tokens otherwise"


def _tensors(answer: Any) -> list[torch.Tensor]:
    """All hidden states of an encoder's answer, and what else it says."""
    return [tensor for value in answer.values() for tensor in (value if isinstance(value, tuple) else (value,))]


def _pictures(pipeline: Any, name: str, steps: int) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    called = {"num_inference_steps": steps, "guidance_scale": TEACHERS[name].guidance_scale, "generator": generator}
    items = inpainting_items(len(PROMPTS)) if TEACHERS[name].looks else []
    shown = {argument: [item.arguments[argument] for item in items] for item in items[:1] for argument in item.pictures}
    images: torch.Tensor = pipeline(list(PROMPTS), output_type="pt", **shown, **called).images
    return images


def _digests(data: Path) -> dict[str, str]:
    """The digest of the files of each teacher that is there, as results name it."""
    try:
        named = {path: about["sha256"] for path, about in json.loads((data / MANIFEST).read_text())["files"].items()}
        differing = [path for path, expected in named.items() if sha256(data / path) != expected]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{data} is no data folder with a manifest of its files: {one_line(error)}") from error
    if differing:
        raise UserError(f"{data / differing[0]} is not the file that the manifest names")
    theirs = {name: {path: its for path, its in named.items() if path.startswith(f"{name}/")} for name in TEACHERS}
    return {name: digest(its) for name, its in theirs.items() if its}


def main(words: Sequence[str] | None = None) -> int:
    """The command line of this file. Returns the exit code."""
    parser = Parser(prog="python -m fewstep.eval.benchmark.renew", description=__doc__)
    parser.add_argument("--before", type=Path, required=True, help="the data folder that the results belong to")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of what is kept of finished cells")
    try:
        asked = parse(parser, sys.argv[1:] if words is None else words)
        written = renew(asked.before, DATA, asked.results)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"the teachers compute what they did: {len(written)} results bound to their new files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
