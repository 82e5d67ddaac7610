"""Rebuild the package data of fewstep.fashion from the Fashion-MNIST idx files.

Every part continues where it was stopped: training from its checkpoint in --work, at most two minutes old.
"""

import argparse
import os
import sys
from pathlib import Path

import torch

from fewstep.errors import UserError
from fewstep.eval.fashion import idx, teachers
from fewstep.eval.fashion.files import save_classifier, save_images, save_pipeline
from fewstep.eval.fashion.inpainting import train_inpaint
from fewstep.eval.fashion.latents import scaled_latents
from fewstep.eval.fashion.train_autoencoder import train_autoencoder
from fewstep.eval.fashion.train_classifier import train_classifier
from fewstep.fashion import TEACHERS
from fewstep.fashion.files import HELD_BACK_IMAGES, TRAINING_IMAGES

PARTS = ("classifier", "autoencoder", "sd", "flow", "inpaint", "reference", "sweep", "table", "all")


def _teacher(kind: str, data: idx.Dataset, work: Path) -> None:
    """Train one teacher on the shared autoencoder's latents and save its pipeline."""
    autoencoder = train_autoencoder(data.train, work)
    latents = scaled_latents(autoencoder, data.train, work)
    # Before the networks are made: their first weights must not depend on what was done before.
    torch.manual_seed(2)
    teacher = teachers.SDTeacher() if kind == "sd" else teachers.FlowTeacher()
    name = f"fashion-{kind}"
    teachers.train_teacher(teacher, name, latents, data.train.labels, work)
    print(save_pipeline(teacher.pipeline(autoencoder), name))


def _build(part: str, data: idx.Dataset, work: Path, names: list[str], num: int | None) -> None:
    if part in ("classifier", "all"):
        save_classifier(train_classifier(data.train, work))
        save_images(idx.shipped(data.train), TRAINING_IMAGES)
    if part in ("autoencoder", "all"):
        train_autoencoder(data.train, work)
    for kind in ("sd", "flow"):
        if part in (kind, "all"):
            _teacher(kind, data, work)
    if part in ("inpaint", "all"):
        save_images(data.held_back, HELD_BACK_IMAGES)
        print(save_pipeline(train_inpaint(data.train, work), "fashion-inpaint"))
    if part not in ("reference", "sweep", "table", "all"):
        return
    # Here, so that training does not wait for the evaluation package.
    from fewstep.eval.fashion import measure

    if part in ("reference", "all"):
        print(measure.write_reference(data))
    for name in names:
        if part == "sweep":
            measure.sweep(name)
        if part in ("table", "all"):
            measure.write_table(name, num or measure.TABLE_SAMPLES)


def main() -> int:
    """The command line; returns the exit code: 2 for what the user can mend, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="python -m fewstep.eval.fashion.build", description=__doc__)
    parser.add_argument("part", choices=PARTS, help="what to build; all: everything but the sweep, in order")
    parser.add_argument("--data", type=Path, default=idx.DEFAULT_FOLDER, help="folder of the four idx files")
    parser.add_argument("--work", type=Path, default=Path("runs/fashion"), help="folder for checkpoints and latents")
    parser.add_argument("--teacher", choices=list(TEACHERS), help="for sweep and table: only this one")
    parser.add_argument("--num", type=int, help="for table: samples in a row, default 5000")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads to compute with")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        names = [arguments.teacher] if arguments.teacher else list(TEACHERS)
        _build(arguments.part, idx.load(arguments.data), arguments.work, names, arguments.num)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
