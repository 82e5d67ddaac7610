"""Bad files, folders and names for every command; see :mod:`tests.bad_inputs`.

The good ones, which :func:`make_place` makes once: ``ddim``, ``sd``, ``editor`` and ``filler``, teachers of which the
last two look at pictures; ``run`` of ``ddim`` with its
``student``; ``prompts.txt`` and ``images``.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from fewstep.cli import main
from fewstep.data.condition_cache import ConditionCache
from fewstep.data.durable import json_sha256
from fewstep.data.shards import read_about
from fewstep.eval.report import Report
from fewstep.training.checkpoint import find_latest
from fewstep.training.counters import counters
from tests.bad_inputs import NO_TABLES, NO_TENSORS, NO_YAML, Bad, copied, spoilt
from tests.item_sets import tiny_editor, tiny_filler
from tests.tiny_pipelines import tiny_ddim, tiny_stable_diffusion

TRAIN = ("--max_steps", "1", "--batch_size", "1", "--steps", "2", "--cpu", "--report_to", "none", "--sample_steps", "0")
DISTIL = ("distill", "dmd2", "--teacher", "{place}/ddim", "--out", "{case}/out", *TRAIN)
DISTIL_SD = ("distill", "dmd2", "--teacher", "{place}/sd", "--out", "{case}/out", *TRAIN)
REAL = ("--gan_weight", "1e-3", "--data", "{case}/x")
RESUME = ("distill", "dmd2", "--teacher", "{place}/ddim", "--out", "{case}/x", *TRAIN, "--resume", "--max_steps", "2")
EVAL = ("eval", "{place}/student", "--out", "{case}/out")
SAMPLE = ("sample", "{case}/x", "--out", "{case}/x.png")


def make_place(place: Path) -> None:
    """The good inputs."""
    tiny_ddim().save_pretrained(place / "ddim")
    tiny_stable_diffusion().save_pretrained(place / "sd")
    tiny_editor().save_pretrained(place / "editor")
    tiny_filler().save_pretrained(place / "filler")
    (place / "prompts.txt").write_text("the cat\n")
    (place / "images").mkdir()
    for number in range(2):
        Image.new("RGB", (8, 8), (90 * number, 0, 0)).save(place / "images" / f"{number}.png")
    words = ["distill", "dmd2", "--teacher", str(place / "ddim"), "--out", str(place / "run"), *TRAIN]
    assert main(words) == 0
    (place / "run" / "student").rename(place / "student")


def files() -> Iterator[Bad]:
    """Every file that a command reads, in every state in which it is none."""
    for kind, content in NO_TABLES.items():
        if kind != "with a name twice":  # of which diffusers reads the last
            for command, words in {"probe": ("probe", "{case}/x"), "plan": ("plan", "{case}/x", "--cpu")}.items():
                make = spoilt("ddim", "model_index.json", content)
                yield Bad(f"{command}: model_index.json {kind}", words, "{case}/x", make)
            make = spoilt("ddim", "scheduler/scheduler_config.json", content)
            if kind not in ("nested too deep",):
                yield Bad(f"scheduler_config.json {kind}", ("probe", "{case}/x"), "{case}/x", make)
            yield Bad(
                f"unet/config.json {kind}",
                ("probe", "{case}/x"),
                "{case}/x",
                spoilt("ddim", "unet/config.json", content),
            )
        yield Bad(f"fewstep.json {kind}", SAMPLE, "fewstep.json", spoilt("student", "fewstep.json", content))
        yield Bad(f"inputs.json {kind}", RESUME, "inputs.json", spoilt("run", "inputs.json", content))
        state = spoilt("run/checkpoints/step_00000001", "state.json", content)
        yield Bad(f"state.json {kind}", make=state, says="state.json", call=_checkpoint)
        yield Bad(f"index.json of a cache {kind}", make=_file("index.json", content), says="damaged", call=_cache)
        yield Bad(
            f"about.json of pairs {kind}", make=_file("about.json", content), says="about.json|holds None", call=_pairs
        )
        yield Bad(f"report.json {kind}", make=_file("report.json", content), says="report", call=_report)
        words = ("compare", "{case}/x", "{place}/images", "--out", "{case}/out")
        yield Bad(f"compare: report.json {kind}", words, "report.json is no report", _file("report.json", content))
    for kind, content in NO_YAML.items():
        config = ("distill", "dmd2", "--config", "{case}/c.yaml", *DISTIL[2:])
        yield Bad(f"--config {kind}", config, "", named("c.yaml", content))
        if not kind.startswith(("with aliases", "cut")):
            yield Bad(f"config.yaml of a run {kind}", RESUME, "config.yaml", spoilt("run", "config.yaml", content))
    for kind, content in NO_TENSORS.items():
        teacher = spoilt("ddim", "unet/diffusion_pytorch_model.safetensors", content)
        yield Bad(f"weights of a teacher {kind}", ("probe", "{case}/x"), "{case}/x", teacher)
        single = ("probe", "{case}/x.safetensors")
        yield Bad(f"a single file {kind}", single, "x.safetensors", named("x.safetensors", content))
    for kind in ("empty", "cut short", "that has other tensors"):
        lora = ("probe", "{place}/sd"), named("x.safetensors", NO_TENSORS[kind])
        words = ("cache", "--teacher", "{place}/sd", "--prompts", "{place}/prompts.txt", "--out", "{case}/out", "--cpu")
        yield Bad(f"--teacher_lora {kind}", (*words, "--teacher_lora", "{case}/x.safetensors"), "teacher_lora", lora[1])
        weights = spoilt("run/checkpoints/step_00000001", "student.safetensors", NO_TENSORS[kind])
        yield Bad(f"a checkpoint's weights {kind}", make=weights, says="student.safetensors", call=_checkpoint)


def data() -> Iterator[Bad]:
    """Prompts, images and what lies about them."""
    for kind, content in {
        "missing": None,
        "empty": b"",
        "of blanks": b" \n \r\n",
        "in another encoding": "café".encode("latin-1"),
        "in UTF-16": "a cat\n".encode("utf-16"),
    }.items():
        for command in (DISTIL_SD, ("cache", "--teacher", "{place}/sd", "--out", "{case}/out", "--cpu")):
            words = (*command, "--prompts", "{case}/p.txt")
            yield Bad(f"{command[0]} --prompts {kind}", words, "--prompts", named("p.txt", content))
        words = (*EVAL, "--prompts", "{case}/p.txt")
        yield Bad(f"eval --prompts {kind}", words, "--prompts", named("p.txt", content))
    yield Bad("--prompts that is a folder", (*DISTIL_SD, "--prompts", "{place}/images"), "--prompts")
    for text in ("x", "9-0", "-1", "1.5", "0-", "0-99999999999", "9" * 5000, ",".join(["0-999998"] * 3)):
        yield Bad(f"--classes {text[:20]}", (*EVAL, f"--classes={text}"), "--classes")
    png = _png()
    for kind, content in {
        "empty": b"",
        "a text": b"not an image",
        "cut short": png[:40],
        "with a broken block": png[:-30] + bytes(30),
        "of no size": _png(width=0),
        "of too many pixels": _png(width=2**20, height=2**20),
        "a program for printers": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n",
        "a picture of pictures": b"II*\x00\x08\x00\x00\x00\x00\x00",
    }.items():
        yield Bad(f"an image {kind}", (*DISTIL, *REAL), "a.png", _image(content))
    for kind, line in {
        "that is no JSON": "{",
        "that is a list": "[]",
        "nested too deep": "[" * 100_000,
        "without a file": '{"text": "a"}',
        "whose file is missing": '{"file_name": "b.png", "text": "a"}',
        "whose file is a number": '{"file_name": 3, "text": "a"}',
        "whose file has a null character": '{"file_name": "a\\u0000.png", "text": "a"}',
        "whose text is a number": '{"file_name": "a.png", "text": 3}',
        "whose label is a text": '{"file_name": "a.png", "label": "x"}',
        "whose label is half": '{"file_name": "a.png", "label": 0.5}',
        "whose label is not finite": '{"file_name": "a.png", "label": Infinity}',
        "with a name twice": '{"file_name": "a.png", "text": "a", "text": "b"}',
    }.items():
        yield Bad(f"metadata.jsonl {kind}", (*DISTIL, *REAL), "metadata.jsonl, line 1", _metadata(line))
    for kind, content in {
        "empty": b"",
        "cut short": struct.pack(">HBB", 0, 8, 3) + struct.pack(">3I", 2, 28, 28) + bytes(9),
        "of more pixels than there are": struct.pack(">HBB", 0, 8, 3) + struct.pack(">3I", 2**31, 2**31, 4),
        "of another kind": struct.pack(">HBB", 0, 13, 1) + struct.pack(">I", 1) + bytes(4),
    }.items():
        yield Bad(f"idx files {kind}", (*DISTIL, *REAL), "idx", _folder("train-images-idx3-ubyte", content))
    yield Bad("idx files that are no gzip", (*DISTIL, *REAL), "idx", _folder("train-images-idx3-ubyte.gz", b"1234"))


def _cache(case: Path, place: Path) -> Any:
    return ConditionCache(case / "x")


def _pairs(case: Path, place: Path) -> Any:
    return read_about(case / "x", "fewstep-pairs-3", "fewstep pairs")


def _checkpoint(case: Path, place: Path) -> Any:
    (case / "x").rename(case / "step_00000001")
    try:
        return counters(find_latest(case))
    finally:
        (case / "step_00000001").rename(case / "x")


def _report(case: Path, place: Path) -> Any:
    return Report.load(case / "x" / "report.json")


def forged() -> Iterator[Bad]:
    """Tables whose digests agree, because anybody can make a digest, and that say what cannot be."""
    entry = {"file": "shard_00000.safetensors", "bytes": 1, "sha256": "0", "items": 1}
    index = {
        "format": "fewstep-cache-2", "kind": "prompt", "items": 1, "items_sha256": "0", "shard_size": 1, "teacher": "t",
        "fingerprint": {}, "negative": None, "shards": [entry],
    }  # fmt: skip
    for name, change in {
        "no shards": {"shards": 3},
        "shards of no size": {"shard_size": 0},
        "a shard that is no table": {"shards": [3]},
        "a shard elsewhere": {"shards": [entry | {"file": "../../x"}]},
        "a shard at a root": {"shards": [entry | {"file": "/x"}]},
        "a number of items that is none": {"items": "1"},
    }.items():
        content = index | change
        text = json.dumps(content | {"sha256": json_sha256(content)}).encode()
        yield Bad(f"a cache with {name}", make=_file("index.json", text), says="damaged", call=_cache)
    state: dict[str, Any] = {"step": 1, "files": {}, "method": "dmd2", "processes": 1, "renewed_at": {}}
    for name, content in {
        "no counters": {"step": 1, "files": {}},
        "a method that is no name": state | {"method": None},
        "no process": state | {"processes": 0},
        "a batch of no samples": state | {"batch": {"samples": 0, "given": [1, 1]}},
        "a batch that is half a sample": state | {"batch": {"samples": 0.5, "given": [1, 1]}},
    }.items():
        text = json.dumps(content | {"sha256": json_sha256(content)}).encode()
        yield Bad(f"a checkpoint with {name}", make=_file("state.json", text), says="state.json", call=_checkpoint)
    about: dict[str, Any] = {"format": "fewstep-pairs-3", "num": 1, "shard_size": 1}
    for name, change in {
        "no rows": {"num": 0},
        "shards of no size": {"shard_size": 0},
        "half a row": {"num": 0.5},
    }.items():
        content = about | change
        text = json.dumps(content | {"sha256": json_sha256(content)}).encode()
        yield Bad(f"pairs with {name}", make=_file("about.json", text), says="about.json", call=_pairs)


def named(name: str, content: bytes | None) -> Callable[[Path, Path], None]:
    """Makes {case}/name, unless it holds nothing."""

    def make(case: Path, place: Path) -> None:
        if content is not None:
            (case / name).write_bytes(content)

    return make


def _file(name: str, content: bytes) -> Callable[[Path, Path], None]:
    def make(case: Path, place: Path) -> None:
        (case / "x").mkdir()
        (case / "x" / name).write_bytes(content)

    return make


def _image(content: bytes) -> Callable[[Path, Path], None]:
    def make(case: Path, place: Path) -> None:
        copied(place / "images", case / "x")
        (case / "x" / "a.png").write_bytes(content)

    return make


def _metadata(line: str) -> Callable[[Path, Path], None]:
    def make(case: Path, place: Path) -> None:
        copied(place / "images", case / "x")
        (case / "x" / "0.png").rename(case / "x" / "a.png")
        (case / "x" / "metadata.jsonl").write_text(line + "\n")

    return make


def _folder(name: str, content: bytes) -> Callable[[Path, Path], None]:
    def make(case: Path, place: Path) -> None:
        (case / "x").mkdir()
        (case / "x" / name).write_bytes(content)
        (case / "x" / name.replace("images-idx3", "labels-idx1")).write_bytes(content)

    return make


def _png(width: int = 8, height: int = 8) -> bytes:
    """A PNG file of 8 x 8 pixels, whose header may claim others."""
    import io
    import zlib

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(buffer, "PNG")
    whole = bytearray(buffer.getvalue())
    whole[16:24] = struct.pack(">II", width, height)
    whole[29:33] = struct.pack(">I", zlib.crc32(bytes(whole[12:29])))
    return bytes(whole)
