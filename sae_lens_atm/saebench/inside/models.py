"""Load the model and the SAE for SAEBench. Runs in either environment."""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from sae_lens import SAE
from safetensors.torch import load_file, save_file
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import AutoTokenizer

CONFIG = "hooked_transformer.json"
WEIGHTS = "hooked_transformer.safetensors"
_NOT_SAVED = ("device", "dtype", "seed", "tokenizer_name")  # they depend on where it is loaded


def save_hooked_transformer(model: HookedTransformer, folder: Path) -> None:
    """Write a HookedTransformer and its tokenizer in the format that `load_model` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = model.cfg.to_dict()
    cfg = {name: v for name, v in fields.items() if name not in _NOT_SAVED and _plain(v)}
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / WEIGHTS)
    cast(Any, model.tokenizer).save_pretrained(folder)
    (folder / CONFIG).write_text(json.dumps(cfg, indent=1), encoding="utf-8")


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | list | dict)


def load_model(model: str, device: str, dtype: torch.dtype) -> Any:
    """Load a model as SAEBench does, from the Hub or from a local folder.

    The folder holds a transformers model, or was written by `save_hooked_transformer`.
    """
    folder = Path(model)
    if not folder.is_dir():
        return HookedTransformer.from_pretrained_no_processing(model, device=device, dtype=dtype)
    if not (folder / CONFIG).is_file():
        from transformer_lens.model_bridge import TransformerBridge  # not in TransformerLens 2

        bridge = TransformerBridge.boot_transformers(model, device=device, dtype=dtype)
        bridge.cfg.model_name = folder.name  # SAEBench uses the name in paths
        return bridge
    fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    cfg = HookedTransformerConfig(**fields, device=device, dtype=dtype)
    hooked = HookedTransformer(cfg, tokenizer=AutoTokenizer.from_pretrained(folder))
    hooked.load_state_dict(load_file(folder / WEIGHTS, device=device))
    return hooked.to(dtype).eval()


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
