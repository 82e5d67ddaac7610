"""Numbers for each sample: how well it fits its prompt, how much people would like it, its colours and its motion."""

from fewstep.eval.scorers.scorer import Scorer
from fewstep.eval.scorers.table import SCORERS, open_scorer

__all__ = ["SCORERS", "Scorer", "open_scorer"]
