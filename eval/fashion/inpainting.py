"""The picture-conditioned teacher: ``fashion-sd`` with five more channels in, which fills holes in pictures.

    python -m fewstep.eval.fashion.build inpaint

It starts as the shipped ``fashion-sd``, whose answer it gives at first, since the weights of the new channels are zero;
text encoder and autoencoder stay as they are, but that pictures have three channels. The UNet's are those of the
pipeline: sample, mask, latents of the picture with its hole grey, and the latents are drawn as it draws them.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionInpaintPipeline, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from fewstep.eval.fashion import text
from fewstep.eval.fashion.idx import Split
from fewstep.eval.fashion.loop import Plan, train
from fewstep.eval.fashion.train_autoencoder import LATENT_NOISE, to_network
from fewstep.fashion import teacher_path
from fewstep.fashion.holes import CELL, hole

PLAN = Plan(steps=600, batch_size=64, learning_rate=1e-3, betas=(0.9, 0.99), ema_decay=0.995, cycle=1000)
WARM = "fashion-sd"
#: The first training images, each with one hole: in 600 batches one comes three times.
EXAMPLES = 12_000
HOLES_SEED = 5
CHANNELS = 9
COLOURS = 3


class InpaintTeacher(nn.Module):
    """The UNet, which alone is trained, and the frozen parts of its pipeline."""

    def __init__(self, warm: StableDiffusionPipeline) -> None:
        super().__init__()
        self.unet = _wider(warm.unet)
        self.warm = warm
        # Made anew: one that was loaded is saved with how it was loaded.
        self.tokenizer = text.make_tokenizer()
        with torch.no_grad():
            self.words: Tensor = warm.text_encoder(text.token_ids(self.tokenizer)).last_hidden_state

    def loss(self, examples: dict[str, Tensor], labels: Tensor, generator: torch.Generator) -> Tensor:
        """Mean squared error of epsilon at uniform times, over hole and known cells alike.

        Args:
            examples: x0 (B, 4, 8, 8), holes (B, 1, 8, 8), known (B, 4, 8, 8), of :func:`encoded`.
            labels: int64 (B,).
            generator: of the step.
        """
        x0, holes, known = (examples[name] for name in ("x0", "holes", "known"))
        timesteps = torch.randint(1000, labels.shape, generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        drawn = LATENT_NOISE * self.warm.vae.config.scaling_factor * torch.randn(x0.shape, generator=generator)
        x_t = self.warm.scheduler.add_noise(x0, noise, timesteps)
        words = self.words[text.draw_prompts(labels, generator)]
        inputs = torch.cat([x_t, holes, known + drawn], dim=1)
        return functional.mse_loss(self.unet(inputs, timesteps, encoder_hidden_states=words).sample, noise)

    def pipeline(self) -> StableDiffusionInpaintPipeline:
        """What is shipped."""
        return StableDiffusionInpaintPipeline(
            vae=coloured(self.warm.vae),
            text_encoder=self.warm.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=self.warm.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def _wider(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The same network with more channels in, to which it does not listen yet."""
    wide = UNet2DConditionModel.from_config({**unet.config, "in_channels": CHANNELS})
    weights = dict(unet.state_dict())
    first = weights["conv_in.weight"]
    weights["conv_in.weight"] = functional.pad(first, (0, 0, 0, 0, 0, CHANNELS - first.shape[1]))
    wide.load_state_dict(weights)
    return wide


def coloured(vae: AutoencoderKL) -> AutoencoderKL:
    """The grey autoencoder for pictures of three channels: it sees their mean, and answers with three equal ones.

    Whoever brings pictures to a pipeline brings them in colour.
    """
    wide = AutoencoderKL.from_config({**vae.config, "in_channels": COLOURS, "out_channels": COLOURS})
    weights = dict(vae.state_dict())
    weights["encoder.conv_in.weight"] = weights["encoder.conv_in.weight"].repeat(1, COLOURS, 1, 1) / COLOURS
    for name in ("decoder.conv_out.weight", "decoder.conv_out.bias"):
        weights[name] = weights[name].repeat(COLOURS, *[1] * (weights[name].ndim - 1))
    wide.load_state_dict(weights)
    return wide


@torch.inference_mode()
def encoded(vae: AutoencoderKL, images: Tensor, holes: Tensor, batch_size: int = 64) -> dict[str, Tensor]:
    """Scaled latents of pictures and of what is known of them, as the pipeline prepares them, without its draw.

    Args:
        vae: with its scaling factor.
        images: uint8 (N, 1, 32, 32).
        holes: bool (N, 1, 32, 32), True where a picture is repainted.
        batch_size: of the encoder.

    Returns:
        x0 and known, (N, 4, 8, 8), and holes, float (N, 1, 8, 8).
    """
    x0: list[Tensor] = []
    known: list[Tensor] = []
    batches = zip(images.split(batch_size), holes.split(batch_size), strict=True)
    for batch, hole_of in tqdm(batches, desc="encoding", mininterval=10, total=-(-len(images) // batch_size)):
        pictures = to_network(batch)
        for found, given in ((x0, pictures), (known, pictures * ~hole_of)):
            found.append(vae.encode(given).latent_dist.mean * vae.config.scaling_factor)
    return {"x0": torch.cat(x0), "known": torch.cat(known), "holes": holes[..., ::CELL, ::CELL].float()}


def train_inpaint(images: Split, work: Path, plan: Plan = PLAN) -> StableDiffusionInpaintPipeline:
    """The trained pipeline, with averaged weights."""
    warm = StableDiffusionPipeline.from_pretrained(teacher_path(WARM))
    teacher = InpaintTeacher(warm)
    pictures, labels = images.images[:EXAMPLES], images.labels[:EXAMPLES]
    holes = torch.stack([hole(HOLES_SEED, index) for index in range(len(pictures))])[:, None]
    examples = {name: value.clone() for name, value in encoded(warm.vae, pictures, holes).items()}

    def loss(indices: Tensor, generator: torch.Generator) -> Tensor:
        return teacher.loss({name: value[indices] for name, value in examples.items()}, labels[indices], generator)

    train("fashion-inpaint", teacher.unet, loss, len(labels), plan, work)
    return teacher.pipeline()
