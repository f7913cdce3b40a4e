"""An ATM SAE read from a training checkpoint, for inference, with its importance scores."""

from dataclasses import asdict
from typing import Any, cast

import torch
from sae_lens import JumpReLUSAE
from sae_lens.util import filter_valid_dataclass_fields
from torch import Tensor
from typing_extensions import override

from sae_lens_atm.method.importance import ExactBuffers
from sae_lens_atm.sae.atm_sae import ATMTrainingSAE
from sae_lens_atm.sae.config import ATMSAEConfig, ATMTrainingSAEConfig


class ATMSAE(ExactBuffers, JumpReLUSAE):
    """An ATM SAE for inference, read from a training checkpoint: a JumpReLU SAE that knows how
    important each of its latents was."""

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
        """Take the tensors of a training checkpoint, or of an ATMSAE saved before."""
        super().process_state_dict_for_loading(state_dict)
        if "importance" in state_dict:
            state_dict["importance"] = state_dict["importance"].float()
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
                "this SAE's cfg.json says architecture 'atm', but its metadata lacks the "
                "training_architecture_details that a training checkpoint holds"
            )
        known: dict[str, Any] = {**asdict(self.cfg), **details}
        known |= {"device": "meta", "metadata": self.cfg.metadata}
        return ATMTrainingSAEConfig(**filter_valid_dataclass_fields(known, ATMTrainingSAEConfig))
