"""What all HTML pages share: typography, colours of the light and the dark theme, their choice."""

from functools import cache
from importlib.resources import files

from markupsafe import Markup


@cache
def theme_css() -> Markup:
    """Return the style sheet of both themes and of the parts that all pages have."""
    return _part("theme.css")


@cache
def theme_script() -> Markup:
    """Return the script that sets the theme before the page is painted."""
    return _part("theme.js")


def _part(name: str) -> Markup:
    return Markup((files("sae_lens_atm.page") / name).read_text(encoding="utf-8"))
