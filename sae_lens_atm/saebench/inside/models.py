"""Load the model and the SAE for SAEBench. Runs in either environment."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from transformer_lens import HookedTransformer


def load_model(model: str, device: str, dtype: torch.dtype) -> Any:
    """Load a model as SAEBench does, from the Hub or from a folder with a transformers model."""
    folder = Path(model)
    if not folder.is_dir():
        return HookedTransformer.from_pretrained_no_processing(model, device=device, dtype=dtype)
    from transformer_lens.model_bridge import TransformerBridge  # not in TransformerLens 2

    bridge = TransformerBridge.boot_transformers(model, device=device, dtype=dtype)
    bridge.cfg.model_name = folder.name  # SAEBench uses the name in paths
    return bridge


def load_sae(folder: Path, device: str, dtype: torch.dtype) -> Any:
    """Load an SAE for SAEBench: with unit decoder rows and TransformerLens' name of the hook."""
    sae = SAE.load_from_disk(folder, device=device)
    with suppress(NotImplementedError):  # as SAEBench does
        sae.fold_W_dec_norm()
    metadata = sae.cfg.metadata
    metadata.hook_name = hooked_name(metadata.hook_name)
    if metadata.prepend_bos is None:
        metadata.prepend_bos = True
    return sae.to(device=device, dtype=dtype)


def hooked_name(hook_name: str) -> str:
    """Return TransformerLens' name of a hook.

    The output of a whole layer of a transformers model, such as `model.layers.12`, is the residual
    stream after the layer.
    """
    layer = re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)$", hook_name)
    return f"blocks.{layer[1]}.hook_resid_post" if layer else hook_name
