"""A resumed run goes on with what it began with, by contents: changed in place it is named, moved it is taken."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_pipelines import tiny_dit, tiny_stable_diffusion

from fewstep.cli import main
from fewstep.config.run import RunConfig
from fewstep.data.contents import changed_folders
from fewstep.errors import UserError
from fewstep.programs.cache import cache
from fewstep.programs.distillation import distill
from fewstep.programs.pairs import make_pairs
from fewstep.trainers._consistency_config import ConsistencyConfig
from fewstep.trainers._rectified_flow_config import RectifiedFlowConfig
from fewstep.training import checkpoint
from fewstep.training.inputs import FILE, RunInputs
from fewstep.training.run_folder import check_folder, write_config

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each kind of input, to be copied."""
    root = tmp_path_factory.mktemp("inputs")
    tiny_dit().save_pretrained(root / "teacher")
    (root / "teacher" / "README.md").write_text("a card")
    shutil.copytree(root / "teacher", root / "init")
    for place, name in enumerate(("bag", "boot")):
        (root / "data" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), (90 * place, 9, 9)).save(root / "data" / name / "0.png")
    (root / "prompts.txt").write_text("a cat\na dog\n")
    save_file({"layer.lora_A.weight": torch.ones(2, 2)}, root / "lora.safetensors")
    made = {"cpu": True, "classes": "0-1"}
    cache(tiny_stable_diffusion(), root / "cache", prompts=["a cat", "a dog"], cpu=True)
    make_pairs(tiny_dit(), out=str(root / "pairs"), num=2, teacher_steps=1, guidance_scale=1.0, **made)
    checkpoint.save(root / "run" / "checkpoints", 3, {"student": {"a": torch.ones(2)}}, {"method": "dmd2"}, 2)
    return root


@pytest.fixture
def here(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "here")
    return tmp_path / "here"


def began(out: Path, **inputs: Path) -> RectifiedFlowConfig:
    """The settings with which the run is gone on with."""
    given = {name: str(path) for name, path in inputs.items()}
    config = RectifiedFlowConfig(out=str(out), **{"teacher": "fashion-sd", **given})
    check_folder(out, "rectified_flow", config)
    run_inputs = RunInputs(config)
    assert run_inputs.check_here() == ""
    write_config(out, "rectified_flow", config)
    run_inputs.write()
    return resumed(config)


def resumed(config: RectifiedFlowConfig, **inputs: str | Path | None) -> RectifiedFlowConfig:
    kept = {**config.as_dict(), "resume": True}
    return type(config)(**{**kept, **{n: None if path is None else str(path) for n, path in inputs.items()}})


def go_on(config: RunConfig) -> str:
    check_folder(Path(config.out), "rectified_flow", config)
    return RunInputs(config).check_here()


def one_weight(path: Path) -> None:
    """The smallest change: one number of the last tensor, by a bit."""
    tensors = load_file(path)
    last = tensors[sorted(tensors)[-1]].view(-1)
    last[-1] = torch.nextafter(last[-1], torch.tensor(9.0))
    save_file(tensors, path)


def other_picture(path: Path) -> None:
    size = path.stat().st_size
    Image.new("RGB", (16, 16), (7, 9, 9)).save(path)
    assert path.stat().st_size == size  # nothing but the content tells them apart


CHANGES = {
    "teacher: a weight": ("teacher", lambda root: one_weight(root / "teacher" / WEIGHTS), "(transformer)"),
    "teacher: its scheduler": (
        "teacher",
        lambda root: (root / "teacher/scheduler/scheduler_config.json").write_text("{}"),
        "(scheduler)",
    ),
    "teacher: its decoder": (
        "teacher",
        lambda root: one_weight(root / "teacher/vae/diffusion_pytorch_model.safetensors"),
        "(vae)",
    ),
    "prompts": ("prompts.txt", lambda root: (root / "prompts.txt").write_text("a cat\na cow\n"), "prompts.txt"),
    "data: a picture": ("data", lambda root: other_picture(root / "data/boot/0.png"), "(boot)"),
    "data: a class more": ("data", lambda root: (root / "data/a_new_one").mkdir(), "what they show"),
    "data: a picture less": ("data", lambda root: (root / "data/bag/0.png").unlink(), "bag"),
    "the teacher's LoRA": ("lora.safetensors", lambda root: one_weight(root / "lora.safetensors"), "lora.safetensors"),
    "init: a pipeline": ("init", lambda root: one_weight(root / "init" / WEIGHTS), "(transformer)"),
    "init: a run": (
        "run",
        lambda root: checkpoint.save(root / "run/checkpoints", 4, {"student": {"a": torch.zeros(2)}}, {}, 2),
        "checkpoints/step",
    ),
    "cache": ("cache", lambda root: one_shard_more(root / "cache"), "cache"),
    "pairs": ("pairs", lambda root: one_weight(root / "pairs/shard_000000.safetensors"), "pairs"),
}
SETTING = {"prompts.txt": "prompts", "lora.safetensors": "teacher_lora", "run": "init"}


