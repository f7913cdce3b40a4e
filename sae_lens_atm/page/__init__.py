"""What all HTML pages share: template settings, typography, the light and the dark theme."""

from functools import cache
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def templates(package: str, autoescape: bool = True) -> Environment:
    """Return the templates of a package. A name that a template lacks is an error.

    Args:
        package: the package with the files.
        autoescape: whether values are escaped, as HTML needs.
    """
    return Environment(
        loader=PackageLoader(package, ""),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


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
