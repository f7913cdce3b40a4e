"""Compare our export for Neuronpedia with SAEDashboard's own output, on the same tokens.

It runs in an environment of its own with `pip install sae-dashboard`, which does not need this
package. The model is a spelling model, as `explore_hierarchy.ipynb` leaves it:

    sae-lens-atm explore my-sae --on run.yaml --tokens 9600 --neuronpedia export
    python benchmarks/neuronpedia_export.py spelling-lm my-sae export
"""

import json
import sys
from pathlib import Path

import pyarrow.ipc
import torch
from sae_dashboard.components_config import (
    ActsHistogramConfig,
    Column,
    FeatureTablesConfig,
    LogitsHistogramConfig,
    LogitsTableConfig,
    SequencesConfig,
)
from sae_dashboard.layout import SaeVisLayoutConfig
from sae_dashboard.neuronpedia.neuronpedia_converter import NeuronpediaConverter
from sae_dashboard.neuronpedia.neuronpedia_dashboard import NeuronpediaDashboardBatch
from sae_dashboard.neuronpedia.neuronpedia_runner_config import NeuronpediaRunnerConfig
from sae_dashboard.sae_vis_data import SaeVisConfig
from sae_dashboard.sae_vis_runner import SaeVisRunner
from sae_lens import SAE
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

HOOK = "blocks.0.hook_resid_post"


def hooked(folder: str) -> HookedTransformer:
    """Return the GPT-2 of a folder as a model of TransformerLens."""
    model = GPT2LMHeadModel.from_pretrained(folder)
    names = json.loads((Path(folder) / "tokenizer_config.json").read_text())
    special = {name: names[name] for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json", **special)
    of = model.config
    cfg = HookedTransformerConfig(
        n_layers=of.n_layer,
        d_model=of.n_embd,
        n_ctx=of.n_positions,
        d_head=of.n_embd // of.n_head,
        n_heads=of.n_head,
        d_vocab=of.vocab_size,
        act_fn="gelu_new",
        normalization_type="LN",
        eps=of.layer_norm_epsilon,
        device="cpu",
    )
    made = HookedTransformer(cfg)
    made.tokenizer = tokenizer  # given to the constructor, it would be looked up on the Hub
    state = convert_gpt2_weights(model, cfg)
    made.load_and_process_state_dict(state, fold_ln=True, center_writing_weights=False)
    return made


def their_features(model: HookedTransformer, sae: SAE, tokens: torch.Tensor) -> dict[int, dict]:
    """Return what SAEDashboard writes of the latents, by number."""
    columns = [
        SequencesConfig(stack_mode="stack-all", buffer=None, compute_buffer=True),
        ActsHistogramConfig(),
        LogitsHistogramConfig(),
        LogitsTableConfig(),
        FeatureTablesConfig(n_rows=3),
    ]
    config = SaeVisConfig(
        hook_point=HOOK,
        features=list(range(sae.cfg.d_sae)),
        minibatch_size_tokens=len(tokens),
        feature_centric_layout=SaeVisLayoutConfig(columns=[Column(*columns)]),
        device="cpu",
        dtype="float32",
    )
    data = SaeVisRunner(config).run(encoder=sae, model=model, tokens=tokens)
    settings = NeuronpediaRunnerConfig(sae_set="", sae_path="", outputs_dir="")
    words = {number: word for word, number in model.tokenizer.get_vocab().items()}
    batch = json.loads(NeuronpediaConverter.convert_to_np_json(model, data, settings, words))
    return {feature["feature_index"]: feature for feature in batch["features"]}


def main() -> None:
    model_folder, sae_folder, export = sys.argv[1:]
    model, sae = hooked(model_folder), SAE.load_from_disk(sae_folder)
    batches = [json.loads(path.read_text()) for path in sorted(Path(export).glob("batch-*.json"))]
    for batch in batches:  # SAEDashboard's classes take each name, and lose none
        assert NeuronpediaDashboardBatch(**batch).to_dict() == batch
    ours = {feature["feature_index"]: feature for batch in batches for feature in batch["features"]}
    rows = next(iter(ours.values()))["n_prompts_total"]
    (path,) = Path(model_folder, "tokens").glob("*.arrow")
    table = pyarrow.ipc.open_stream(path).read_all()  # their datasets is older than the files
    tokens = torch.tensor(table["tokens"].to_pylist()[:rows])
    theirs = their_features(model, sae, tokens)
    shares, largest, promoted, names = [], [], [], None
    for number, one in ours.items():
        other = theirs[number]
        names = set(other) if names is None else names
        assert set(one) == names
        shares.append(abs(one["frac_nonzero"] - other["frac_nonzero"]))
        tops = [max(max(a["values"]) for a in f["activations"]) for f in (one, other)]
        largest.append(abs(tops[0] - tops[1]) / tops[1])
        promoted.append(len({*one["pos_str"]} & {*other["pos_str"]}) / len(one["pos_str"]))
    print(f"{len(ours)} latents on {tokens.numel():,} tokens")
    print(f"share of tokens: largest difference {max(shares):.2g}")
    print(f"largest activation: largest relative difference {max(largest):.2g}")
    print(f"promoted tokens that SAEDashboard names, too: {sum(promoted) / len(promoted):.1%}")


if __name__ == "__main__":
    main()