def one_shard_more(folder: Path) -> None:
    shutil.rmtree(folder)
    cache(tiny_stable_diffusion(), folder, prompts=["a cat", "a cow"], cpu=True)


@pytest.mark.parametrize("change", CHANGES)
def test_an_input_that_has_changed_under_its_name_is_refused_and_named(here: Path, tmp_path: Path, change: str):
    """Each of them went on silently."""
    place, act, named = CHANGES[change]
    setting = SETTING.get(place, place)
    config = began(tmp_path / "out", **{setting: here / place})
    assert go_on(config) == ""
    act(here)
    with pytest.raises(UserError, match=f"^--resume: --{setting} .*is not what it was when the run in") as caught:
        go_on(config)
    assert named in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "place", ["teacher", "prompts.txt", "data", "lora.safetensors", "init", "run", "cache", "pairs"]
)
def test_a_copy_under_another_name_with_other_times_is_the_same(here: Path, tmp_path: Path, place: str):
    setting = SETTING.get(place, place)
    config = began(tmp_path / "out", **{setting: here / place})
    copy = here.rename(tmp_path / "elsewhere") / place
    for file in (copy, *copy.rglob("*")):
        os.utime(file, (1e9, 1e9))
    assert go_on(resumed(config, **{setting: copy})) == ""


def test_what_decides_nothing_may_change(here: Path, tmp_path: Path):
    config = began(tmp_path / "out", teacher=here / "teacher", data=here / "data", prompts=here / "prompts.txt")
    (here / "teacher" / "README.md").write_text("a better card")
    (here / "teacher" / "transformer" / ".DS_Store").touch()
    (here / "data" / "bag" / "._0.png").touch()
    (here / "data" / ".ipynb_checkpoints").mkdir()
    (here / "prompts.txt").write_bytes(b"a cat\r\n\r\na dog")
    assert go_on(config) == ""


@pytest.mark.parametrize("named", ["absolute", "../beside/0.png"])
def test_images_that_a_list_names_elsewhere_count_too(here: Path, tmp_path: Path, named: str):
    """An absolute name stopped every run."""
    picture = here / "beside" / "0.png"
    shutil.copytree(here / "data" / "bag", picture.parent)
    row = {"file_name": str(picture) if named == "absolute" else named, "text": "a bag"}
    (here / "data" / "metadata.jsonl").write_text(json.dumps(row))
    config = began(tmp_path / "out", data=here / "data")
    assert go_on(config) == ""
    other_picture(picture)
    with pytest.raises(UserError, match=r"beside\) is not what it was"):
        go_on(config)


@pytest.mark.parametrize(
    "added",
    [
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.bin",
        "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "diffusion_pytorch_model.safetensors.index.fp16.json",
        "diffusion_pytorch_model.non_ema.safetensors",
    ],
)
def test_weights_that_are_not_loaded_may_come_beside_those_that_are(here: Path, tmp_path: Path, added: str):
    """As in the hub's cache, when another program fetches another variant of the same model."""
    config = began(tmp_path / "out", teacher=here / "teacher")
    (here / "teacher" / "transformer" / added).write_bytes(b"{}")
    assert go_on(config) == ""
    one_weight(here / "teacher" / WEIGHTS)
    with pytest.raises(UserError, match=r"\(transformer\) is not what it was"):
        go_on(config)


