"""What a checkpoint of the loop says beside its tensors, looked at before anybody goes on from it.

Its digest shows that it is what was written, but not by whom: an older version, or another program, may have said less.
"""

from __future__ import annotations

from typing import Any

from fewstep.errors import UserError
from fewstep.reading import misfit
from fewstep.training.best import misfit_of_state
from fewstep.training.checkpoint import Found

_KINDS = {"method": str, "processes": int, "renewed_at": dict, "batch": dict, "owed": dict, "evaluation": dict}
_BATCH = {"samples": int, "given": list}


def counters(found: Found) -> dict[str, Any]:
    """The state of a checkpoint, which has what the loop needs of it.

    Returns:
        ``step``; ``method``, a name; ``processes`` that wrote it; ``renewed_at``, a step for each trained role; perhaps
        ``batch`` (:meth:`fewstep.training.shares.Share.state`), ``owed``: the numbers of a line of the log that is
        yet to be written, and ``evaluation`` (:meth:`fewstep.training.best.Best.state`).

    Raises:
        UserError: something is missing, or is of another kind.
    """
    state = found.state
    wrong = misfit(state, _KINDS, ("batch", "owed", "evaluation"))
    if wrong is None:
        renewed, batch, owed = state["renewed_at"], state.get("batch"), state.get("owed", {})
        wrong = misfit(renewed, dict.fromkeys(renewed, int)) or misfit(owed, dict.fromkeys(owed, (int, float)))
        if batch is not None:
            wrong = wrong or misfit(batch, _BATCH)
            wrong = wrong or ("its samples are none" if batch["samples"] < 1 else None)
        wrong = wrong or misfit_of_state(state.get("evaluation"))
        wrong = wrong or ("its processes are none" if state["processes"] < 1 else None)
    if wrong is not None:
        raise UserError(
            f"{found.folder / 'state.json'} is not what this version of fewstep writes ({wrong}); remove that folder "
            "to go on from an older checkpoint, or choose another --out"
        )
    return state
