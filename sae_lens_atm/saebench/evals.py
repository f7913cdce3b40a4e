"""SAEBench's evals of one SAE: what is to be done, a process that does it, what it found."""

import json
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.util import filter_valid_dataclass_fields

from sae_lens_atm.errors import SAEBenchError, SettingsError
from sae_lens_atm.hub.loading import load_sae
from sae_lens_atm.sae.inference import ATMSAE
from sae_lens_atm.saebench.environment import python_of
from sae_lens_atm.saebench.inside.models import hooked_name
from sae_lens_atm.saebench.scores import SCORES

EVALS = tuple(SCORES)


@dataclass(frozen=True)
class Plan:
    """What is to be evaluated, checked."""

    sae: SAE[Any]
    model: str
    """A name on the Hub or a folder."""
    evals: list[str]
    text: str | None
    """A dataset on the Hub or a folder, or SAEBench's own."""
    quick: bool = False


def plan_evals(
    sae: str,
    evals: str = ",".join(EVALS),
    model: str | None = None,
    text: str | None = None,
    quick: bool = False,
) -> Plan:
    """Check what can be checked before anything is installed.

    Raises:
        SettingsError: an eval or the SAE is unknown, or SAEBench cannot look at that SAE.
    """
    names = [name.strip() for name in evals.split(",")]
    unknown = [name for name in names if name not in EVALS]
    if unknown:
        raise SettingsError(f"--evals {', '.join(unknown)}: allowed are {', '.join(EVALS)}")
    loaded = load_sae(sae)
    metadata = loaded.cfg.metadata
    model = model or metadata.model_name
    if not model:
        raise SettingsError(f"{sae} does not say of which model it is: give --model")
    if not metadata.hook_name:
        raise SettingsError(f"{sae} does not say of which hook it is: no hook_name in its metadata")
    residual = re.fullmatch(r"blocks\.\d+\.hook_resid_post", hooked_name(metadata.hook_name))
    if "absorption" in names and not residual:
        raise SettingsError(
            f"{sae} is of the hook {metadata.hook_name}: SAEBench's absorption reads "
            "blocks.N.hook_resid_post, whatever the SAE's hook; leave it out of --evals"
        )
    return Plan(loaded, _absolute(model), names, text and _absolute(text), quick)


def _absolute(name: str) -> str:
    """The process works in a folder of its own."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def run_evals(plan: Plan, environment: Path) -> dict[str, Any]:
    """Run the evals in the environment, their output on ours; their results as SAEBench has them.

    Raises:
        SAEBenchError: none was run.
    """
    with tempfile.TemporaryDirectory(prefix="saebench-") as folder:
        home = Path(folder)
        stock(plan.sae).save_model(home / "sae")
        job = {name: value for name, value in vars(plan).items() if name != "sae"}
        (home / "job.json").write_text(json.dumps({**job, "sae": str(home / "sae")}))
        child = subprocess.Popen(
            command(environment), cwd=home, env=child_environment(), stdin=subprocess.PIPE
        )
        with child:
            try:
                child.wait()  # its stdin stays open, and tells it that we are there
            except BaseException:
                child.kill()
                child.wait()  # after a KeyboardInterrupt the `with` doesn't
                raise
        return read_results(home / "results.json", child.returncode)


def stock(sae: SAE[Any]) -> SAE[Any]:
    """The SAE in an architecture of SAELens' own, which is all that SAEBench knows."""
    if not isinstance(sae, ATMSAE):
        return sae
    fields = filter_valid_dataclass_fields(vars(sae.cfg), JumpReLUSAEConfig)
    jumprelu = JumpReLUSAE(JumpReLUSAEConfig(**fields))
    state = sae.state_dict()
    del state["importance"]
    jumprelu.load_state_dict(state)
    return jumprelu


def command(environment: Path) -> list[str]:
    python = str(python_of(environment.absolute()))
    return [python, "-m", "inside.run", "job.json", "results.json"]


def child_environment() -> dict[str, str]:
    """Ours, without what would lead that Python to our packages; with the folder of `inside`."""
    kept = {name: v for name, v in os.environ.items() if name != "PYTHONHOME"}
    ours = {
        "PYTHONPATH": str(Path(__file__).parent),
        "PYTHONNOUSERSITE": "1",
        "JAXTYPING_DISABLE": "1",  # it insists on a HookedTransformer, a TransformerBridge does
    }
    return {**kept, **ours}


def read_results(file: Path, returncode: int) -> dict[str, Any]:
    """What the process wrote.

    Raises:
        SAEBenchError: nothing, or why it ran no eval.
    """
    if returncode:
        how = f"exit code {returncode}"
        if returncode < 0:
            how = f"killed by {signal.Signals(-returncode).name}"
        raise SAEBenchError(f"SAEBench ended early, {how}: see above")
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if "error" in results:
        raise SAEBenchError(f"SAEBench: {results['error']}")
    return results


def failures(evals: Mapping[str, Any]) -> list[str]:
    """One line for each eval that failed."""
    return [f"{name}: {found['error']}" for name, found in evals.items() if "error" in found]
