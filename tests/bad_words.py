"""Bad names, values and tables for every command and function; see :mod:`tests.bad_inputs`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fewstep
from fewstep.eval import evaluate
from tests.bad_files import DISTIL, DISTIL_SD, REAL, SAMPLE, named
from tests.bad_inputs import Bad, edited


def names() -> Iterator[Bad]:
    """Files where folders should be, the other way round, links to nowhere, and names that are none."""

    def link(case: Path, place: Path) -> None:
        (case / "x").symlink_to(case / "nowhere")

    def ring(case: Path, place: Path) -> None:
        (case / "x").symlink_to(case / "y")
        (case / "y").symlink_to(case / "x")

    def taken(case: Path, place: Path) -> None:
        (case / "out").mkdir()
        (case / "out" / "thesis.tex").write_text("precious")

    def file_there(case: Path, place: Path) -> None:
        (case / "out").write_text("precious")

    for kind, make in {
        "a dangling link": link,
        "links in a ring": ring,
        "missing": _nothing,
        "an empty folder": _mkdir,
    }.items():
        for name, words in {
            "teacher": ("probe", "{case}/x"),
            "plan": ("plan", "{case}/x"),
            "student": SAMPLE,
            "student of eval": ("eval", "{case}/x", "--out", "{case}/out"),
            "--data": (*DISTIL, *REAL),
            "--config": ("distill", "dmd2", "--config", "{case}/x"),
            "--prompts": (*DISTIL_SD, "--prompts", "{case}/x"),
        }.items():
            yield Bad(f"{name}: {kind}", words, "", make)
    cache = ("cache", "--teacher", "{place}/sd", "--prompts", "{place}/prompts.txt", "--out", "{case}/out", "--cpu")
    pairs = ("pairs", "--teacher", "{place}/ddim", "--num", "1", "--teacher_steps", "1", "--out", "{case}/out", "--cpu")
    for name, words in {"distill": DISTIL, "cache": cache, "pairs": pairs}.items():
        yield Bad(f"{name} --out: somebody's folder", words, "not empty", taken)
        yield Bad(f"{name} --out: a file", words, "out", file_there)
    yield Bad("eval --out: a file", ("eval", "{place}/student", "--out", "{case}/out"), "cannot write", file_there)
    yield Bad("demo --out: somebody's folder", ("demo", "--out", "{case}/out"), "not empty", taken)
    yield Bad("--out: a name that is too long", (*DISTIL, "--out", "{case}/" + "x" * 300), "too long")
    yield Bad("--out: no name", (*DISTIL, "--out", ""), "--out")
    odd = "{case}/a\nb\x1b[31m"
    yield Bad("a name with an end of line", ("probe", odd), r"a\\nb\\x1b", lambda case, place: None)
    yield Bad("--out with an end of line", (*DISTIL, "--out", odd, "--prompts", "{case}/nowhere"), "nowhere")
    yield Bad("--subfolder that leads out", ("probe", "{place}/ddim", "--subfolder", "../nowhere"), "nowhere")
    yield Bad("--revision of a folder", ("probe", "{place}/ddim", "--revision", "main"), "--revision")
    yield Bad("--variant that is not there", ("probe", "{place}/ddim", "--variant", "fp16"), "fp16")
    yield Bad("a teacher that is a pickle", ("probe", "{case}/x.ckpt"), "not opened", named("x.ckpt", b"\x80\x04N."))
    lora = (*DISTIL, "--teacher_lora", "{case}/x.bin")
    yield Bad("a LoRA that is a pickle", lora, "not opened", named("x.bin", b"\x80\x04N."))
    for out in ("{case}/x.jpg", "{case}/prompts/x.png", "{place}/images"):
        yield Bad(f"sample --out {out}", ("sample", "{place}/student", "--out", out), "", named("prompts", b""))


def values() -> Iterator[Bad]:
    """Values of the commands that have no class of settings, and of functions that are called from Python."""
    sample = ("sample", "{place}/student", "--out", "{case}/x.png")
    for flag in (
        "--num=0",
        "--num=-1",
        "--num=1" + "0" * 12,
        "--steps=0",
        "--steps=1" + "0" * 12,
        "--steps=x",
        "--seed=x",
    ):
        yield Bad(f"sample {flag}", (*sample, flag), flag.partition("=")[0][2:])
    yield Bad("sample --class", (*sample, "--class", "3"), "unconditional")
    yield Bad("sample --prompt", (*sample, "--prompt", "x"), "unconditional")
    yield Bad("sample --base", (*sample, "--base", "x"), "base")
    eval_ = ("eval", "{place}/student", "--out", "{case}/out")
    for flag in (
        "--num=0",
        "--num=x",
        "--steps=",
        "--steps=0",
        "--steps=1,,2",
        "--steps=9999999",
        "--teacher_steps=x",
        "--dtype=load",
        "--batch_size=-1",
        "--seed=x",
        "--teacher_call=[1]",
        "--num=1" + "0" * 30,
        "--metrics=cat",
        "--metrics=",
        "--metrics=fid,,cat",
        "--reference=teacher",
        "--reference={case}/nowhere",
        "--preset=cat",
        "--fid_mode=cat",
        "--clip_model=cat",
        "--images=some",
        "--export=cat",
        "--weights_sha256=[1]",
    ):
        yield Bad(f"eval {flag}", (*eval_, flag), flag.partition("=")[0][2:])
    yield Bad("eval --train_data", (*eval_, "--train_data", "{case}/x"), "{case}/x is not a folder")
    yield Bad("eval of two minds", (*eval_, "--classes", "0-3", "--unconditional"), "give one of them")
    yield Bad("eval of a preset that is changed", (*eval_, "--preset", "in64-50k", "--num", "8"), "fixes num")
    yield Bad("eval of nothing", ("eval", "--out", "{case}/out"), "")
    yield Bad("eval --teacher", (*eval_, "--teacher", "{case}/x"), "x")
    for flag in ("--num=0", "--num=x", "--steps=0", "--max_steps=0", "--seed=x", "--teacher=cat", "--steps=99999"):
        yield Bad(f"demo {flag}", ("demo", "--out", "{case}/out", flag), flag.partition("=")[0][2:])
    for memory in ("", "x", "0GB", "-1GB", "nanGB", "9" * 400, "1e400", "24 zettabytes"):
        yield Bad(f"plan --memory={memory[:9]}", ("plan", "{place}/ddim", "dmd2", f"--memory={memory}"), "--memory")
    yield Bad("plan of no method", ("plan", "{place}/ddim", "dmd9"), "dmd9")
    for call in ("[1]", "{", "3", '{"a": 1, "a": 2}', '{"heigth": 8}', '{"num_inference_steps": "x"}', '{"eta": NaN}'):
        yield Bad(f"probe --call {call}", ("probe", "{place}/ddim", "--call", call), "")
    cache = ("cache", "--teacher", "{place}/sd", "--out", "{case}/out", "--cpu", "--prompts", "{place}/prompts.txt")
    for flags in (
        ("--shard_size", "0"),
        ("--shard_size", "x"),
        ("--shard_size", "1" + "0" * 30),
        ("--classes", "1"),
        ("--x",),
    ):
        yield Bad(
            f"cache {' '.join(flags)[:30]}",
            (*cache, *flags),
            flags[0][2:] if flags[0] != "--classes" else "several",
        )
    for words in (
        (),
        ("nonsense",),
        ("distill",),
        ("distill", "dmd9"),
        ("distill", "../dmd2"),
        ("distill", "_sid_config"),
    ):
        if words:
            yield Bad(
                f"fewstep {' '.join(words)}", words, words[-1] if len(words) > 1 or words[0] != "distill" else "method"
            )
    out = {"teacher": "x", "out": "y"}
    for name, settings in {
        "a text for a number": {"steps": "4"},
        "a list for a text": {"prompts": ["a"]},
        "nothing for a number": {"lr": None},
        "a number for a switch": {"cpu": 1},
        "a switch for a number": {"steps": True},
        "no number": {"lr": float("nan")},
        "a table with other names than texts": {"call": {1: 2}},
        "text that no file holds": {"negative_prompt": "\udcff"},
        "a null character": {"prompts": "a\0b"},
        "a number without end": {"batch_size": 10**5000},
        "an unknown setting": {"stepz": 4},
    }.items():
        yield Bad(
            f"distill() of {name}", says="", call=lambda case, place, told=settings: fewstep.distill(**out, **told)
        )
    calls: dict[str, Callable[[Path, Path], Any]] = {
        "load of a number": lambda case, place: fewstep.load(3),  # type: ignore[arg-type]
        "load of no folder": lambda case, place: fewstep.load(case / "x"),
        "load of a teacher": lambda case, place: fewstep.load(place / "ddim"),
        "make_pairs of nothing": lambda case, place: fewstep.make_pairs("x", out="y"),
        "make_pairs of a text": lambda case, place: fewstep.make_pairs("x", out="y", num="3"),
        "cache of no shards": lambda case, place: fewstep.cache("x", "y", shard_size=-1),
        "cache of a text": lambda case, place: fewstep.cache("x", "y", shard_size="3"),  # type: ignore[arg-type]
        "evaluate of a text": lambda case, place: evaluate([str(place / "student")], num="3", out=case / "out"),
        "evaluate of an option": lambda case, place: evaluate([str(place / "student")], nums=3),
        "plan of a text": lambda case, place: fewstep.plan(str(place / "ddim"), batch_size="3"),
    }
    for name, call in calls.items():
        yield Bad(name, call=call)


def students() -> Iterator[Bad]:
    """A ``fewstep.json`` that is a table, and says what it must not: it comes from whoever made the student."""
    for name, change in {
        "call that is a list": {"call": []},
        "steps that are a text": {"steps": "4"},
        "steps without end": {"steps": 10**12},
        "counts that are no list": {"counts": 3},
        "code of its own": {"load": {"custom_pipeline": "x", "trust_remote_code": True}},
        "another base's files": {"base_files": {"trust_remote_code": "x"}},
        "a base that is no text": {"base_model": 3},
        "relatives that are none": {"related": {"DDIMPipeline": {}}},
        "training that is no table": {"training": [1]},
        "a LoRA elsewhere": {"lora": {"file": "../../x.safetensors"}, "component": "unet", "base_model": "fashion-sd"},
        "a LoRA at a root": {"lora": {"file": "/x.safetensors"}, "component": "unet", "base_model": "fashion-sd"},
        "a LoRA of nothing": {"lora": {}, "component": "unet", "base_model": "fashion-sd"},
    }.items():
        yield Bad(
            f"fewstep.json with {name}",
            SAMPLE,
            "",
            edited("student", "fewstep.json", lambda about, c=change: about | c),
        )
    for name, change in {
        "a module of Python": {"unet": ["subprocess", "Popen"]},
        "a path": {"unet": ["../../x", "X"]},
        "no class": {"_class_name": "Nothing"},
        "a class of its own": {"_class_name": ["x", "X"]},
        "a part above it": {"../x": ["diffusers", "UNet2DModel"]},
        "a part without a folder": {"vae": ["diffusers", "AutoencoderKL"]},
        "a part that is a number": {"unet": 3},
    }.items():
        make = edited("ddim", "model_index.json", lambda index, c=change: index | c)
        for command in ("probe", "plan"):
            yield Bad(f"{command}: model_index.json with {name}", (command, "{case}/x"), "", make)


def _nothing(case: Path, place: Path) -> None:
    """Makes nothing."""


def _mkdir(case: Path, place: Path) -> None:
    (case / "x").mkdir()
