"""The files of a comparison."""

from pathlib import Path

from sae_lens_atm.compare.report.html import write_report
from sae_lens_atm.compare.report.pictures import draw_pictures
from sae_lens_atm.compare.report.results import Results, write_results
from sae_lens_atm.compare.report.tables import markdown
from sae_lens_atm.files import write_text


def write_all(results: Results, folder: Path) -> list[Path]:
    """Write results, report and pictures."""
    return [*write_results(results, folder), *draw_all(results, folder)]


def draw_all(results: Results, folder: Path) -> list[Path]:
    """Draw report, tables and pictures."""
    table = write_text(folder / "tables.md", markdown(results))
    report = write_report(results, folder / "report.html")
    return [report, table, *draw_pictures(results, folder)]
