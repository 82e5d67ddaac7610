"""How to call a pipeline's denoiser, learnt by watching the pipeline run, and proved against it."""

from fewstep.recording.errors import RecordingError
from fewstep.recording.guidance_report import GuidanceReport
from fewstep.recording.proof import Proof
from fewstep.recording.recipe import Recipe
from fewstep.recording.recorder import record
from fewstep.recording.recording import Recording

__all__ = ["GuidanceReport", "Proof", "Recipe", "Recording", "RecordingError", "record"]
