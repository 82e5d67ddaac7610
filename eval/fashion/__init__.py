"""How the embedded teachers and the metric were made: ``python -m fewstep.eval.fashion.build all``."""
