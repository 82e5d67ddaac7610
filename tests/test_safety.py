"""What SECURITY.md promises, held for every file of the package: nothing is unpickled, run or started."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fewstep
from fewstep.cli import main
from fewstep.errors import UserError
from fewstep.export.own_code import is_own_code
from fewstep.export.part_files import copies_of
from tests.bad_inputs import copied
from tests.test_architecture import ROOT, calls, modules, parse
from tests.tiny_pipelines import tiny_ddim

#: Calls that would run what they are given, or unpickle it.
NEVER = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "yaml.load",
    "yaml.load_all",
    "yaml.full_load",
    "yaml.unsafe_load",
    "pickle.load",
    "pickle.loads",
    "marshal.loads",
    "torch.hub.load",
}
#: Those that start another program, with a list of words and no shell.
STARTS = {"fewstep.eval.bench.gpu", "fewstep.eval.memory.__main__", "fewstep.eval.memory.sharding"}


def risky(node: ast.AST) -> str | None:
    """What a node does that no file of the package may; None where it may."""
    name = calls(node)
    if name is None or not isinstance(node, ast.Call):
        return None
    words = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if name in NEVER or words.get("shell") == "True" or words.get("allow_pickle", "False") != "False":
        return name
    if name == "torch.load" and words.get("weights_only") != "True":
        return name
    if name in ("np.load", "numpy.load") and "allow_pickle" not in words:
        return name
    return name if name.endswith(".extractall") else None


def test_no_file_runs_or_unpickles_what_it_reads() -> None:
    found = [
        (name, what) for name, path in modules().items() for node in ast.walk(parse(path)) if (what := risky(node))
    ]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f)",
        "np.load(f, allow_pickle=True)",
        "yaml.load(f, Loader=L)",
        "eval(s)",
        "subprocess.run(s, shell=True)",
        "archive.extractall(p)",
    ],
)
def test_what_is_risky_is_seen(text: str) -> None:
    assert risky(ast.parse(text, mode="eval").body) is not None


def test_few_files_start_a_program() -> None:
    started = ("subprocess.run", "subprocess.Popen", "subprocess.check_output", "subprocess.call", "os.execv")
    found = {name for name, path in modules().items() for node in ast.walk(parse(path)) if calls(node) in started}
    assert found <= STARTS


def test_json_and_yaml_of_others_are_read_in_bounds() -> None:
    """By ``fewstep.reading``: what is left reads what the package itself has written in the same process, or ships."""
    own = (
        "fewstep.eval.bench",
        "fewstep.eval.benchmark",
        "fewstep.eval.fashion",
        "fewstep.eval.memory",
        "fewstep.eval.demo",
        "fewstep.fashion",
    )
    plain = {
        "fewstep.conditioning.conditioning",  # of a caller's own file
        "fewstep.conditioning.stacking",  # of a text that was made a line above
        "fewstep.data.durable",  # of a text that was made in the same line
        "fewstep.data.fingerprint",  # of a tokenizer in memory
        "fewstep.data.shard_index",  # of a file beside the shards, which is made anew where it is none
        "fewstep.eval.report.report",  # of a text that was made a line above
        "fewstep.export.published_paths",  # of a folder that is being written; it catches depth itself
        "fewstep.programs.choice",  # of a file of this package
        "fewstep.pipelines.flow_map",  # of a student's folder; these files import nothing of the package
        "fewstep.pipelines.multi_student",
        "fewstep.pipelines.nasa",
        "fewstep.pipelines.phased",
        "fewstep.pipelines.speed_up",
        "fewstep.reading",
        "fewstep.recording.call.plain",
        "fewstep.recording.recipe",
        "fewstep.training.fate",  # of what the run's other processes say
        "fewstep.training.monitor",  # lines of the run's own log
    }
    reads = ("json.loads", "json.load", "yaml.safe_load")
    found = {name for name, path in modules().items() for node in ast.walk(parse(path)) if calls(node) in reads}
    assert {name for name in found if not name.startswith(own)} - plain == set()


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student as far as its files go."""
    folder = tmp_path_factory.mktemp("student") / "student"
    tiny_ddim().save_pretrained(folder)
    about = {"call": {"num_inference_steps": 2}, "steps": 2, "renoise": "ode", "load": {}, "conditional": None}
    (folder / "fewstep.json").write_text(json.dumps(about))
    return folder


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A file of code, which leaves a mark where it is run: a harmless stand-in for any other."""
    code = tmp_path / "trap.py"
    code.write_text(
        f"from diffusers import DDIMPipeline\nopen({str(tmp_path / 'mark')!r}, 'w')\n"
        "class Trap(DDIMPipeline):\n    pass\n"
    )
    return code


def changed(student: Path, folder: Path, name: str, **changes: object) -> Path:
    copied(student, folder)
    content = json.loads((folder / name).read_text()) | changes
    (folder / name).unlink()
    (folder / name).write_text(json.dumps(content))
    return folder


def test_a_student_is_loaded(student: Path) -> None:
    assert fewstep.load(student).fewstep["steps"] == 2


def test_a_students_own_words_do_not_run_code(student: Path, trap: Path, tmp_path: Path) -> None:
    words = {"custom_pipeline": str(trap), "trust_remote_code": True}
    folder = changed(student, tmp_path / "x", "fewstep.json", load=words)
    with pytest.raises(UserError, match="its load names more than parts that are absent"):
        fewstep.load(folder)
    assert not (tmp_path / "mark").exists()


def test_code_in_a_folder_is_not_run_without_being_asked(student: Path, trap: Path, tmp_path: Path) -> None:
    folder = changed(student, tmp_path / "x", "model_index.json", _class_name=["trap", "Trap"])
    (folder / "trap.py").write_bytes(trap.read_bytes())
    with pytest.raises(UserError):
        fewstep.load(folder)
    assert main(["probe", str(folder)]) == 2
    assert main(["plan", str(folder)]) == 2
    assert not (tmp_path / "mark").exists()


def test_a_plan_imports_no_module_that_a_file_names(
    student: Path, trap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(trap.parent)
    folder = changed(student, tmp_path / "x", "model_index.json", unet=["trap", "Trap"])
    assert main(["plan", str(folder)]) == 2
    assert not (tmp_path / "mark").exists()


def test_own_code_is_trusted_only_where_nothing_else_can_come_with_it(student: Path, tmp_path: Path) -> None:
    folder = changed(student, tmp_path / "x", "model_index.json", _class_name=["phased", "Phased"])
    text = (ROOT / "pipelines" / "phased.py").read_text(encoding="utf-8")
    (folder / "phased.py").write_text(text)
    assert is_own_code(folder)
    index = json.loads((folder / "model_index.json").read_text())
    for name in ("../elsewhere/trap", "/trap"):
        (folder / "model_index.json").write_text(json.dumps(index | {"unet": [name, "Trap"]}))
        assert not is_own_code(folder)
    (folder / "model_index.json").write_text(json.dumps(index))
    assert is_own_code(folder)
    (tmp_path / "elsewhere").mkdir()
    (folder / "vae").symlink_to(tmp_path / "elsewhere")
    assert not is_own_code(folder)


@pytest.mark.parametrize("name", ["../secret.safetensors", "sub/../../secret.safetensors", "/secret.safetensors"])
def test_a_lora_names_no_file_outside_of_its_folder(student: Path, name: str, tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    folder.mkdir()
    save_file({"w": torch.zeros(2)}, tmp_path / "secret.safetensors")
    about = {"call": {}, "component": "unet", "base_model": str(student), "lora": {"file": name}}
    (folder / "fewstep.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="outside of its folder"):
        fewstep.apply(tiny_ddim(), folder)


def test_an_index_of_weights_that_leads_elsewhere_is_not_copied(tmp_path: Path) -> None:
    """Neither is what it names read, nor is anything written where its name would lead."""
    network = tiny_ddim().unet
    source = tmp_path / "source" / "unet"
    source.mkdir(parents=True)
    (source / "config.json").write_text("{}")
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    index = {"weight_map": {"w": "../../secret.safetensors"}}
    (source / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert list(copies_of(network, source, tmp_path / "a" / "b" / "c")) == []
    assert not (tmp_path / "a" / "secret.safetensors").exists()
