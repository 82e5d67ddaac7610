"""Train the autoencoder that all teachers share, and encode the training images with it."""

import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from fewstep.eval.fashion.idx import Split
from fewstep.eval.fashion.loop import Plan, train

PLAN = Plan(steps=4500, batch_size=64, learning_rate=3e-3, ema_decay=0.998)
LATENT_NOISE = 0.1
LATENT_PENALTY = 5e-4
GRADIENT_WEIGHT = 0.5


def make_autoencoder() -> AutoencoderKL:
    """Grey 32x32 images in [-1, 1] to 4x8x8 latents and back; 0.80 M parameters."""
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=32,
        mid_block_add_attention=False,
        shift_factor=0.0,
    )


def to_network(images: Tensor) -> Tensor:
    """uint8 (N, 1, 32, 32) to float in [-1, 1]."""
    return images.float() / 127.5 - 1


def _gradient_error(difference: Tensor) -> Tensor:
    """Mean absolute error of the horizontal and vertical differences: keeps edges and fabric sharp."""
    return difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()


def train_autoencoder(images: Split, work: Path, plan: Plan = PLAN) -> AutoencoderKL:
    """L1 of pixels and of their gradients, noise on the latents in place of a learned variance.

    The metric's classifier has no part in the loss: it must not train what it judges. Afterwards the encoder's variance
    is set to that of the training noise, so that ``latent_dist.sample()`` gives what the decoder has learned to read.
    """
    torch.manual_seed(1)
    model = make_autoencoder()

    def loss(indices: Tensor, generator: torch.Generator) -> Tensor:
        batch = to_network(images.images[indices])
        with torch.autocast("cpu", torch.bfloat16):
            latents = model.encode(batch).latent_dist.mean
            noise = torch.randn(latents.shape, generator=generator)
            output = model.decode(latents + LATENT_NOISE * noise).sample
        difference = output.float() - batch
        penalty = LATENT_PENALTY * latents.float().square().mean()
        return difference.abs().mean() + GRADIENT_WEIGHT * _gradient_error(difference) + penalty

    train("autoencoder", model, loss, len(images), plan, work)
    channels = model.config.latent_channels
    with torch.no_grad():
        model.quant_conv.weight[channels:] = 0
        model.quant_conv.bias[channels:] = 2 * math.log(LATENT_NOISE)
    return model


@torch.inference_mode()
def encode(model: AutoencoderKL, images: Tensor, batch_size: int = 64) -> Tensor:
    """Latent means (N, 4, 8, 8) of uint8 images, without the scaling factor."""
    batches = tqdm(images.split(batch_size), desc="encoding", mininterval=5)
    return torch.cat([model.encode(to_network(batch)).latent_dist.mean for batch in batches])


@torch.inference_mode()
def reconstruct(model: AutoencoderKL, images: Tensor, batch_size: int = 64) -> Tensor:
    """uint8 (N, 1, 32, 32) to the autoencoder's uint8 version of it."""
    outputs = []
    for batch in tqdm(images.split(batch_size), desc="reconstructing", mininterval=5):
        output = model.decode(model.encode(to_network(batch)).latent_dist.mean).sample
        outputs.append(((output / 2 + 0.5).clamp(0, 1) * 255).round().byte())
    return torch.cat(outputs)
