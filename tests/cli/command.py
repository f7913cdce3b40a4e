import sys

from typer.testing import CliRunner

from sae_lens_atm.cli.main import app


def run(*args):
    """Run the command line in this process."""
    return CliRunner().invoke(app, [str(arg) for arg in args])


def console_script(folder):
    """Write the console script as pip does, and return the command that starts it."""
    script = folder / "sae-lens-atm"
    script.write_text("import sys\nfrom sae_lens_atm_cli import main\nsys.exit(main())\n")
    return [sys.executable, str(script)]
