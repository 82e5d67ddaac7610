"""The files of the teachers' CLIP text encoders, as every admitted transformers and every exporter reads them."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from fewstep.data.durable import write_durably, write_text_durably

#: Positions of the table in the file: CLIP's own number, which exporters rely on (OpenVINO and ONNX trace 16 tokens).
POSITIONS = 77
#: transformers before 5.6 finds a key of CLIPTextModel by this prefix alone; later ones read both forms.
PREFIX = "text_model."
_TABLE = "embeddings.position_embedding.weight"


def write_for_all_readers(folder: Path) -> None:
    """Give a saved CLIP text encoder :data:`POSITIONS` positions, and its keys the names that old versions ask for.

    The trained rows stay; those behind them are zero, and no prompt of the teachers reaches them, because the tokenizer
    cuts before. So every embedding stays as it is, to the bit. Files that are in this form already stay as they are,
    and so does a folder of another kind of encoder.

    Args:
        folder: of one text encoder, with ``config.json`` and ``model.safetensors``.
    """
    weights, settings = folder / "model.safetensors", folder / "config.json"
    config = json.loads(settings.read_text(encoding="utf-8"))
    if config["model_type"] != "clip_text_model":
        return
    tensors = load_file(weights)
    renamed = {_old_name(name): _widened(name, tensor) for name, tensor in tensors.items()}
    write_durably(weights, lambda path: save_file(renamed, path, metadata={"format": "pt"}))
    config["max_position_embeddings"] = POSITIONS
    write_text_durably(settings, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _old_name(name: str) -> str:
    return name if name.startswith((PREFIX, "text_projection.")) else PREFIX + name


def _widened(name: str, tensor: Tensor) -> Tensor:
    """The table of positions with zero rows behind the trained ones; any other tensor as it is."""
    if not name.endswith(_TABLE):
        return tensor
    missing = POSITIONS - len(tensor)
    return functional.pad(tensor, (0, 0, 0, missing)) if missing > 0 else tensor
