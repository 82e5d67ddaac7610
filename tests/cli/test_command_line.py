"""The command line's promises: one line and exit code 2 for what a user can mend, and nothing lost."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from threading import Thread

import pytest
import torch
import yaml

from fewstep.cli import COMMANDS, main
from fewstep.cli.distill import distill_config
from fewstep.errors import UserError
from fewstep.training.run_folder import write_config
from tests.forked import forked
from tests.tiny_pipelines import tiny_ddim, tiny_dit, tiny_stable_diffusion


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("teachers") / "ddim"
    tiny_ddim().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def text_teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("teachers") / "sd"
    tiny_stable_diffusion().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def finished(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, to be read; who writes into it takes a copy."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert train(teacher, out) == 0
    return out


def run(*words: str) -> int:
    return main(list(words))


def train(teacher: str, out: Path, *words: str) -> int:
    common = ["--max_steps", "2", "--batch_size", "1", "--steps", "2", "--cpu"]
    common += ["--report_to", "none", "--log_steps", "1", "--sample_steps", "0"]
    return run("distill", "dmd2", "--teacher", teacher, "--out", str(out), *common, *words)


def refused(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    """The single line that was printed, which must hold ``words``."""
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("fewstep: ")]
    assert code == 2 and len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nonsense"], ["nonsense", "distill"]),
        (["distill"], ["method", "dmd2"]),
        (["distill", "dmd9", "--teacher", "x"], ["dmd9", "dmd2"]),
        (["distill", "dmd2", "--teacher", "x", "--out", "o", "--colour", "red"], ["--colour"]),
        (["distill", "dmd2", "--teacher", "x"], ["out"]),
        (["distill", "dmd2", "--teacher", "/nowhere/at/all", "--out", "OUT"], ["/nowhere/at/all", "does not exist"]),
        (["distill", "dmd2", "--teacher", "x", "--out", "o", "--steps", "0"], ["steps", "0"]),
        (["distill", "dmd2", "--teacher", "x", "--out", "o", "--steps", "-3"], ["steps", "-3"]),
        (["distill", "dmd2", "--teacher", "x", "--out", "o", "--batch_size", "0"], ["batch_size"]),
        (["distill", "dmd2", "--teacher", "x", "--out", "o", "--mixed_precision", "fp16"], ["mixed_precision", "bf16"]),
        (["distill", "dmd2", "--teacher", "x", "--out", "o", "--gan_weight", "1"], ["--data"]),
        (["distill", "dmd2", "--teacher", "x", "--out", "o", "--prompts", "p", "--classes", "1"], ["not both"]),
        (["sample", "/nowhere", "--out", "x.png"], ["/nowhere"]),
        (["eval", "/nowhere", "--out", "OUT"], ["/nowhere"]),
        (["eval", "/nowhere", "--out", "OUT", "--steps", "a"], ["--steps"]),
        (["probe", "/nowhere"], ["/nowhere"]),
        (["plan", "--memory", "24GB", "fashion-sd"], ["the teacher comes first"]),
        (["demo", "--teacher", "cat"], ["cat", "fashion-sd"]),
        (["demo", "--num", "0"], ["--num"]),
        (["sample", "fashion-sd", "--prompt", "a photo of a bag", "--steps", "0", "--out", "OUT.png"], ["steps", "0"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str], expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, main([word.replace("OUT", str(tmp_path / "out")) for word in words]), *expected)


def test_what_the_recorder_refuses_is_one_line(
    teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, run("probe", teacher, "--call", '{"heigth": 8}'), "heigth")
    refused(capsys, train(teacher, tmp_path / "out", "--guidance_scale", "3"), "guidance_scale")


@pytest.mark.parametrize(
    ("content", "word"), [(b"negative_prompt: caf\xe9\n", "not UTF-8"), (b"steps: null\n", "--steps")]
)
def test_a_config_file_that_cannot_be_used(
    content: bytes, word: str, teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_bytes(content)
    # After the file, so that no flag overrides it.
    words = ["--teacher", teacher, "--out", str(tmp_path / "out"), "--config", str(tmp_path / "c.yaml")]
    refused(capsys, run("distill", "dmd2", *words), word)


def test_trackers_that_are_unknown_or_not_installed_are_named(
    teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--teacher", teacher, "--out", str(tmp_path / "out"), "--cpu"]
    refused(capsys, run("distill", "dmd2", *words, "--report_to", "tensorboard,foo"), "foo", "tensorboard")
    monkeypatch.setattr("fewstep.training.trackers.get_available_trackers", list)
    refused(capsys, run("distill", "dmd2", *words, "--report_to", "wandb"), "wandb", "not installed")


@pytest.mark.parametrize("damage", [("model_index.json", b"{}"), ("text_encoder/model.safetensors", b"xx")])
def test_a_damaged_teacher_is_named(
    damage: tuple[str, bytes], text_teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(text_teacher, tmp_path / "teacher")
    (tmp_path / "teacher" / damage[0]).write_bytes(damage[1])
    refused(capsys, run("probe", str(tmp_path / "teacher")), str(tmp_path / "teacher"), "cannot be loaded")


def test_init_of_another_family_is_one_line(
    teacher: str, finished: Path, text_teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("a cat\n")
    for init, word in ((finished, "other weights"), (teacher, "other weights"), ("/nowhere", "--init /nowhere")):
        code = train(text_teacher, tmp_path / "o", "--prompts", str(tmp_path / "p.txt"), "--init", str(init))
        refused(capsys, code, word)


def test_init_that_predicts_something_else_is_refused(
    text_teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights have the same shapes, so nothing else would notice."""
    tiny_stable_diffusion("v_prediction").save_pretrained(tmp_path / "v")
    (tmp_path / "p.txt").write_text("a cat\n")
    prompts = ["--prompts", str(tmp_path / "p.txt")]
    assert train(text_teacher, tmp_path / "run", *prompts) == 0
    for init in ("run", "run/student"):
        code = train(str(tmp_path / "v"), tmp_path / "out", *prompts, "--init", str(tmp_path / init))
        refused(capsys, code, "predicts 'epsilon' and the teacher 'v_prediction'")


