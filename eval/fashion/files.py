"""Write the package data, and the manifest with the hash of every file."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline, ModelMixin
from safetensors.torch import save_file

from fewstep.data.durable import write_text_durably
from fewstep.eval.fashion.idx import Split
from fewstep.eval.fashion.text import write_old_vocabulary
from fewstep.eval.fashion.text_encoder_files import write_for_all_readers
from fewstep.export.folder import written
from fewstep.fashion.classifier import FashionClassifier
from fewstep.fashion.files import CLASSIFIER, DATA, MANIFEST, sha256

CITATION = (
    "Han Xiao, Kashif Rasul, Roland Vollgraf: Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning "
    "Algorithms, arXiv:1708.07747, 2017"
)
ABOUT = {
    "dataset": "Fashion-MNIST, https://github.com/zalandoresearch/fashion-mnist",
    "dataset_licence": "MIT, copyright 2017 Zalando SE, https://tech.zalando.com",
    "citation": CITATION,
    "split": "55,000 training images train everything; 5,000 (500 a class) are held back and train nothing; "
    "the 10,000 test images are the reference",
}


def save_classifier(classifier: FashionClassifier) -> None:
    """Its weights, in float32."""
    DATA.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in classifier.state_dict().items()}, DATA / CLASSIFIER)
    write_manifest({})


def save_images(images: Split, name: str) -> None:
    """Shipped images without their black border, compressed; loads without pickle."""
    DATA.mkdir(parents=True, exist_ok=True)
    with open(DATA / name, "wb") as file:
        np.savez_compressed(
            file, images=images.images[:, 0, 2:-2, 2:-2].numpy(), labels=images.labels.numpy().astype(np.uint8)
        )


def save_pipeline(pipeline: DiffusionPipeline, name: str) -> Path:
    """Save as ``data/<name>``: the denoiser and the autoencoder in half precision, the text encoders in single.

    diffusers brings its own models back in float32 whatever the file holds; transformers keeps the file's type.
    """
    folder = DATA / name
    single: dict[str, ModelMixin] = {
        key: value for key, value in pipeline.components.items() if isinstance(value, ModelMixin)
    }
    pipeline.register_modules(**{key: copy.deepcopy(value).half() for key, value in single.items()})
    with written(folder) as unfinished:
        try:
            pipeline.save_pretrained(unfinished)
        finally:
            pipeline.register_modules(**single)
        for path in unfinished.rglob("*.json"):
            _drop_origin(path)
        for path in unfinished.glob("tokenizer*"):
            write_old_vocabulary(path)
        for path in unfinished.glob("text_encoder*"):
            write_for_all_readers(path)
    write_manifest({})
    return folder


def _drop_origin(path: Path) -> None:
    """Remove the folder a component was loaded from: a path of the building machine."""
    content = json.loads(path.read_text())
    if content.pop("_name_or_path", None) is not None:
        path.write_text(json.dumps(content, indent=2) + "\n")


def write_manifest(facts: dict[str, Any]) -> None:
    """Merge ``facts`` into the manifest and hash every file of the data folder anew."""
    path = DATA / MANIFEST
    manifest = json.loads(path.read_text()) if path.is_file() else {}
    manifest = {**manifest, **ABOUT, **facts}
    manifest["files"] = {
        str(file.relative_to(DATA)): {"sha256": sha256(file), "bytes": file.stat().st_size}
        for file in sorted(DATA.rglob("*"))
        if file.is_file() and file != path and not _is_hidden(file.relative_to(DATA))
    }
    write_text_durably(path, json.dumps(manifest, indent=2) + "\n")


def _is_hidden(path: Path) -> bool:
    """Whether it is, or lies in, what a killed build left unfinished."""
    return any(part.startswith(".") for part in path.parts)
