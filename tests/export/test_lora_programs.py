"""LoRA students read by another program itself, where that is installed."""

import warnings

import pytest
import torch
from lora_students import export, fresh
from safetensors.torch import load_file

from fewstep.export.lora_names import KOHYA


def test_lycoris_adds_what_was_trained(recorded, tmp_path, monkeypatch):
    """Its names are those of kohya-ss' trainer when it is told that trainer's prefix."""
    wrapper = pytest.importorskip("lycoris.wrapper", reason="lycoris-lora is not installed", exc_type=ImportError)
    recording = recorded("stable_diffusion")
    role, folder = export(recording, tmp_path / "lora", rank=4, alpha=8)
    unet, file = fresh(recording).unet, folder / KOHYA.file
    monkeypatch.setattr(wrapper.LycorisNetwork, "LORA_PREFIX", "lora_unet")
    with warnings.catch_warnings(action="ignore"):
        network, state = wrapper.create_lycoris_from_weights(1.0, str(file), unet)
    assert len(network.loras) == len(role.backbone.targets)
    network.merge_to(1.0)
    expected = role.stock_network().state_dict()
    for key, value in unet.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-5)
    assert set(load_file(file)) == set(state)