def test_of_a_variant_its_weights_count_and_the_plain_ones_of_parts_without(here: Path, tmp_path: Path):
    plain = here / "teacher" / WEIGHTS
    half = plain.with_name("diffusion_pytorch_model.fp16.safetensors")
    shutil.copy(plain, half)
    shutil.copy(plain, plain.with_name("diffusion_pytorch_model.bf16.safetensors"))
    config = began(tmp_path / "out", teacher=here / "teacher", variant="fp16")
    of_consistency = ConsistencyConfig(teacher=config.teacher, teacher_variant="fp16", out=str(tmp_path / "new"))
    (one := RunInputs(of_consistency)).check_here()
    one_weight(plain), one_weight(plain.with_name("diffusion_pytorch_model.bf16.safetensors"))
    assert go_on(config) == ""
    (two := RunInputs(of_consistency)).check_here()
    assert not changed_folders(one.found["teacher"], two.found["teacher"])
    one_weight(here / "teacher/vae/diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=r"\(vae\) is not what it was"):
        go_on(config)


def test_a_run_without_digests_goes_on_with_one_line_and_has_them_then(here: Path, tmp_path: Path):
    config = began(tmp_path / "out", teacher=here / "teacher", prompts=here / "prompts.txt")
    (tmp_path / "out" / FILE).unlink()  # as an earlier version left it
    run_inputs = RunInputs(config)
    assert run_inputs.check_here() == "the run began without digests of --prompts, --teacher: taken now"
    run_inputs.write()
    assert go_on(config) == ""
    # Nobody knows whether what lies elsewhere is what such a run began with.
    (tmp_path / "out" / FILE).unlink()
    with pytest.raises(UserError, match="--resume: prompts differ"):
        go_on(resumed(config, prompts=shutil.copy(here / "prompts.txt", tmp_path / "p.txt")))


def test_init_may_be_left_out_once_there_is_a_checkpoint(here: Path, tmp_path: Path):
    config = began(tmp_path / "out", init=here / "init")
    one_weight(here / "init" / WEIGHTS)
    with pytest.raises(UserError, match=r"choose another --out$"):
        go_on(config)
    with pytest.raises(UserError, match="--resume: init differ"):
        go_on(resumed(config, init=None))
    checkpoint.save(tmp_path / "out" / "checkpoints", 0, {"student": {"a": torch.ones(2)}}, {}, 2)
    with pytest.raises(UserError, match="or leave out --init: the checkpoint holds what came of it"):
        go_on(config)
    assert go_on(resumed(config, init=None)) == ""


@pytest.mark.parametrize(
    "content", ["", "[]", '{"format": "fewstep-inputs-1", "inputs": {"teacher": {}}, "sha256": ""}']
)
def test_digests_that_are_damaged_are_refused_in_one_line(here: Path, tmp_path: Path, content: str):
    config = began(tmp_path / "out", prompts=here / "prompts.txt")
    (tmp_path / "out" / FILE).write_text(content)
    with pytest.raises(UserError, match=r"inputs\.json"):
        go_on(config)


def test_a_teacher_of_the_hub_is_what_its_cache_holds(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The hub may give another revision than when the run began; only after loading is it known which."""
    repository = tmp_path / "hub" / "models--owner--name"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    shutil.copytree(here / "teacher", repository / "snapshots" / ("a" * 40))
    shutil.copytree(here / "teacher", repository / "snapshots" / ("b" * 40))
    config = RectifiedFlowConfig(teacher="owner/name", out=str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    first = RunInputs(config)
    assert (first.check_here(), first.found) == ("", {})
    assert (first.check_fetched(None), list(first.found)) == ("", ["teacher"])
    first.write()
    (repository / "refs" / "main").write_text("b" * 40)
    assert RunInputs(config).check_fetched(None) == ""  # another revision of the same weights
    one_weight(repository / "snapshots" / ("b" * 40) / WEIGHTS)
    with pytest.raises(UserError, match=r"--teacher owner/name \(transformer\) is not what it was"):
        RunInputs(config).check_fetched(None)


def test_a_single_file_counts_with_the_configuration_beside_it(here: Path, tmp_path: Path):
    file = here / "teacher" / "model.safetensors"
    save_file({"a": torch.ones(2)}, file)
    config = began(tmp_path / "out", teacher=file)
    assert go_on(config) == ""
    (here / "teacher" / "scheduler" / "scheduler_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"\(scheduler\) is not"):
        go_on(config)
    config = began(tmp_path / "other", teacher=file)
    one_weight(file)
    with pytest.raises(UserError, match=r"\(the single file\) is not"):
        go_on(config)


def test_a_teacher_in_a_folder_of_a_folder_may_be_named_otherwise(here: Path, tmp_path: Path):
    config = RectifiedFlowConfig(teacher=str(here), subfolder="teacher", out=str(tmp_path / "out"))
    check_folder(tmp_path / "out", "rectified_flow", config)
    run_inputs = RunInputs(config)
    assert run_inputs.check_here() == "" and "transformer" in run_inputs.found["teacher"]
    write_config(tmp_path / "out", "rectified_flow", config)
    run_inputs.write()
    assert go_on(resumed(config, teacher=here / "teacher", subfolder=None)) == ""
    with pytest.raises(UserError, match="--resume: variant differ"):  # other files of the same folder
        go_on(resumed(config, variant="fp16"))
    one_weight(here / "teacher" / WEIGHTS)
    with pytest.raises(UserError, match=r"\(transformer\) is not"):
        go_on(resumed(config))


# --- whole runs ------------------------------------------------------------------------------------------------------


def test_the_command_refuses_before_it_loads_and_goes_on_elsewhere(here: Path, tmp_path: Path, capfd, caplog):
    words = ["distill", "dmd2", "--teacher", str(here / "teacher"), "--classes", "0-1", "--out", str(tmp_path / "out")]
    words += ["--steps", "1", "--batch_size", "2", "--sample_steps", "0", "--report_to", "none", "--cpu"]
    assert main([*words, "--max_steps", "1", "--lora_rank", "2"]) == 0
    kept = json.loads((tmp_path / "out" / FILE).read_text())
    assert list(kept["inputs"]) == ["teacher"] and "transformer" in kept["inputs"]["teacher"]
    moved = here / "moved"
    (here / "teacher").rename(moved)
    words[3] = str(moved)
    assert main([*words, "--max_steps", "2", "--lora_rank", "2", "--resume"]) == 0
    one_weight(moved / WEIGHTS)
    capfd.readouterr()
    assert main([*words, "--max_steps", "3", "--lora_rank", "2", "--resume"]) == 2
    error = capfd.readouterr().err
    assert "(transformer) is not what it was" in error and "Loading" not in error


def test_a_pipeline_that_is_handed_over_is_compared_too(tmp_path: Path):
    settings = {"classes": "0-1", "out": str(tmp_path / "out"), "steps": 1, "batch_size": 2, "sample_steps": 0}
    settings |= {"report_to": "none", "cpu": True, "lora_rank": 2}
    pipeline = tiny_dit()
    distill(pipeline, max_steps=1, **settings)
    distill(pipeline, max_steps=2, resume=True, **settings)
    with torch.no_grad():
        list(pipeline.transformer.parameters())[-1].view(-1)[-1].add_(1e-3)
    with pytest.raises(UserError, match=r"\(transformer\) is not what it was"):
        distill(pipeline, max_steps=3, resume=True, **settings)


def test_a_pipeline_that_is_handed_over_is_not_taken_for_the_files_that_a_run_began_with(here: Path, tmp_path: Path):
    """Digests of both kinds cannot be compared: any pipeline went on with a run of any folder."""
    config = resumed(began(tmp_path / "out", teacher=here / "teacher"), teacher="another/model")
    with pytest.raises(UserError, match="--resume: teacher differ"):
        check_folder(tmp_path / "out", "rectified_flow", config, in_memory=True)


def test_a_pipeline_that_is_handed_over_may_have_another_name(tmp_path: Path):
    out = tmp_path / "out"
    config = RectifiedFlowConfig(teacher="one", out=str(out))
    check_folder(out, "rectified_flow", config, in_memory=True)
    run_inputs = RunInputs(config, tiny_dit())
    assert run_inputs.check_here() == ""
    write_config(out, "rectified_flow", config)
    run_inputs.write()
    config = resumed(config, teacher="another")
    check_folder(out, "rectified_flow", config, in_memory=True)
    assert RunInputs(config, tiny_dit()).check_here() == ""
