"""What all HTML pages share: template settings, typography, the light and the dark theme."""

from functools import cache
from importlib.resources import files
from typing import Any, cast

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def templates(package: str, autoescape: bool = True) -> Environment:
    """Return the templates of a package. A name that a template lacks is an error.

    Every template has `theme_css`, the style sheet of both themes and of the parts that all pages
    have, and `theme_script`, which sets the theme before the page is painted.

    Args:
        package: the package with the files.
        autoescape: whether values are escaped, as HTML needs.
    """
    environment = Environment(
        loader=PackageLoader(package, ""),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shared = cast(dict[str, Any], environment.globals)
    shared["theme_css"] = part(__name__, "theme.css")
    shared["theme_script"] = part(__name__, "theme.js")
    return environment


@cache
def part(package: str, name: str) -> Markup:
    """Return a file of a package as a part of a page. It is not escaped."""
    return Markup((files(package) / name).read_text(encoding="utf-8"))
