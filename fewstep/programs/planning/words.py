"""A planned run in words."""

from __future__ import annotations

from torch import nn

from fewstep.config.attention import AUTO
from fewstep.config.run import RunConfig
from fewstep.networks.attention import describe_processors


def settings_in_words(config: RunConfig) -> str:
    """What of a run's settings decides how much it takes."""
    roles = f"LoRA of rank {config.lora_rank}" if config.lora_rank else "full copies"
    if config.full_critic:
        roles += " and a full critic"
    if config.quantization is not None:
        roles += f" on {config.quantization}"
    words = [roles, f"batch {config.batch_size}", "bf16" if config.mixed_precision == "bf16" else "float32"]
    words += ["accumulated"] if config.gradient_accumulation_steps > 1 else []
    words += ["gradient checkpointing"] if config.gradient_checkpointing else []
    words += ["compiled"] if config.compile else []
    words += [f"average {config.ema_decay:g}"] if config.ema_decay else []
    return ", ".join(words)


def attention_in_words(config: RunConfig, network: nn.Module) -> str:
    """Processors, and what they will be asked for: without weights there is nothing to try it with."""
    if config.attention_backend == AUTO:
        return f"as in the teacher: {describe_processors(network)}"
    return f"{config.attention_backend}, tried when the run begins: {describe_processors(network)}"
