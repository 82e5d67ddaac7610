"""Train the metric's classifier on the 55,000 training images."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from fewstep.eval.fashion.idx import Split
from fewstep.eval.fashion.loop import Plan, train
from fewstep.fashion.classifier import FashionClassifier

PLAN = Plan(steps=4300, batch_size=128, learning_rate=4e-3, weight_decay=0.02, betas=(0.9, 0.99))
LABEL_SMOOTHING = 0.05


def train_classifier(images: Split, work: Path, plan: Plan = PLAN) -> FashionClassifier:
    """Ten passes over the training images with random flips; bfloat16 arithmetic on float32 weights."""
    torch.manual_seed(0)
    model = FashionClassifier().to(memory_format=torch.channels_last)

    def loss(indices: Tensor, generator: torch.Generator) -> Tensor:
        batch = images.images[indices].float() / 255
        flipped = torch.rand(len(batch), generator=generator) < 0.5
        batch = torch.where(flipped[:, None, None, None], batch.flip(3), batch)
        with torch.autocast("cpu", torch.bfloat16):
            _, logits = model(batch.contiguous(memory_format=torch.channels_last))
        return functional.cross_entropy(logits.float(), images.labels[indices], label_smoothing=LABEL_SMOOTHING)

    return train("classifier", model, loss, len(images), plan, work).to(memory_format=torch.contiguous_format)
