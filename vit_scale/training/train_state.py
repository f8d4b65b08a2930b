"""The train state: what a step takes and returns, and what a checkpoint holds."""

from typing import Any, NamedTuple

from vit_scale.models.parameters import of_model


class TrainState(NamedTuple):
    """Everything that changes from step to step, and nothing else."""

    step: Any  # int32, number of finished steps
    params: Any  # nested dict; running statistics of batch normalisation included
    opt_state: Any
    ema: Any  # exponential moving average of the parameters, or None
    objective: Any = None  # the objective's own state, or None

    @property
    def eval_params(self) -> Any:
        """The model's parameters to evaluate and export: the average where the run keeps one."""
        return of_model(self.params if self.ema is None else self.ema)
