"""The content of the page: figures, pairs and contexts of SAEs, as many as the file may hold."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sae_lens import SAE

from sae_lens_atm.errors import SettingsError
from sae_lens_atm.explore.beside import SAME, match
from sae_lens_atm.explore.examples import Amount, find_examples
from sae_lens_atm.explore.found_parents import FoundParents
from sae_lens_atm.explore.hierarchy import (
    Pairs,
    describe_pairs,
    find_pair_examples,
    implied_pairs,
)
from sae_lens_atm.explore.latents import DENSE, Latents, describe_latents
from sae_lens_atm.explore.letters import Letter
from sae_lens_atm.explore.over_training import OverTraining
from sae_lens_atm.explore.page import page_html
from sae_lens_atm.explore.promoted import Promoted
from sae_lens_atm.explore.reading import Reading, Sparse
from sae_lens_atm.explore.strings import Strings
from sae_lens_atm.explore.wording import (
    Words,
    parents_found_here,
    parents_found_in_training,
)
from sae_lens_atm.files import write_text
from sae_lens_atm.method.importance import Signals
from sae_lens_atm.training.phases import OnPhase, Phase

_AMOUNTS = (
    *(Amount(10, 2, 4), Amount(8, 1, 3), Amount(5, 1, 2), Amount(4, 1, 1)),
    *(Amount(3, 0, 1), Amount(2, 0, 0), Amount(1, 0, 0), Amount(0, 0, 0)),
)
"""How many contexts a page has: the first for which it is small enough."""


class Subject(NamedTuple):
    """An SAE that is looked at."""

    name: str
    sae: SAE[Any]
    found: FoundParents | None
    """The parents from a checkpoint."""
    over_training: OverTraining | None = None


class Described(NamedTuple):
    """What is known of an SAE before the contexts are chosen."""

    reading: Reading
    latents: Latents
    promoted: Promoted | None
    pairs: Pairs
    parents_from: str
    letters: list[Letter] | None = None


class Material(NamedTuple):
    """What the SAEs read, for the page."""

    words: Words
    contexts: Callable[[NDArray[Any]], Mapping[str, Any]]
    """Returns the contexts of the places that are shown, for the scripts."""
    strings: Strings
    texts: list[str]
    """The texts of the tokens in `strings`."""
    context_size: int
    facts: Mapping[str, str]
    notices: Sequence[str]
    """What the page lacks, and why."""
    ids: NDArray[np.int32] | None = None
    """The tokens of a text, shape ``(contexts, context_size)``."""


def describe(
    subject: Subject,
    reading: Reading,
    occurs: Sparse,
    promoted: Promoted | None,
    words: Words,
    on_phase: OnPhase,
) -> Described:
    """Return the figures and the pairs of an SAE."""
    on_phase(Phase("describing latents"))
    details = subject.sae.cfg.metadata.training_architecture_details or {}
    magnitude, frequency, contribution = (
        float(details.get(f"{name}_weight", 1)) for name in Signals._fields
    )
    weights = magnitude, frequency, contribution
    latents = describe_latents(reading, occurs, weights)
    on_phase(Phase("finding parents"))
    if subject.found is not None and len(subject.found.parents) == len(latents.importance):
        pairs = describe_pairs(reading, subject.found.parents, choose=False)
        source = parents_found_in_training(subject.found.checkpoint)
    else:
        candidates = implied_pairs(reading, torch.from_numpy(latents.importance))
        pairs = describe_pairs(reading, candidates, choose=True)
        source = parents_found_here(words.units)
    return Described(reading, latents, promoted, pairs, source)


def write_page(
    subjects: Sequence[Subject],
    described: Sequence[Described],
    material: Material,
    output: Path,
    megabytes: float,
    on_phase: OnPhase,
) -> Path:
    """Write the page with the most contexts whose size is within the limit.

    Raises:
        SettingsError: even without contexts it is larger.
    """
    names = [subject.name for subject in subjects]
    facts = _facts(subjects, described) | dict(material.facts)
    size = 0.0
    for amount in _AMOUNTS:
        on_phase(Phase("writing the page"))
        saes = [_shown(*one, material, amount) for one in zip(subjects, described, strict=True)]
        if len(described) > 1:
            _add_matches(saes, described, material.context_size)
        data = {
            "strings": material.texts,
            "rows": described[0].reading.rows,
            "dense": DENSE,
            "names": names,
            "same": SAME,
            "contexts": material.contexts(_places(saes)),
            "saes": saes,
        }
        html = page_html(
            " beside ".join(names), facts, material.notices, material.words, names, data
        )
        size = len(html.encode()) / 1e6
        if size <= megabytes:
            return write_text(output, html)
    raise SettingsError(
        f"the page has {size:.1f} MB without any contexts: set --max-size to more, got "
        f"{megabytes:g}"
    )


def _shown(subject: Subject, one: Described, material: Material, amount: Amount) -> dict[str, Any]:
    strings, size = material.strings, material.context_size
    promoted = one.promoted
    if promoted is not None:
        promoted = promoted._replace(
            tokens=strings.index(promoted.tokens),
            lowest_tokens=strings.index(promoted.lowest_tokens),
        )
    return {
        "latents": one.latents._replace(tokens=strings.index(one.latents.tokens)),
        "promoted": promoted,
        "examples": find_examples(one.reading, size, amount),
        "pairs": one.pairs,
        "pair_examples": find_pair_examples(one.reading, one.pairs, size, amount),
        "parents_from": one.parents_from,
        "letters": one.letters,
        "over_training": _of_this_width(subject.over_training, one),
        "matches": None,
    }


def _of_this_width(recorded: OverTraining | None, one: Described) -> OverTraining | None:
    """Return the record of training, unless it is of another SAE, as in a folder used twice."""
    if recorded is not None and len(recorded.importance) == len(one.latents.importance):
        return recorded
    return None


def _add_matches(
    saes: Sequence[dict[str, Any]], described: Sequence[Described], context_size: int
) -> None:
    for shown, one, other in zip(saes, described, reversed(described), strict=True):
        examples = shown["examples"]
        shown["matches"] = match(one.reading, other.reading, examples, context_size)


def _places(saes: Sequence[Mapping[str, Any]]) -> NDArray[Any]:
    windows = [w for sae in saes for w in (sae["examples"].windows, sae["pair_examples"].child)]
    return np.concatenate([w.places for w in windows])


def _facts(subjects: Sequence[Subject], described: Sequence[Described]) -> dict[str, str]:
    facts: dict[str, str] = {}
    for subject, one in zip(subjects, described, strict=True):
        metadata = subject.sae.cfg.metadata
        kind = metadata.training_architecture or subject.sae.cfg.architecture()
        frequency = one.latents.frequency
        dead, dense = int((frequency == 0).sum()), int((frequency > DENSE).sum())
        facts["SAE" if len(subjects) == 1 else subject.name] = (
            f"{kind}, {len(frequency):,} latents: {dead:,} dead, {dense:,} dense; "
            f"L0 {one.reading.l0:.1f}, explained variance {one.reading.explained_variance:.3f}"
        )
    return facts
