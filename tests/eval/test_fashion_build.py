"""The commands that rebuild the data: clear errors, one and the same split, training that continues as if unstopped."""

import gzip
import struct
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fewstep.errors import UserError
from fewstep.eval.fashion import build, idx, loop, text, text_encoder_files

PLAN = loop.Plan(steps=6, batch_size=4, learning_rate=1e-2, ema_decay=0.9)


def _write_idx(path, values):
    header = struct.pack(f">{1 + values.ndim}I", 0x0800 | values.ndim, *values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


@pytest.fixture
def folder(tmp_path):
    """A tiny data set: 600 training and 20 test images a class."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 6000), ("test", 200)):
        images, labels = idx.FILES[part]
        _write_idx(tmp_path / f"{images}.gz", generator.integers(0, 256, (count, 28, 28)))
        _write_idx(tmp_path / f"{labels}.gz", np.arange(count) % 10)
    return tmp_path


def test_split_is_stratified_and_always_the_same(folder):
    first, second = idx.load(folder), idx.load(folder)
    assert len(first.train) == 1000 and len(first.held_back) == 5000 and len(first.test) == 200
    assert first.held_back.labels.bincount().tolist() == [500] * 10
    assert torch.equal(first.held_back.images, second.held_back.images)
    assert first.train.images.shape[1:] == (1, 32, 32) and first.train.images[..., :2].max() == 0


def test_missing_files_are_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    words = ["classifier", "--data", str(tmp_path), "--work", str(tmp_path / "work"), "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["build", *words])
    assert build.main() == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "dataset-fashion-mnist" in line and "--data" in line


def test_broken_files_are_refused(folder):
    images, labels = idx.FILES["test"]
    whole = (folder / f"{images}.gz").read_bytes()
    (folder / f"{images}.gz").write_bytes(whole[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        idx.load(folder)
    (folder / f"{images}.gz").write_bytes(gzip.compress(gzip.decompress(whole)[:1000]))
    with pytest.raises(UserError, match="cut short"):
        idx.load(folder)
    (folder / f"{images}.gz").write_bytes((folder / f"{labels}.gz").read_bytes())
    with pytest.raises(UserError, match="not the idx file"):
        idx.load(folder)
    (folder / f"{images}.gz").write_bytes(whole[:60] + b"\xff" * 30 + whole[90:])
    with pytest.raises(UserError, match="cannot be read"):
        idx.load(folder)


def test_a_packed_file_is_unpacked_no_further_than_the_data_set_goes(folder, monkeypatch):
    monkeypatch.setattr(idx, "_MOST_BYTES", 5_000_000)  # the training images have 4.7 million
    assert len(idx.load(folder).train) == 1000
    images, _ = idx.FILES["test"]
    whole = gzip.decompress((folder / f"{images}.gz").read_bytes())
    (folder / f"{images}.gz").write_bytes(gzip.compress(whole + bytes(6_000_000)))
    with pytest.raises(UserError, match=r"more than 5,000,000 bytes"):
        idx.load(folder)


def _train(work, stop_at=None):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    data = torch.linspace(-1, 1, 30).view(10, 3)
    calls = 0

    def loss(indices, generator):
        nonlocal calls
        if calls == stop_at:
            raise KeyboardInterrupt
        calls += 1
        noise = torch.randn(len(indices), 3, generator=generator)
        return (model(data[indices] + 0.1 * noise) - data[indices].sum(dim=1, keepdim=True)).square().mean()

    return loop.train("line", model, loss, len(data), PLAN, work).state_dict()


def test_stopped_training_continues_as_if_it_had_not_been(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
    straight = _train(tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path / "stopped", stop_at=4)
    resumed = _train(tmp_path / "stopped")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_broken_or_foreign_checkpoint_is_refused(tmp_path):
    _train(tmp_path)
    model = torch.nn.Linear(3, 1)
    other = loop.Plan(steps=7, batch_size=4, learning_rate=1e-2)
    with pytest.raises(UserError, match="another plan"):
        loop.train("line", model, lambda *_: model.weight.sum(), 10, other, tmp_path)
    (tmp_path / "line.checkpoint.safetensors").write_bytes(b"half a file")
    with pytest.raises(UserError, match="broken"):
        loop.train("line", model, lambda *_: model.weight.sum(), 10, PLAN, tmp_path)


def test_prompts_are_dropped_and_shortened_at_the_stated_rates():
    labels = torch.arange(10_000) % 10
    chosen = text.draw_prompts(labels, torch.Generator().manual_seed(0))
    assert abs((chosen == text.EMPTY).double().mean() - 0.1) < 0.01
    bare = (chosen >= 10) & (chosen < text.EMPTY)
    assert abs(bare.double().mean() - 0.15) < 0.015
    assert torch.equal(chosen[bare] - 10, labels[bare])
    assert torch.equal(chosen[chosen < 10], labels[chosen < 10])


def test_the_silent_encoder_says_one_zero_token():
    tokenizer = text.make_tokenizer()
    encoder = text.make_silent_encoder(tokenizer, 64)
    tokens = encoder(
        tokenizer(["a photo of a bag"], padding="max_length", max_length=256, return_tensors="pt").input_ids
    )[0]
    assert tokens.shape == (1, 1, 64) and tokens.abs().max() == 0


def test_a_saved_text_encoder_gets_room_for_exporters_and_the_names_of_old_transformers(tmp_path):
    tokenizer = text.make_tokenizer()
    for make in (text.make_text_encoder, text.make_projected_text_encoder):
        folder = tmp_path / make.__name__
        encoder = make(tokenizer, 16).eval()
        encoder.save_pretrained(folder)
        text_encoder_files.write_for_all_readers(folder)
        again = type(encoder).from_pretrained(folder).eval()
        assert again.config.max_position_embeddings == 77
        ids = text.token_ids(tokenizer)
        with torch.no_grad():
            assert torch.equal(again(ids)[0], encoder(ids)[0])
        names = load_file(folder / "model.safetensors").keys()
        assert all(name.startswith(("text_model.", "text_projection.")) for name in names)
        written = (folder / "model.safetensors").read_bytes()
        text_encoder_files.write_for_all_readers(folder)
        assert (folder / "model.safetensors").read_bytes() == written, "what is in this form stays as it is"


def test_an_encoder_of_another_kind_is_left_alone(tmp_path):
    text.make_silent_encoder(text.make_tokenizer(), 64).save_pretrained(tmp_path)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    text_encoder_files.write_for_all_readers(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == written
