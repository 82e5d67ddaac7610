"""Results may be bound to rewritten files of a teacher, where it is proved that they compute the same, to the bit."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.errors import UserError
from fewstep.eval.benchmark import renew as renewing
from fewstep.eval.benchmark.cell_results import Result, read_result, state, write_result
from fewstep.eval.benchmark.cells import Cell, digest
from fewstep.fashion.files import DATA, MANIFEST, sha256

TABLE = "text_model.embeddings.position_embedding.weight"
ENCODER, TOKENIZER = "fashion-sd/text_encoder", "fashion-sd/tokenizer"


def _digest_of(data: Path) -> str:
    named = json.loads((data / MANIFEST).read_text())["files"]
    return digest({path: about["sha256"] for path, about in named.items() if path.startswith("fashion-sd/")})


def _changed(data: Path, *changes: Callable[[Path], None]) -> Path:
    """A copy of the package data with changed files, and a manifest that is true of them."""
    shutil.copytree(DATA, data)
    for change in changes:
        change(data)
    manifest = json.loads((data / MANIFEST).read_text())
    for name, about in manifest["files"].items():
        about["sha256"] = sha256(data / name)
    (data / MANIFEST).write_text(json.dumps(manifest))
    return data


def _edit(name: str, **entries: object) -> Callable[[Path], None]:
    def change(data: Path) -> None:
        (data / name).write_text(json.dumps({**json.loads((data / name).read_text()), **entries}))

    return change


def _weights(name: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def rewrite(data: Path) -> None:
        save_file(change(load_file(data / name)), data / name, metadata={"format": "pt"})

    return rewrite


def _nine(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The encoder as it was trained: nine positions, and keys as new versions of transformers write them."""
    state_dict[TABLE] = state_dict[TABLE][:9].clone()
    return {name.removeprefix("text_model."): tensor for name, tensor in state_dict.items()}


@pytest.fixture
def results(tmp_path: Path) -> Callable[[Path], Path]:
    """Makes a folder with one teacher's cell, bound to the given data folder's files."""

    def write(data: Path) -> Path:
        cell = Cell("fashion-sd", 4, 5000)
        content = cell.content()
        content["teacher"] = {**content["teacher"], "files": _digest_of(data)}
        kept = Result(cell.name, 0, 5000, 8.0, {"fd_test": 1.0}, {}, {}, {}, 1, content, digest(content))
        write_result(tmp_path / "results", cell, kept, None)
        return tmp_path / "results"

    return write


@pytest.mark.soak
def test_results_of_files_in_another_form_are_bound_to_the_new_ones(
    tmp_path: Path, results: Callable[[Path], Path]
) -> None:
    before = _changed(
        tmp_path / "before",
        _weights(f"{ENCODER}/model.safetensors", _nine),
        _edit(f"{ENCODER}/config.json", max_position_embeddings=9),
    )
    kept, cell = results(before), Cell("fashion-sd", 4, 5000)
    assert state(kept, cell) == "stale"
    was = read_result(kept, cell)
    assert [path.name for path in renewing.renew(before, DATA, kept)] == ["teacher_fashion-sd_4.json"]
    assert state(kept, cell) == "done"
    now = read_result(kept, cell)
    assert was is not None and now is not None
    assert dataclasses.replace(now, content=was.content, hash=was.hash) == was, "nothing but the digest is changed"
    assert renewing.renew(before, DATA, kept) == [], "there is nothing left to renew"


def _louder(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor * (1 + 1e-6) if name == TABLE else tensor for name, tensor in state_dict.items()}


def _one_bit(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    state_dict["conv_in.bias"][0] = torch.nextafter(state_dict["conv_in.bias"][0], torch.tensor(9.0).half())
    return state_dict


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_weights(f"{ENCODER}/model.safetensors", _louder), "text_encoder has another .*position_embedding"),
        (_weights("fashion-sd/unet/diffusion_pytorch_model.safetensors", _one_bit), "unet has another conv_in.bias"),
        (_edit(f"{TOKENIZER}/tokenizer_config.json", model_max_length=8), "tokenizer cuts at another length"),
        (_edit("fashion-sd/scheduler/scheduler_config.json", beta_end=0.0121), "scheduler is configured otherwise"),
        (_edit(f"{ENCODER}/config.json", hidden_act="gelu"), "text_encoder is configured otherwise"),
    ],
    ids=["table", "weight", "tokenizer", "scheduler", "activation"],
)
def test_another_teacher_is_refused_and_no_result_is_touched(
    tmp_path: Path, results: Callable[[Path], Path], change: Callable[[Path], None], said: str
) -> None:
    before = _changed(tmp_path / "before", change)
    kept = results(before)
    held = {path: path.read_bytes() for path in kept.iterdir()}
    with pytest.raises(UserError, match=said):
        renewing.renew(before, DATA, kept)
    assert {path: path.read_bytes() for path in kept.iterdir()} == held


def test_a_folder_that_is_not_what_its_manifest_says_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data folder"):
        renewing.renew(tmp_path, DATA, tmp_path)
    before = _changed(tmp_path / "before")
    _edit(f"{ENCODER}/config.json", hidden_act="gelu")(before)
    with pytest.raises(UserError, match=r"config\.json is not the file that the manifest names"):
        renewing.renew(before, DATA, tmp_path)
    assert renewing.main(["--before", str(tmp_path), "--results", str(tmp_path)]) == 2
