"""The two teachers of text: their networks, their losses, and the stock pipelines they are shipped in."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from torch.nn import functional

from fewstep.eval.fashion import text
from fewstep.eval.fashion.loop import Plan, train

PLAN = Plan(steps=7500, batch_size=64, learning_rate=1.5e-3, betas=(0.9, 0.99), ema_decay=0.998)
SD_TEXT_WIDTH = 64
FLOW_TEXT_WIDTH = 32


class SDTeacher(nn.Module):
    """A UNet that predicts epsilon, and the text encoder that trains with it."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = text.make_tokenizer()
        self.text_encoder = text.make_text_encoder(self.tokenizer, SD_TEXT_WIDTH)
        self.unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            # Attention at 4x4 and in the middle only: at 8x8 it would double the time and change little.
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(64, 96),
            layers_per_block=1,
            cross_attention_dim=SD_TEXT_WIDTH,
            attention_head_dim=4,
            norm_num_groups=16,
        )
        self.scheduler = DDIMScheduler(
            num_train_timesteps=1000,
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            timestep_spacing="trailing",
            steps_offset=1,
            prediction_type="epsilon",
        )
        self.register_buffer("token_ids", text.token_ids(self.tokenizer), persistent=False)

    def loss(self, x0: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Mean squared error of epsilon at uniform times. x0: scaled latents (B, 4, 8, 8)."""
        timesteps = torch.randint(1000, labels.shape, generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        x_t = self.scheduler.add_noise(x0, noise, timesteps)
        prompts = text.draw_prompts(labels, generator)
        words = self.text_encoder(self.token_ids).last_hidden_state[prompts]
        return functional.mse_loss(self.unet(x_t, timesteps, encoder_hidden_states=words).sample, noise)

    def pipeline(self, vae: AutoencoderKL) -> StableDiffusionPipeline:
        """What is shipped."""
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


class FlowTeacher(nn.Module):
    """A joint-attention transformer that predicts noise - x0, and the two text encoders that train with it."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = text.make_tokenizer()
        self.text_encoder = text.make_projected_text_encoder(self.tokenizer, FLOW_TEXT_WIDTH)
        self.text_encoder_2 = text.make_projected_text_encoder(self.tokenizer, FLOW_TEXT_WIDTH)
        self.text_encoder_3 = text.make_silent_encoder(self.tokenizer, 2 * FLOW_TEXT_WIDTH).requires_grad_(False)
        self.transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=5,
            num_attention_heads=8,
            attention_head_dim=16,
            caption_projection_dim=128,
            joint_attention_dim=2 * FLOW_TEXT_WIDTH,
            pooled_projection_dim=2 * FLOW_TEXT_WIDTH,
            pos_embed_max_size=4,
        )
        self.scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
        self.register_buffer("token_ids", text.token_ids(self.tokenizer), persistent=False)

    def words(self) -> tuple[Tensor, Tensor]:
        """Tokens (21, 10, 64), the last zero, and pooled (21, 64) of the trained prompts, as in the pipeline."""
        tokens, pooled = [], []
        for encoder in (self.text_encoder, self.text_encoder_2):
            output = encoder(self.token_ids, output_hidden_states=True)
            tokens.append(output.hidden_states[-2])
            pooled.append(output.text_embeds)
        return functional.pad(torch.cat(tokens, dim=-1), (0, 0, 0, 1)), torch.cat(pooled, dim=-1)

    def loss(self, x0: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Mean squared error of the velocity at logit-normal times. x0: scaled latents (B, 4, 8, 8)."""
        sigma = torch.randn(labels.shape, generator=generator).sigmoid()
        noise = torch.randn(x0.shape, generator=generator)
        x_t = torch.lerp(x0, noise, sigma[:, None, None, None])
        prompts = text.draw_prompts(labels, generator)
        tokens, pooled = self.words()
        output = self.transformer(
            hidden_states=x_t,
            timestep=sigma * 1000,
            encoder_hidden_states=tokens[prompts],
            pooled_projections=pooled[prompts],
        ).sample
        return functional.mse_loss(output, noise - x0)

    def pipeline(self, vae: AutoencoderKL) -> StableDiffusion3Pipeline:
        """What is shipped."""
        return StableDiffusion3Pipeline(
            transformer=self.transformer,
            scheduler=self.scheduler,
            vae=vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            text_encoder_2=self.text_encoder_2,
            tokenizer_2=self.tokenizer,
            text_encoder_3=self.text_encoder_3,
            tokenizer_3=self.tokenizer,
        )


def train_teacher(
    teacher: SDTeacher | FlowTeacher, name: str, latents: Tensor, labels: Tensor, work: Path, plan: Plan = PLAN
) -> None:
    """Train a teacher in place on scaled latents (N, 4, 8, 8); it ends with its averaged weights."""

    def loss(indices: Tensor, generator: torch.Generator) -> Tensor:
        return teacher.loss(latents[indices], labels[indices], generator)

    train(name, teacher, loss, len(labels), plan, work)
