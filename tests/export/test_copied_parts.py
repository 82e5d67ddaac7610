"""Parts that were not trained lie in a student's folder as they lie in the teacher's, where they are still the same."""

import json
import shutil

import pipeline_folder
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny_pipelines import tiny_stable_diffusion

from fewstep.export import export_student, plan_student
from fewstep.export.copied_parts import save_pipeline
from fewstep.export.part_files import part_folders
from fewstep.fashion import teacher_path
from fewstep.recording import record

UNTRAINED = ("tokenizer", "text_encoder", "vae")


@pytest.fixture
def teacher(tmp_path):
    """A teacher's folder, whose files tell that they are its own: with spaces, and a vocabulary for old readers."""
    folder = tmp_path / "place" / "teacher"
    tiny_stable_diffusion().save_pretrained(folder)
    for path in folder.glob("*/*config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()), indent=7))
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    return folder


def written(pipeline, out):
    """The pipeline's folder with a network and a scheduler of its own, as an export writes it before all else."""
    save_pipeline(pipeline, out, own={"unet", "scheduler"})
    return out


def export(pipeline, trained, out, **more):
    recording = record(pipeline, prompt="the cat")
    plan = plan_student(recording, 1, renoise="ode")
    more = {"method": "dmd2", "base_model": "example/teacher", **more}
    return export_student(recording, trained(recording), plan, out, **more)


def load(folder, **how):
    return DiffusionPipeline.from_pretrained(folder, **how)


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def in_half(folder, *parts, variant=None, shards=False):
    """Rewrite parts' weights in float16, with a variant's suffix, and in two files where asked."""
    for part in parts:
        (path,) = (folder / part).glob("*.safetensors")
        state = {name: value.half() if value.is_floating_point() else value for name, value in load_file(path).items()}
        path.unlink()
        suffix = f".{variant}" if variant else ""
        if not shards:
            save_file(state, path.with_name(f"{path.stem}{suffix}.safetensors"), metadata={"format": "pt"})
            continue
        names = sorted(state)
        files = {f"{path.stem}{suffix}-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
        for file, keys in files.items():
            save_file({key: state[key] for key in keys}, path.with_name(file), metadata={"format": "pt"})
        index = {"metadata": {"total_size": 1}, "weight_map": {key: file for file in files for key in files[file]}}
        path.with_name(f"{path.stem}.safetensors.index{suffix}.json").write_text(json.dumps(index))


def test_untrained_parts_are_the_teachers_files_to_the_byte(teacher, trained, tmp_path):
    student = export(load(teacher), trained, tmp_path / "student")
    for part in UNTRAINED:
        assert content(student / part) == content(teacher / part), part
    assert content(student / "unet") != content(teacher / "unet")
    index = json.loads((student / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderKL"] and index["tokenizer"][1] == "CLIPTokenizer"


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "two files"])
def test_a_variant_is_copied_under_the_names_of_a_stock_load(teacher, trained, tmp_path, shards):
    in_half(teacher, "text_encoder", "vae", "unet", variant="fp16", shards=shards)
    pipeline = load(teacher, variant="fp16")
    student = export(pipeline, trained, tmp_path / "student")
    names = [path.name for path in student.rglob("*")]
    assert not [name for name in names if "fp16" in name]
    assert not [path for path in student.rglob("*.json") if "fp16" in path.read_text()]
    for part in ("text_encoder", "vae"):
        theirs = sorted(path.read_bytes() for path in (teacher / part).glob("*.safetensors"))
        mine = sorted(path.read_bytes() for path in (student / part).glob("*.safetensors"))
        assert mine == theirs and len(mine) == (2 if shards else 1), part
    loaded = load(student)
    for part in ("text_encoder", "vae"):
        want, got = getattr(pipeline, part).state_dict(), getattr(loaded, part).state_dict()
        assert all(torch.equal(want[name], got[name].to(want[name].dtype)) for name in want), part


def test_of_two_variants_the_one_in_memory_is_copied(teacher, tmp_path):
    full = {part: next((teacher / part).glob("*.safetensors")).read_bytes() for part in ("text_encoder", "vae")}
    in_half(teacher, "text_encoder", "vae", variant="fp16")
    for part, weights in full.items():
        name = next((teacher / part).glob("*.fp16.safetensors")).name.replace(".fp16", "")
        (teacher / part / name).write_bytes(weights)
    single = written(load(teacher), tmp_path / "single")
    assert {part: next((single / part).glob("*.safetensors")).read_bytes() for part in full} == full
    # In float32 too, the numbers in memory are those of the halves.
    half = written(load(teacher, variant="fp16"), tmp_path / "half")
    for part in full:
        (mine,) = (half / part).glob("*.safetensors")
        assert mine.read_bytes() == next((teacher / part).glob("*.fp16.safetensors")).read_bytes()


def test_a_folder_of_the_hubs_cache_is_a_folder(teacher, tmp_path):
    blobs, snapshot = tmp_path / "models--o--n" / "blobs", tmp_path / "models--o--n" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in teacher.rglob("*") if path.is_file())):
        shutil.move(path, blobs / str(number))
        link = snapshot / path.relative_to(teacher)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blobs / str(number))
    student = written(load(snapshot), tmp_path / "student")
    assert not [path for path in student.rglob("*") if path.is_symlink()]
    for part in UNTRAINED:
        assert content(student / part) == content(snapshot / part), part


def _fused(pipeline):
    with torch.no_grad():
        next(pipeline.text_encoder.parameters()).view(-1)[0] += 1e-6


def _grown(pipeline):
    pipeline.tokenizer.add_tokens(["<new-thing>"])


def _rescaled(pipeline):
    pipeline.vae.register_to_config(scaling_factor=0.25)


