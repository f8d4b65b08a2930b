"""Fine-tuning is initialisation: another run's parameters, adapted to this run's model."""

from vit_scale.pretrained.adapt import Placement, adapt, table
from vit_scale.pretrained.runs import Pretrained, read

__all__ = ["Placement", "Pretrained", "adapt", "read", "table"]
