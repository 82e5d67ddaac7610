"""Tiny random pipelines and a toy extractor, so that these tests need neither weights nor data."""

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    UNet2DModel,
)
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from fewstep.eval.features import Features, to_grey


def tiny_unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()


def tiny_ddim() -> DDIMPipeline:
    torch.manual_seed(0)
    return DDIMPipeline(tiny_unet(), DDIMScheduler())


def tiny_dit(scheduler: object | None = None) -> DiTPipeline:
    """Class-conditional, doubles its batch for guidance, and hands no generator to `scheduler.step`."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        latent_channels=4,
        sample_size=16,
    )
    # Random adaLN gates start at zero; shaken weights make the labels and the time matter.
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return DiTPipeline(transformer.eval(), vae.eval(), scheduler or DDIMScheduler(clip_sample=False))


class TinyFlowPipeline(DiffusionPipeline):
    """As Flux does it: no generator for `scheduler.step`, two separate passes for guidance, a prompt."""

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet2DModel, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps=4, guidance_scale=1.0, generator=None, output_type="pil"):
        shift = torch.tensor([len(text) / 100 for text in prompt]).view(-1, 1, 1, 1)
        x = randn_tensor((len(prompt), 1, 8, 8), generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.progress_bar(self.scheduler.timesteps):
            flow = self.unet(x + shift, t).sample
            if guidance_scale > 1:
                without = self.unet(x, t).sample
                flow = without + guidance_scale * (flow - without)
            x = self.scheduler.step(flow, t, x, return_dict=False)[0]
        return ImagePipelineOutput(images=(x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())


def tiny_flow(stochastic: bool = False) -> TinyFlowPipeline:
    torch.manual_seed(0)
    return TinyFlowPipeline(tiny_unet(), FlowMatchEulerDiscreteScheduler(stochastic_sampling=stochastic))


class TinyVideoPipeline(TinyFlowPipeline):
    """The same, repeated over five frames."""

    def __call__(self, *args, **kwargs):
        return BaseOutput(frames=np.stack([super().__call__(*args, **kwargs).images] * 5, axis=1))


def tiny_video() -> TinyVideoPipeline:
    flow = tiny_flow()
    return TinyVideoPipeline(flow.unet, flow.scheduler)


class TinyNamedPipeline(DiffusionPipeline):
    """Networks under names of its own: one reads the words, one steers each step, three share the loop by time."""

    def __init__(
        self,
        reader: torch.nn.Module,
        steering: torch.nn.Module,
        early: torch.nn.Module,
        middle: torch.nn.Module,
        late: torch.nn.Module,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ) -> None:
        super().__init__()
        self.register_modules(
            reader=reader, steering=steering, early=early, middle=middle, late=late, scheduler=scheduler
        )

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps=4, guidance_scale=1.0, generator=None, output_type="pil"):
        told = self.reader(torch.tensor([[float(len(text))] for text in prompt]))["told"].view(-1, 1, 1, 1)
        x = randn_tensor((len(prompt), 1, 8, 8), generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            network = self.early if t > 700 else self.middle if t > 300 else self.late
            given = x + self.steering(told)
            if guidance_scale > 1:
                without, flow = network(torch.cat([x, given]), t).sample.chunk(2)
                flow = without + guidance_scale * (flow - without)
            else:
                flow = network(given, t).sample
            x = self.scheduler.step(flow, t, x, return_dict=False)[0]
        return ImagePipelineOutput(images=(x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())


class Reader(torch.nn.Linear):
    """Answers with a dictionary, as some text encoders do."""

    def forward(self, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"told": super().forward(lengths)}


def tiny_named() -> TinyNamedPipeline:
    torch.manual_seed(0)
    networks = [tiny_unet() for _ in range(3)]
    return TinyNamedPipeline(Reader(1, 1), torch.nn.Linear(1, 1), *networks, FlowMatchEulerDiscreteScheduler())


class ToyExtractor:
    """Mean grey of the sixteen patches of a picture, mixed down to 6 features; 4 of them are called logits."""

    name = "toy"
    sha256 = "f00d"
    verified = True
    resize = "none"
    verified = True

    def __init__(self) -> None:
        self.mix = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
        self.calls = 0

    def accepts(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 3 and shape[1] % 4 == 0

    def __call__(self, images: torch.Tensor) -> Features:
        self.calls += 1
        features = torch.nn.functional.adaptive_avg_pool2d(to_grey(images), 4).flatten(1) @ self.mix
        return Features(features, features[:, :4])
