from typer.testing import CliRunner

from sae_lens_atm.cli.main import app


def run(*args):
    """Run the command line in this process."""
    return CliRunner().invoke(app, [str(arg) for arg in args])