def _half(pipeline):
    pipeline.text_encoder.to(torch.float16).to(torch.float32)


@pytest.mark.parametrize(
    ("change", "part"),
    [(_fused, "text_encoder"), (_grown, "tokenizer"), (_rescaled, "vae"), (_half, "text_encoder")],
    ids=["one weight", "one token", "one setting", "rounded"],
)
def test_a_part_that_has_changed_in_memory_is_saved_from_there(teacher, tmp_path, change, part):
    pipeline = load(teacher)
    change(pipeline)
    student = written(pipeline, tmp_path / "student")
    assert content(student / part) != content(teacher / part)
    assert not (student / part / "vocab.json").exists() or part != "tokenizer"
    again = load(student)
    if part == "tokenizer":
        assert again.tokenizer("<new-thing>").input_ids == pipeline.tokenizer("<new-thing>").input_ids
    else:
        want, got = getattr(pipeline, part), getattr(again, part)
        assert all(torch.equal(value, got.state_dict()[name]) for name, value in want.state_dict().items())
        assert getattr(got.config, "scaling_factor", None) == getattr(want.config, "scaling_factor", None)
    for other in {*UNTRAINED} - {part}:
        assert content(student / other) == content(teacher / other), other


def _gone(teacher):
    shutil.rmtree(teacher)


def _other_weights(teacher):
    path = next((teacher / "vae").glob("*.safetensors"))
    save_file({name: value + 1 for name, value in load_file(path).items()}, path, metadata={"format": "pt"})


def _pickled(teacher):
    path = next((teacher / "vae").glob("*.safetensors"))
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()


def _code(teacher):
    (teacher / "vae" / "mine.py").write_text("raise SystemExit")


@pytest.mark.parametrize("change", [_gone, _other_weights, _pickled, _code])
def test_a_folder_that_does_not_give_the_part_is_not_copied(teacher, tmp_path, change):
    pipeline = load(teacher)
    change(teacher)
    student = written(pipeline, tmp_path / "student")
    assert {path.suffix for path in (student / "vae").iterdir()} == {".json", ".safetensors"}
    want = pipeline.vae.state_dict()
    assert all(torch.equal(want[name], value) for name, value in load(student).vae.state_dict().items())


def test_a_pipeline_from_no_folder_is_saved_from_memory(tmp_path):
    pipeline = tiny_stable_diffusion()
    assert part_folders(pipeline, "vae") == []
    student = written(pipeline, tmp_path / "student")
    assert load(student).vae.state_dict().keys() == pipeline.vae.state_dict().keys()


def test_only_what_a_stock_load_reads_is_copied(teacher, tmp_path):
    for name in ("model.ckpt", "diffusion_pytorch_model.bin", "model_ema.safetensors", "flax_model.msgpack", ".hidden"):
        (teacher / "vae" / name).write_bytes(b"x")
    student = written(load(teacher), tmp_path / "student")
    assert sorted(path.name for path in (student / "vae").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def test_paths_in_copied_settings_are_not_published(teacher, trained, tmp_path):
    settings = {
        "text_encoder/config.json": {"_name_or_path": "/srv/secret/clip"},
        "vae/config.json": {"_name_or_path": "C:\\secret\\vae"},
        "tokenizer/tokenizer_config.json": {
            "name_or_path": str(teacher),
            "special_tokens_map_file": "/srv/secret/special_tokens_map.json",
        },
    }
    for name, more in settings.items():
        path = teacher / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    pipeline = load(teacher)
    student = export(pipeline, trained, tmp_path / "student", base_model=str(teacher))
    assert not [
        path for path in student.rglob("*.json") if "secret" in path.read_text() or str(teacher) in path.read_text()
    ]
    for part in UNTRAINED:  # all else is still the teacher's
        changed = {name.partition("/")[2] for name in settings if name.startswith(f"{part}/")}
        mine, theirs = content(student / part), content(teacher / part)
        assert mine.keys() == theirs.keys()
        assert all(mine[name] == theirs[name] for name in mine if name not in changed)
    kept = json.loads((student / "tokenizer/tokenizer_config.json").read_text())
    assert kept["name_or_path"] == "teacher" and kept["special_tokens_map_file"] is None
    hub = "openai/clip-vit-large-patch14"
    path = teacher / "text_encoder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_name_or_path": hub}))
    student = export(load(teacher), trained, tmp_path / "second")
    assert content(student / "text_encoder") == content(teacher / "text_encoder"), "a hub id is no path"


def test_a_student_of_an_embedded_teacher_is_read_by_old_versions(trained, tmp_path):
    """Before 5.6 transformers reads a tokenizer's vocabulary and a CLIP encoder's prefixed keys alone."""
    teacher = teacher_path("fashion-sd")
    student = export(load(teacher), trained, tmp_path / "student")
    for part in UNTRAINED:
        assert content(student / part) == content(teacher / part), part
    assert {"vocab.json", "merges.txt"} <= {path.name for path in (student / "tokenizer").iterdir()}
    before, after = (sum(p.stat().st_size for p in (f / "unet").iterdir()) for f in (teacher, student))
    assert after < 1.01 * before, "the trained network is in the teacher's half precision"


def pytest_generate_tests(metafunc):
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", pipeline_folder.names(metafunc.config, sample=True))


def test_every_part_of_a_family_is_copied(family, request, tmp_path):
    folder = request.config.getoption("zoo") / family
    pipeline = load(folder)
    own = {"unet", "transformer", "scheduler"} & pipeline.components.keys()
    save_pipeline(pipeline, tmp_path / "student", own)
    copied = {name for name, part in pipeline.components.items() if part is not None} - own
    for part in copied:
        assert content(tmp_path / "student" / part) == content(folder / part), part
    assert load(tmp_path / "student").components.keys() == pipeline.components.keys()