def test_unknown_yaml_keys_are_errors(teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("stepz: 3\n")
    refused(capsys, train(teacher, tmp_path / "out", "--config", str(tmp_path / "c.yaml")), "stepz")


def test_yaml_and_flags_mean_the_same(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"teacher": "t", "out": "o", "steps": 2, "call": {"height": 32}}))
    by_file = distill_config("dmd2", ["--config", str(tmp_path / "c.yaml")])
    by_flag = distill_config("dmd2", ["--teacher", "t", "--out", "o", "--steps", "2", "--call", '{"height": 32}'])
    assert by_file == by_flag
    assert distill_config("dmd2", ["--config", str(tmp_path / "c.yaml"), "--steps", "3", "--cpu"]).steps == 3


def test_a_folder_that_is_no_pipeline_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, train(str(tmp_path), tmp_path / "out"), "model_index.json")
    (tmp_path / "model_index.json").write_text("{ not json")
    refused(capsys, train(str(tmp_path), tmp_path / "out2"), "cannot be loaded")


def test_more_steps_than_the_schedule_has(teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, train(teacher, tmp_path / "out", "--steps", "1001"), "1001")


def test_prompt_files(text_teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n  \n")
    refused(capsys, train(text_teacher, tmp_path / "a", "--prompts", str(empty)), "no prompt")
    refused(capsys, train(text_teacher, tmp_path / "b", "--prompts", str(tmp_path / "none.txt")), "none.txt")
    refused(capsys, train(text_teacher, tmp_path / "c"), "--prompts")
    refused(capsys, train(text_teacher, tmp_path / "d", "--classes", "0-3"), "--prompts")


def test_a_refused_run_leaves_no_run_behind(text_teacher: str, tmp_path: Path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("a\n")
    assert train(text_teacher, tmp_path / "out") == 2
    assert train(text_teacher, tmp_path / "out", "--prompts", str(prompts)) == 0


def test_a_used_folder_is_not_overwritten(
    teacher: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    before = (out / "metrics.jsonl").read_text()
    refused(capsys, train(teacher, out), "--resume")
    refused(capsys, train(teacher, out, "--resume", "--lr", "0.5"), "lr")
    assert (out / "metrics.jsonl").read_text() == before
    assert train(teacher, out, "--resume", "--max_steps", "3", "--checkpointing_steps", "7") == 0
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    refused(capsys, train(teacher, tmp_path / "full"), "not empty")


def test_resume_without_a_run_and_from_a_damaged_checkpoint(
    teacher: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, train(teacher, tmp_path / "none", "--resume"), "no run")
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    for weights in (out / "checkpoints").glob("*/student.safetensors"):  # else it goes on from one that is whole
        weights.write_bytes(weights.read_bytes()[:-100])
    refused(capsys, train(teacher, out, "--resume", "--max_steps", "3"), "is whole", "student.safetensors")


def test_an_unwritable_folder(teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    refused(capsys, train(teacher, tmp_path / "file" / "out"), "file")


def test_real_data_that_cannot_be_used(teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def given(name: str) -> int:
        return train(teacher, tmp_path / "out", "--gan_weight", "1e-3", "--data", str(tmp_path / name))

    refused(capsys, given("gone"), "gone")
    (tmp_path / "empty").mkdir()
    refused(capsys, given("empty"), "no images")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_text("not an image")
    refused(capsys, given("bad"), "x.png")


def test_a_loss_that_explodes_stops_with_step_role_and_checkpoint(
    teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code = train(teacher, out, "--lr", "1e30", "--max_steps", "20", "--adam_weight_decay", "0")
    refused(capsys, code, "not finite in step", "critic", "checkpoint of step 0")
    assert (out / "checkpoints" / "step_00000000" / "state.json").is_file()


def test_probe_sample_and_eval(
    teacher: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("probe", teacher) == 0
    shown = capsys.readouterr().out
    assert "unet" in shown and "proof" in shown
    student = str(Path(shutil.copytree(finished, tmp_path / "out")) / "student")
    assert run("sample", student, "--out", str(tmp_path / "s.png"), "--num", "2", "--seed", "3") == 0
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"
    assert run("eval", student, "--steps", "1,2", "--num", "4", "--out", str(tmp_path / "report")) == 0
    rows = json.loads((tmp_path / "report" / "report.json").read_text())["rows"]
    assert [(row["steps"], row["nfe"]) for row in rows] == [(1, 1), (2, 2)]
    assert run("eval", student, "--steps", "2", "--num", "3", "--out", str(tmp_path / "report2")) == 0
    card = (tmp_path / "out" / "student" / "README.md").read_text()
    assert card.count("## Numbers") == 1 and "| student, 2 steps | 2 |" in card and "| student, 1 step |" not in card
    assert card.index("## Numbers") < card.index("## Made with")


def test_samples_that_cannot_be_made_or_written_are_one_line(
    teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_dit().save_pretrained(tmp_path / "dit")
    for label in ("5000", "-1"):
        words = ["sample", str(tmp_path / "dit"), f"--class={label}", "--steps", "2", "--out", str(tmp_path / "s.png")]
        refused(capsys, run(*words), "DiTPipeline cannot be run")
    (tmp_path / "file").write_text("")
    refused(
        capsys, run("sample", teacher, "--steps", "2", "--out", str(tmp_path / "file" / "s.png")), "cannot be written"
    )


def test_a_full_memory_is_one_line(
    teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nMore of this.")

    monkeypatch.setattr("fewstep.training.loop.Loop.run", full)
    refused(capsys, train(teacher, tmp_path / "out"), "Tried to allocate 20 GiB. Lower --batch_size", "--lora_rank")


def test_ctrl_c_finishes_the_step_writes_a_checkpoint_and_exits_130(teacher: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--teacher", teacher, "--out", str(out), "--max_steps", "100000", "--batch_size", "1", "--cpu"]
    words += ["--critic_updates", "1", "--log_steps", "1", "--report_to", "none"]

    def interrupt() -> None:
        while not (out / "metrics.jsonl").exists():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    def work(_rank: int) -> int:
        Thread(target=interrupt, daemon=True).start()
        return main(["distill", "dmd2", *words])

    (ended,) = forked(1, work, tmp_path / "said")
    assert ended.code == 130, ended
    assert "--resume" in ended.said.splitlines()[-1]
    newest = sorted((out / "checkpoints").glob("step_*"))[-1]
    assert json.loads((newest / "state.json").read_text())["step"] > 0


@pytest.mark.parametrize("command", ["distill", "pairs", "eval"])
def test_termination_ends_every_command_as_ctrl_c_does(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def program(_words: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            seen.append("what is half written is removed")

    monkeypatch.setattr(f"fewstep.cli.{COMMANDS[command]}.run", program)
    before = signal.getsignal(signal.SIGTERM)
    assert main([command]) == 130
    assert seen and signal.getsignal(signal.SIGTERM) is before
    (line,) = capsys.readouterr().err.splitlines()
    assert ("--resume" in line) == (command != "eval")


def test_a_runs_own_config_starts_another_like_it(tmp_path: Path) -> None:
    """``OUT/config.yaml`` names its method beside the settings."""
    first = distill_config("consistency", ["--teacher", "fashion-sd", "--out", str(tmp_path), "--steps", "2"])
    write_config(tmp_path, "consistency", first.resolved())
    words = ["--config", str(tmp_path / "config.yaml"), "--seed", "3"]
    again = distill_config("consistency", words)
    assert again.resolved().as_dict() == {**first.resolved().as_dict(), "seed": 3}
    (tmp_path / "config.yaml").write_text("method: sid\nsteps: 2\n")
    with pytest.raises(UserError, match="is of a run of sid: start fewstep distill sid"):
        distill_config("dmd2", ["--teacher", "fashion-sd", "--out", str(tmp_path), *words[:2]])
