"""A whole run, and what it had in its hands when it exported its student."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fewstep.config.run import RunConfig
from fewstep.export.student import Written
from fewstep.networks.roles import Role
from fewstep.programs import distillation
from fewstep.programs.workbench import Workbench


@dataclass(frozen=True)
class WholeRun:
    """A finished run.

    Attributes:
        folder: of its student.
        bench: that its method was prepared at.
        role: that was exported.
    """

    folder: Path
    bench: Workbench
    role: Role


def whole_run(config: RunConfig, method: str, pipeline: Any = None) -> WholeRun:
    """``fewstep distill``, through to the exported student."""
    export, seen = distillation.export, []

    def note(bench: Workbench, method: str, role: Role, *rest: Any) -> Written:
        seen.append((bench, role))
        return export(bench, method, role, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "export", note)
        folder = distillation.run(config, method, pipeline)
    (found,) = seen
    return WholeRun(folder, *found)
