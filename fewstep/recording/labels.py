"""How many class labels a network knows, where its tables show it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fewstep.conditioning.conditioning import Conditioning
from fewstep.recording.watch.hooks import hooked


def count_labels(
    network: nn.Module, label: Any, probe: Callable[[], Tensor], negative: Conditioning | None
) -> int | None:
    """How many class labels a network knows, the null label of its guidance apart; None where nothing shows it.

    Labels are rows of an embedding table, which is found as the one that is asked for a label.

    Args:
        network: that is told labels.
        label: that it is told by
        probe: calls it once.
        negative: what its guidance leads away from; None where it has none.
    """
    tables: list[int] = []

    def note(_name: str, table: nn.Module, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        asked = bool(args) and not args[0].is_floating_point() and bool((args[0] == label).all())
        if asked and isinstance(table, nn.Embedding):
            tables.append(table.num_embeddings)

    with hooked({n: m for n, m in network.named_modules() if isinstance(m, nn.Embedding)}, before=note):
        probe()
    if not tables:
        return None
    null = [] if negative is None else [value for value in negative.arguments().values() if _is_label(value)]
    return min(tables) - any(int(value.max()) == min(tables) - 1 for value in null)


def _is_label(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() > 0 and not value.is_floating_point()
