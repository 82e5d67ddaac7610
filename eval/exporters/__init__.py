"""A row's samples in the folder layouts of benchmarks that need an environment of their own."""

from fewstep.eval.exporters.benchmarks import Item, read_items
from fewstep.eval.exporters.samples import Sample
from fewstep.eval.exporters.table import EXPORTERS, Exported, export

__all__ = ["EXPORTERS", "Exported", "Item", "Sample", "export", "read_items"]
