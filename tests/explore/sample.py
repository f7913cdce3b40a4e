"""Small SAEs, readings with known values, and a page."""

from pathlib import Path

import numpy as np
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from scipy.sparse import csc_matrix, csr_matrix

from sae_lens_atm.explore.content import Material, Subject, describe, write_page
from sae_lens_atm.explore.examples import WINDOW
from sae_lens_atm.explore.promoted import Promoted
from sae_lens_atm.explore.reading import Reading, Tokens, read_tokens
from sae_lens_atm.explore.strings import Strings
from sae_lens_atm.explore.wording import TEXT
from sae_lens_atm.method.importance import Signals


def linear_sae(decoder, encoder=None):
    """An SAE whose activations are relu(x @ encoder). The encoder is the decoder's transpose."""
    decoder = torch.as_tensor(decoder, dtype=torch.float32)
    cfg = StandardSAEConfig(d_in=decoder.shape[1], d_sae=decoder.shape[0])
    sae = StandardSAE(cfg)
    with torch.no_grad():
        sae.W_dec.copy_(decoder)
        sae.W_enc.copy_(decoder.T if encoder is None else torch.as_tensor(encoder))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae


def read(sae, x, batch=3, context_size=4, **options):
    """Read activations, one row for each token, all tokens of all contexts."""
    ids = np.arange(len(x), dtype=np.int32).reshape(-1, context_size)
    places = np.arange(len(x))
    parts = [slice(i, i + batch) for i in range(0, len(x), batch)]
    batches = ((places[part], x[part]) for part in parts)
    return read_tokens([sae], Tokens(ids, len(x), batches), lambda _: None, **options)[0]


def reading_of(acts, decoder=None, inputs=None):
    """A reading with these activations of shape (rows, latents)."""
    acts = np.asarray(acts, dtype=np.float32)
    rows, d_sae = acts.shape
    decoder = torch.eye(d_sae) if decoder is None else torch.as_tensor(decoder).float()
    x = torch.from_numpy(acts) @ decoder if inputs is None else inputs
    means = torch.from_numpy(acts).mean(0)
    return Reading(
        places=np.arange(rows),
        acts=csc_matrix(acts),
        decoder=decoder,
        signals=Signals(means, torch.from_numpy((acts > 0).mean(0)).float(), means),
        inputs=torch.from_numpy(acts).T @ x / rows,
        mean_input=x.mean(0),
        variance=1.0,
        explained_variance=1.0,
        is_signed=False,
        left_out=0,
    )


ODD = "<script>document.title='odd'</script>"
SIZE = 10  # tokens of a context
PARENT, CHILD, GRANDCHILD, DEAD, DENSE = range(5)


def family():
    """A parent, its child which absorbs it, a grandchild, a dead latent, a dense one, and others.

    Where the child fires, the parent is silent on 8 of 10 tokens.
    """
    acts = np.zeros((1000, 12))
    acts[:60, PARENT] = np.linspace(2, 3, 60)
    acts[58:68, CHILD] = 2
    acts[66:68, GRANDCHILD] = 1
    acts[:, DENSE] = 0.5
    for latent in range(5, 12):
        acts[40 * latent :: 97, latent] = latent
    decoder = torch.eye(12)
    decoder[CHILD, PARENT] = decoder[GRANDCHILD, CHILD] = decoder[GRANDCHILD, PARENT] = 1
    return reading_of(acts, decoder)


def write_sample(
    path,
    reading=None,
    name="my-sae",
    found=None,
    promoted=True,
    megabytes=20,
    letters=None,
    beside=None,
    over_training=None,
):
    """Write a page of a reading, or of two. Token 3 is `ODD`, the others are words."""
    readings = [family() if reading is None else reading, *([] if beside is None else [beside])]
    rows = readings[0].rows
    flat = (np.arange(rows) * 7 % 50).astype(np.int32)
    occurs = csr_matrix((np.ones(rows, np.float32), (flat, np.arange(rows))), (50, rows))
    tokens = np.arange(3, 11, dtype=np.uint32)
    subjects, described = [], []
    for place, one in enumerate(readings):
        shape = (len(one.decoder), 1)
        logits = np.tile(np.linspace(2, 1, 8, dtype=np.float32), shape)
        of_rows = Promoted(np.tile(tokens, shape), logits, np.tile(tokens + 20, shape), -logits)
        subject = Subject(
            name if place == 0 else "other", linear_sae(one.decoder), found, over_training
        )
        subjects.append(subject)
        shown = of_rows if promoted else None
        content = describe(subject, one, occurs, shown, TEXT, lambda _: None)
        described.append(content._replace(letters=letters))
    strings = Strings([flat, tokens, tokens + 20])
    texts = [ODD if token == 3 else f" word{token}" for token in strings.used.tolist()]
    contexts = {"tokens": strings.small_index(flat), "size": SIZE, "around": WINDOW}
    facts, notices = {"model": "none"}, ["A notice."]
    material = Material(TEXT, lambda _: contexts, strings, texts, SIZE, facts, notices)
    return write_page(subjects, described, material, Path(path), megabytes, lambda _: None)
