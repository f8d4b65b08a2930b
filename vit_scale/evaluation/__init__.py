"""Probes: how good a model's features are, without its head.

`probe` measures features of a labelled set by weighted kNN, linear classifiers on all and on a few
examples, and statistics. Guarantees: every readable example counts once; predictions of kNN don't
depend on the mesh, the batch or the number of hosts; kNN and the linear classifier equal
scikit-learn's; an accuracy comes with its number of examples, an interval, and its settings.
"""

from vit_scale.evaluation.features import KINDS, Extract, Features, Layer, NotFinite
from vit_scale.evaluation.knn import KNN
from vit_scale.evaluation.probing import PROBES, Settings, accuracy_rows, probe

__all__ = [
    "KINDS",
    "KNN",
    "PROBES",
    "Extract",
    "Features",
    "Layer",
    "NotFinite",
    "Settings",
    "accuracy_rows",
    "probe",
]
