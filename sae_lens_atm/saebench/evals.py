"""Run SAEBench's evals on one SAE, in a process of SAEBench's environment."""

import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.util import filter_valid_dataclass_fields

from sae_lens_atm.errors import SAEBenchError, SettingsError
from sae_lens_atm.files import read_json
from sae_lens_atm.hub.loading import load_sae
from sae_lens_atm.sae.inference import ATMSAE
from sae_lens_atm.saebench.environment import python_of
from sae_lens_atm.saebench.inside.models import hooked_name
from sae_lens_atm.saebench.scores import SCORES
from sae_lens_atm.training.preflight.model_facts import is_path

EVALS = tuple(SCORES)
DEFAULT_EVALS = tuple(name for name in EVALS if name != "sae_probes")
QUICK_WORDS, QUICK_TASKS = 2000, 3
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class EvalRequest:
    """What to evaluate."""

    sae: SAE[Any]
    model: str
    """A name on the Hub, or a folder."""
    evals: list[str]
    text: str | None
    """A dataset on the Hub, or a folder. None is SAEBench's own."""
    quick: bool = False
    words: int | None = None
    """Number of words for absorption. None is all of the vocabulary."""
    tasks: int | None = None
    """Number of tasks for sae_probes. None is all."""


def plan_evals(
    sae: str,
    evals: str = ",".join(DEFAULT_EVALS),
    model: str | None = None,
    text: str | None = None,
    quick: bool = False,
    words: int | None = None,
    tasks: int | None = None,
) -> EvalRequest:
    """Check what can be checked before anything is installed.

    Args:
        sae: a folder, or ``REPO:SAE_ID`` on the Hub.
        evals: names of evals, separated by commas.
        model: a name on the Hub or a folder. By default the model in the SAE's metadata.
        text: a dataset for the core eval. By default SAEBench's.
        quick: run the core eval on few batches, absorption on few words, sae_probes on few tasks.
        words: number of words for absorption. By default all of the vocabulary.
        tasks: number of tasks for sae_probes. By default all.

    Raises:
        SettingsError: an eval or the SAE is unknown, or an eval cannot be run on the SAE.
    """
    names = [name.strip() for name in evals.split(",")]
    if not set(names) <= set(EVALS) or len(set(names)) < len(names):
        raise SettingsError(
            f"--evals must be among {', '.join(EVALS)}, each once, separated by commas, got "
            f"{evals!r}"
        )
    for option, value, name in (
        ("--dataset", text, "core"),
        ("--words", words, "absorption"),
        ("--tasks", tasks, "sae_probes"),
    ):
        if value is not None and name not in names:
            raise SettingsError(f"{option} {value}: only {name} uses it, add {name} to --evals")
    for option, value in (("--model", model), ("--dataset", text)):
        if value is not None and is_path(value) and not Path(value).is_dir():
            raise SettingsError(f"{option} {value}: there is no such folder")
    loaded = load_sae(sae)
    metadata = loaded.cfg.metadata
    model = model or metadata.model_name
    if not model:
        raise SettingsError(f"{sae} has no model_name in its metadata: set --model")
    if not metadata.hook_name:
        raise SettingsError(f"{sae} has no hook_name in its metadata, which SAEBench needs")
    residual = re.fullmatch(r"blocks\.\d+\.hook_resid_post", hooked_name(metadata.hook_name))
    if "absorption" in names and not residual:
        raise SettingsError(
            f"{sae} was trained at the hook {metadata.hook_name}: SAEBench's absorption always "
            "reads blocks.N.hook_resid_post; leave absorption out of --evals"
        )
    return EvalRequest(
        loaded,
        _absolute(model),
        names,
        text and _absolute(text),
        quick,
        words or (QUICK_WORDS if quick else None),
        tasks or (QUICK_TASKS if quick else None),
    )


def _absolute(name: str) -> str:
    """Return the absolute path of a folder: the process has another working directory."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def run_evals(
    request: EvalRequest, environment: Path, on_results: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Run the evals in the environment, and return their results in SAEBench's format.

    The output of the process goes to this process' terminal.

    Args:
        on_results: called with the results so far after each eval, also if a later one is stopped.

    Raises:
        SAEBenchError: the process failed.
    """
    with tempfile.TemporaryDirectory(prefix="saebench-") as folder:
        home = Path(folder)
        as_stock_sae(request.sae).save_model(home / "sae")
        job = {name: value for name, value in vars(request).items() if name != "sae"}
        (home / "job.json").write_text(json.dumps({**job, "sae": str(home / "sae")}))
        child = subprocess.Popen(
            command(environment), cwd=home, env=child_environment(), stdin=subprocess.PIPE
        )
        written = Written(home / "results.json", on_results)
        with child:
            try:
                while child.poll() is None:
                    written.look()
                    time.sleep(_POLL_SECONDS)
            except BaseException:
                child.kill()  # it also ends itself when this end of its stdin is closed
                child.wait()  # after a KeyboardInterrupt the `with` doesn't
                raise
            finally:
                written.look()
        return read_results(home / "results.json", child.returncode)


@dataclass
class Written:
    """The file with the results so far, which the process replaces after each eval."""

    file: Path
    on_results: Callable[[dict[str, Any]], None]
    seen: int = 0

    def look(self) -> None:
        """Report the results if there are new ones."""
        if not self.file.exists():
            return
        written = self.file.stat().st_mtime_ns
        if written == self.seen:
            return
        self.seen = written
        results = read_json(self.file)
        if "error" not in results:
            self.on_results(results)


def as_stock_sae(sae: SAE[Any]) -> SAE[Any]:
    """Return the SAE in an architecture of SAELens. SAEBench does not load others."""
    if not isinstance(sae, ATMSAE):
        return sae
    fields = filter_valid_dataclass_fields(vars(sae.cfg), JumpReLUSAEConfig)
    jumprelu = JumpReLUSAE(JumpReLUSAEConfig(**fields))
    state = sae.state_dict()
    del state["importance"]
    jumprelu.load_state_dict(state)
    return jumprelu


def command(environment: Path) -> list[str]:
    """Return the command line of the process."""
    python = str(python_of(environment.absolute()))
    return [python, "-m", "inside.run", "job.json", "results.json"]


def child_environment() -> dict[str, str]:
    """Return the environment variables of the process.

    Its Python must find the package `inside`, and none of our other packages.
    """
    kept = {name: v for name, v in os.environ.items() if name != "PYTHONHOME"}
    ours = {
        "PYTHONPATH": str(Path(__file__).parent),
        "PYTHONNOUSERSITE": "1",
        "JAXTYPING_DISABLE": "1",  # SAEBench's hints reject a TransformerBridge, which works
    }
    return {**kept, **ours}


def read_results(file: Path, returncode: int) -> dict[str, Any]:
    """Return the results that the process wrote.

    Raises:
        SAEBenchError: there are none. The message says why.
    """
    if returncode:
        how = f"exit code {returncode}"
        if returncode < 0:
            how = f"killed by {signal.Signals(-returncode).name}"
        raise SAEBenchError(f"SAEBench failed, {how}: see its output above")
    results = read_json(file)
    if "error" in results:
        raise SAEBenchError(f"SAEBench: {results['error']}")
    return results


def failures(evals: Mapping[str, Any]) -> list[str]:
    """Return one line for each eval that failed."""
    return [f"{name}: {result['error']}" for name, result in evals.items() if "error" in result]
