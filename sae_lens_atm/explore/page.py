"""The HTML of the page. It is one file that loads nothing from elsewhere."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from sae_lens_atm.explore.beside import SAME
from sae_lens_atm.explore.packing import pack
from sae_lens_atm.explore.wording import Words, meanings
from sae_lens_atm.metrics.absorption import ABSORBED_SHARE
from sae_lens_atm.page import part, templates

_PACKAGE = "sae_lens_atm.explore"
_SCRIPTS = ("data", "table", "latent", "tree", "letters", "beside", "main")
_SECTIONS = (
    ("latents", "All latents"),
    ("latent", "One latent"),
    ("hierarchy", "Hierarchy"),
    ("meanings", "What the figures mean"),
)


def page_html(
    title: str,
    facts: Mapping[str, str],
    notices: Sequence[str],
    words: Words,
    names: Sequence[str],
    data: Mapping[str, Any],
) -> str:
    """Return the page. Names, tokens and messages are escaped.

    Args:
        title: the title.
        facts: names and values above the table.
        notices: what the page lacks, and why.
        words: the words for what an SAE reads.
        names: the names of the SAEs.
        data: what the scripts show.
    """
    has_letters = any(sae["letters"] is not None for sae in data["saes"])
    extra = [("letters", "First letters")] if has_letters else []
    extra += [("beside", "Side by side")] if len(names) > 1 else []
    environment = templates(_PACKAGE)
    text = meanings(words)
    if len(names) == 1:
        del text["match"]
    packed = pack({**data, "words": words, "meanings": text})
    return environment.get_template("page.html.j2").render(
        styles=part(_PACKAGE, "styles.css"),
        scripts=Markup("\n").join(part(_PACKAGE, f"scripts/{name}.js") for name in _SCRIPTS),
        title=title,
        facts={**facts, "size": f"{len(packed) / 1e6:.1f} MB of data in this file"},
        notices=notices,
        names=names,
        sections=[*_SECTIONS[:-1], *extra, _SECTIONS[-1]],
        unit=words.unit,
        thing=words.top.split()[-1].removesuffix("s"),
        absorbed_share=ABSORBED_SHARE,
        same=SAME,
        meanings=text,
        data=packed,
    )
