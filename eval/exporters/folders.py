"""Layouts of one picture a file: GenEval's, GenEval 2's, ImageReward's and HPSv3's."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from fewstep.eval.exporters.samples import Places, Sample, write_png


def geneval(samples: Iterable[Sample], folder: Path, places: Places, final: Path, model: str) -> list[str]:
    """GenEval (arXiv 2310.11513): ``00000/metadata.jsonl`` with the prompt's own line, ``00000/samples/00000.png``, ...

    Its reader takes folders whose names are digits, and as many pictures as are there; the paper uses four.
    """
    for item, number, sample in places.place(samples):
        place = folder / item.key
        write_png(sample, place / "samples" / f"{number:05d}.png")
        if number == 0:
            (place / "metadata.jsonl").write_text(json.dumps(dict(item.record)), encoding="utf-8")
    return [f"evaluation/evaluate_images.py {final}", *places.notes()]


def geneval2(samples: Iterable[Sample], folder: Path, places: Places, final: Path, model: str) -> list[str]:
    """GenEval 2 (arXiv 2512.16853): ``images/`` and ``image_paths.json``, which names a picture for each prompt.

    The prompts are in the benchmark's own words and the paths absolute, because its reader looks up both as they are.
    It takes one picture of a prompt: the first.
    """
    paths: dict[str, str] = {}
    for item, number, sample in places.place(samples):
        if number == 0:
            write_png(sample, folder / "images" / f"{item.key}.png")
            paths[item.prompt] = str((final / "images" / f"{item.key}.png").absolute())
    _write_json(folder / "image_paths.json", paths)
    notes = [f"evaluation.py --image_filepath_data {final / 'image_paths.json'}", *places.notes()]
    if (most := max(places.counts.values(), default=0)) > 1:
        notes.append(f"of up to {most} samples of a prompt GenEval 2 takes the first")
    return notes


def imagereward(samples: Iterable[Sample], folder: Path, places: Places, final: Path, model: str) -> list[str]:
    """ImageReward's benchmark (arXiv 2304.05977): ``generations/MODEL/ID_0.png``, ... and ``prompts.json``.

    Its reader divides the number of files by that of the prompts, so every prompt has equally many: as many as the one
    with the fewest. Prompts without samples are left out of the list.
    """
    pictures = folder / "generations" / model
    for item, number, sample in places.place(samples):
        write_png(sample, pictures / f"{item.key}_{number}.png")
    sampled = [item for item in places.items if places.counts[item.key]]
    fewest = min((places.counts[item.key] for item in sampled), default=0)
    more = 0
    for item in sampled:
        for number in range(fewest, places.counts[item.key]):
            (pictures / f"{item.key}_{number}.png").unlink()
            more += 1
    _write_json(folder / "prompts.json", [{"id": item.key, "prompt": item.prompt} for item in sampled])
    command = f"test-benchmark.py --model {model} --prompts_path {final / 'prompts.json'}"
    notes = [f"{command} --img_dir {final / 'generations'}", *places.notes()]
    return notes + ([f"{more} samples beyond {fewest} for each prompt are left out"] if more else [])


def hpsv3(samples: Iterable[Sample], folder: Path, places: Places, final: Path, model: str) -> list[str]:
    """HPSv3 (arXiv 2508.03789): ``MODEL/00000.png`` and its prompt beside it in ``MODEL/00000.txt``."""
    for item, _, sample in places.place(samples):
        path = folder / model / f"{sample.index:05d}.png"
        write_png(sample, path)
        path.with_suffix(".txt").write_text(item.prompt, encoding="utf-8")
    return [f"evaluate/benchmark.py --image_folders {final / model}"]


def _write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
