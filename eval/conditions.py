"""What the samples of an evaluation are asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.conditioning.item import Form, Item
from fewstep.data.conditions import read_classes
from fewstep.data.items import read_items
from fewstep.errors import UserError
from fewstep.eval.config import EvalConfig
from fewstep.eval.models import Model
from fewstep.eval.scorers.kept import picture_and_hole
from fewstep.fashion import PROMPTS, looking
from fewstep.fashion.items import inpainting_items


@dataclasses.dataclass(frozen=True)
class SampleConditions:
    """What sample i is asked for: entry ``i % len(values)``.

    kind: "prompt", "label", "item" or None (unconditional). values: prompts, class numbers or items (a prompt with the
    pictures of a pipeline's call); empty when unconditional.
    labels: the class each value stands for (what the agreement metric compares with), or empty when unknown.
    """

    kind: Literal["prompt", "label", "item"] | None = None
    values: tuple[str | int | Item, ...] = ()
    labels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind is not None and not self.values:
            raise UserError(f"no {self.kind}s to generate for: the list is empty")
        if self.labels and len(self.labels) != len(self.values):
            raise UserError(f"{len(self.values)} {self.kind}s but {len(self.labels)} labels")

    def about(self) -> dict[str, Any]:
        """What it is known by, as JSON holds it: items by their content."""
        values = [value.key if isinstance(value, Item) else value for value in self.values]
        return {"kind": self.kind, "values": values, "labels": list(self.labels)}

    def take(self, indices: Sequence[int]) -> list[str | int | Item]:
        """The values of the samples `indices`."""
        return [self.values[i % len(self.values)] for i in indices]

    def items(self, indices: Sequence[int]) -> list[Item]:
        """The items of the samples `indices`; none where they are asked for otherwise."""
        return [value for value in self.take(indices) if isinstance(value, Item)] if self.kind == "item" else []

    def form(self, index: int) -> Form:
        """What the item of a sample has alike with others of its form; () where samples are asked for otherwise."""
        value = self.values[index % len(self.values)] if self.values else None
        return value.form if isinstance(value, Item) else ()

    def prompts(self, indices: Sequence[int]) -> list[str] | None:
        """The prompts of the samples `indices`, or None where they are asked for by none."""
        if self.kind == "item":
            texts = [item.subject for item in self.items(indices)]
            return [text or "" for text in texts] if any(texts) else None
        return [str(value) for value in self.take(indices)] if self.kind == "prompt" else None

    @property
    def prompted(self) -> bool:
        """Whether samples are asked for by texts."""
        return bool(self.values) and self.prompts(range(len(self.values))) is not None

    @property
    def holed(self) -> bool:
        """Whether samples are asked for by a picture each, and the mask of its hole."""
        return any(picture_and_hole(item) is not None for item in self.items([0])) if self.values else False

    def take_labels(self, indices: Sequence[int]) -> Tensor:
        """The classes of the samples `indices`, int64 (len(indices),)."""
        return torch.tensor([self.labels[i % len(self.labels)] for i in indices], dtype=torch.int64)

    def subjects(self, num: int) -> Tensor | None:
        """Which of the values each of the first `num` samples is asked for, int64 (num,); None without values.

        Values that are equal count as one.
        """
        if not self.values:
            return None
        known = {value: number for number, value in reversed(list(enumerate(self.values)))}
        numbers = [known[value] for value in self.values]
        return torch.tensor([numbers[i % len(numbers)] for i in range(num)], dtype=torch.int64)


def conditions_of(model: Model, config: EvalConfig, fashion: bool) -> SampleConditions:
    """What the model's samples are asked for.

    Args:
        model: of the evaluation.
        config: with prompts, classes or items, where they are told.
        fashion: the ten classes of Fashion-MNIST are the default, or held-back pictures with holes.

    Raises:
        UserError: it takes conditions, and none are told.
    """
    kind = model.condition_kind()
    if config.items is not None or kind == "item" or looking(model.embedded):
        own = looking(model.embedded) and not (config.items or config.prompts or config.classes)
        return items_of(model, inpainting_items(config.num) if own else config.items)
    if kind is not None and config.unconditional:
        raise UserError(f"{model.name} is not unconditional: it takes {kind}s")
    if kind == "prompt":
        if config.prompts is None and not fashion:
            raise UserError(f"{model.name} takes prompts, and none were given (--prompts FILE)")
        if config.prompts is None and any(not 0 <= k < len(PROMPTS) for k in config.classes or ()):
            raise UserError(f"classes must lie between 0 and {len(PROMPTS) - 1}")
        chosen = config.prompts or [PROMPTS[k] for k in config.classes or range(len(PROMPTS))]
        known = all(prompt in PROMPTS for prompt in chosen)
        return SampleConditions("prompt", tuple(chosen), tuple(PROMPTS.index(p) for p in chosen) if known else ())
    if kind == "label":
        if config.classes is None:
            raise UserError(f"{model.name} takes class labels, and none were given (--classes 0-9)")
        return SampleConditions("label", tuple(config.classes), tuple(config.classes))
    return SampleConditions()


def items_of(model: Model, source: Any) -> SampleConditions:
    """Items for a model that looks at pictures.

    Args:
        model: of the evaluation.
        source: of the items, as :func:`fewstep.data.items.read_items` takes it.

    Raises:
        UserError: there are none, or the model looks at none.
    """
    if source is None:
        raise UserError(f"{model.name} takes items, a prompt with pictures each, and none were given (--items FILE)")
    if model.role == "student" and model.kind != "item":
        raise UserError(f"{model.name} was distilled without pictures, so that it takes no items")
    items = read_items(source, model.pipeline_class(), model.call).each
    texts = [item.subject for item in items]
    known = model.embedded is not None and all(text in PROMPTS for text in texts)
    return SampleConditions("item", tuple(items), tuple(PROMPTS.index(text or "") for text in texts) if known else ())


def with_trained_classes(config: EvalConfig, models: Sequence[Model]) -> EvalConfig:
    """Where nothing was asked for: the classes that the first student was distilled with (cards name no prompts)."""
    classes = next((model.training["classes"] for model in models if model.training.get("classes")), None)
    if classes is None or any(told is not None for told in (config.prompts, config.classes, config.items)):
        return config
    return dataclasses.replace(config, classes=read_classes(classes))
