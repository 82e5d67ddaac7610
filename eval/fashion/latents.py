"""Encode the training images once, and set the autoencoder's scaling factor from them."""

from pathlib import Path

from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.data.durable import write_durably
from fewstep.eval.fashion.idx import Split
from fewstep.eval.fashion.train_autoencoder import encode

FILE = "latents.safetensors"


def _fingerprint(autoencoder: AutoencoderKL) -> str:
    """Differs when the encoder differs: latents of another one must not be used."""
    return f"{sum(parameter.double().abs().sum().item() for parameter in autoencoder.encoder.parameters()):.9f}"


def scaled_latents(autoencoder: AutoencoderKL, images: Split, work: Path) -> Tensor:
    """Latents (N, 4, 8, 8) of standard deviation 1, from ``work/latents.safetensors`` when they are there.

    Sets ``autoencoder.config.scaling_factor`` to the inverse of their standard deviation.
    """
    path = work / FILE
    fingerprint = _fingerprint(autoencoder)
    latents = None
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            same = file.metadata()["encoder"] == fingerprint
        latents = load_file(path)["latents"] if same else None
    if latents is None:
        latents = encode(autoencoder, images.images)
        tensors = {"latents": latents}
        write_durably(path, lambda unfinished: save_file(tensors, unfinished, metadata={"encoder": fingerprint}))
    scaling_factor = 1 / latents.double().std().item()
    autoencoder.register_to_config(scaling_factor=scaling_factor)
    return latents * scaling_factor
