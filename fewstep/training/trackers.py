"""Accelerate's trackers (TensorBoard, W&B, ...), each on its own: one that fails ends neither the run nor others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType, is_tensorboard_available
from PIL import Image

from fewstep.errors import UserError, first_line

logger = logging.getLogger("fewstep")

#: Of runs in trackers that sort them by project; TensorBoard's are sorted by folder.
PROJECT = "fewstep"


def trackers(report_to: str) -> list[str] | None:
    """The names of accelerate's trackers that ``--report_to`` asks for; None for none.

    Raises:
        UserError: accelerate knows no such tracker, or its package is not installed.
    """
    if report_to == "none":
        return None
    if report_to == "auto":
        return ["tensorboard"] if is_tensorboard_available() else None
    names = [name.strip() for name in report_to.split(",")]
    known = sorted(str(kind) for kind in LoggerType if kind != LoggerType.ALL)
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--report_to {unknown[0]!r}: it is auto, none, or among {', '.join(known)}")
    # accelerate passes over a tracker that is not installed without a word.
    installed = {str(kind) for kind in get_available_trackers()}
    if missing := [name for name in names if name not in installed]:
        raise UserError(f"--report_to {missing[0]}: that tracker is not installed; install it, or leave it out")
    return names


class Trackers:
    """The trackers of one run; none before :meth:`start`.

    Args:
        accelerator: of the launch; which trackers are wanted, and on which process they act.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def start(self, out: Path, settings: Mapping[str, Any]) -> None:
        """Start each wanted tracker, and tell it the run's settings.

        Args:
            out: the run's folder: TensorBoard writes into ``out/logs``, and others call the run by the folder's name.
            settings: of the run, by name.
        """
        accelerator = self._accelerator
        wanted, started = list(accelerator.log_with), []
        # What every tracker takes are numbers and words.
        told = {name: v if isinstance(v, bool | int | float | str) else str(v) for name, v in settings.items()}
        for kind in wanted:
            name = str(kind)
            options = {"wandb": {"name": out.name, "dir": str(out)}, "mlflow": {"run_name": out.name}}.get(name, {})
            project = "logs" if name == "tensorboard" else PROJECT
            accelerator.log_with, accelerator.trackers = [kind], []  # all at once, the first that fails ends the rest
            if self._alive(name, partial(accelerator.init_trackers, project, told, {name: options})):
                started += accelerator.trackers
        accelerator.log_with, accelerator.trackers = wanted, started

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one step, by name."""
        self._each(lambda tracker: tracker.log(dict(values), step=step))

    def log_picture(self, step: int, name: str, file: Path) -> None:
        """A picture, to those that take pictures."""
        pixels = np.asarray(Image.open(file).convert("RGB"))

        def show(tracker: GeneralTracker) -> None:
            if tracker.name == "tensorboard":
                tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
            elif tracker.name in ("aim", "clearml"):  # the others' list is one picture to them
                tracker.log_images({name: pixels}, step=step)
            elif hasattr(tracker, "log_images"):
                tracker.log_images({name: [pixels]}, step=step)

        self._each(show)

    def finish(self) -> None:
        """End the trackers, but not the process group, as accelerate's ``end_training`` would."""
        self._each(lambda tracker: tracker.finish())
        self._accelerator.trackers = []

    def _each(self, action: Callable[[GeneralTracker], None]) -> None:
        trackers = self._accelerator.trackers
        self._accelerator.trackers = [t for t in trackers if self._alive(t.name, partial(action, t))]

    def _alive(self, name: str, action: Callable[[], None]) -> bool:
        try:
            action()
        except Exception as error:  # whatever that tracker's library raises: a run is worth more than its curves
            logger.warning("the tracker %s failed (%s); the run goes on without it", name, first_line(error))
            return False
        return True
