"""How to call a pipeline's denoiser, learnt by watching the pipeline run, and proved against it."""

from fewstep.recording.errors import RecordingError
from fewstep.recording.guidance.report import GuidanceReport
from fewstep.recording.proof.proof import Proof
from fewstep.recording.recipe import Recipe
from fewstep.recording.recorder import record
from fewstep.recording.recording import Recording

__all__ = ["GuidanceReport", "Proof", "Recipe", "Recording", "RecordingError", "record"]
