"""The inference class of "atm": an SAE loaded from a training checkpoint, with its importance."""

from dataclasses import asdict
from typing import Any, cast

import torch
from sae_lens import JumpReLUSAE
from sae_lens.util import filter_valid_dataclass_fields
from torch import Tensor
from typing_extensions import override

from sae_lens_atm.method.buffers import ExactBuffers
from sae_lens_atm.sae.atm_sae import ATMTrainingSAE
from sae_lens_atm.sae.config import ATMSAEConfig, ATMTrainingSAEConfig


class ATMSAE(ExactBuffers, JumpReLUSAE):
    """A JumpReLU SAE loaded from an ATM checkpoint, with the importance of each latent."""

    cfg: ATMSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    importance: Tensor
    """``Importance_i`` at the end of training, float32, shape ``(d_sae,)``."""
    exact_buffers = ("importance",)

    def __init__(self, cfg: ATMSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        importance = torch.zeros(cfg.d_sae, dtype=torch.float32, device=self.device)
        self.register_buffer("importance", importance)

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        """Convert the tensors of a training checkpoint, or of a saved `ATMSAE`."""
        super().process_state_dict_for_loading(state_dict)
        if "importance" in state_dict:
            return
        cfg = self._training_config()
        sae = cast(Any, ATMTrainingSAE)(cfg)  # an instance of the subclass for its activation
        sae.process_state_dict_for_loading(state_dict)
        sae.load_state_dict(state_dict, assign=True)
        state_dict.clear()
        state_dict.update(sae.inference_state(), importance=sae.importance)

    def _training_config(self) -> ATMTrainingSAEConfig:
        details = self.cfg.metadata.training_architecture_details
        if not details:
            raise ValueError(
                "cfg.json has the architecture 'atm', but its metadata has no "
                "training_architecture_details: it is not an ATM checkpoint"
            )
        if details.get("activation") == "jumprelu":
            raise ValueError(
                "activation is 'jumprelu', which was removed in 0.2: load the checkpoint with "
                "sae-lens-atm 0.1 and save it with save_inference_model"
            )
        # The fields of training schedules, also removed ones, have no effect on inference.
        known: dict[str, Any] = {**asdict(self.cfg), **details}
        known |= {"device": "meta", "metadata": self.cfg.metadata}
        return ATMTrainingSAEConfig(**filter_valid_dataclass_fields(known, ATMTrainingSAEConfig))
