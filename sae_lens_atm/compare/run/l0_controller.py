"""Control of the L0 during training, for architectures without a config field that is the L0."""

import math
from typing import Any

from sae_lens import SAETrainer
from sae_lens.saes.sae import TrainStepOutput
from typing_extensions import override

from sae_lens_atm.compare.plan.l0_target import L0Parameter
from sae_lens_atm.sae.forward_pass import mean_l0
from sae_lens_atm.training.supervise import Hook

GAIN = 0.005
PROPORTIONAL = 0.5
LIMIT = 30.0


class L0Controller(Hook):
    """Changes a parameter in each step until the L0 is the target.

    The parameter is a coefficient of the loss, or a number of the SAE's config that is read in
    each step. Larger values give fewer active latents.

    With ``e_t = log(L0_t / target)``, clipped to [-1, 1], the value after step t is
    ``exp(s_t + p e_t)`` with ``s_t = s_{t-1} + g_t e_t``. This is a proportional-integral
    controller of the logarithm of the value. ``g_t`` falls with the learning rate, since the SAE
    then reacts more slowly. The first value is the config's. ``s_t`` is kept in [-LIMIT, LIMIT].
    During a coefficient's own warm-up nothing changes.
    """

    def __init__(
        self, trainer: SAETrainer[Any, Any], parameter: L0Parameter, target: float
    ) -> None:
        self._trainer = trainer
        self._target = target
        self._scheduler = trainer.coefficient_schedulers.get(parameter.name)
        self._name = parameter.name
        self._integral = math.log(max(self.value, 1e-8))

    @property
    def value(self) -> float:
        """The present value of the parameter."""
        if self._scheduler is not None:
            return float(self._scheduler.final_value)
        return float(getattr(self._trainer.sae.cfg, self._name))

    def _set(self, value: float) -> None:
        if self._scheduler is not None:
            self._scheduler.final_value = self._scheduler.current_value = value
        else:
            setattr(self._trainer.sae.cfg, self._name, value)

    @override
    def after_step(self, output: TrainStepOutput) -> None:
        """Set the parameter for the next step from the L0 of this one."""
        scheduler = self._scheduler
        if scheduler is not None and scheduler.current_step < scheduler.warm_up_steps:
            return
        l0 = float(mean_l0(output.feature_acts))
        error = max(-1.0, min(1.0, math.log(max(l0, 1e-6) / self._target)))
        rate = self._trainer.optimizer.param_groups[0]["lr"] / self._trainer.cfg.lr
        self._integral = max(-LIMIT, min(LIMIT, self._integral + GAIN * rate * error))
        self._set(math.exp(self._integral + PROPORTIONAL * error))

    def state_dict(self) -> dict[str, float]:
        """Return the state that a checkpoint needs."""
        return {"integral": self._integral, "value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore a state, after the trainer's own state was loaded."""
        self._integral = state["integral"]
        self._set(state["value"])
        if self._scheduler is not None:  # its own warm-up may not be over
            self._scheduler.load_state_dict({})
