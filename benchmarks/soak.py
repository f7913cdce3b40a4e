"""Stop runs by signals, a full disk or a read-only folder, and count the lost states.

    python benchmarks/soak.py --json docs/reliability/soak.json --report docs/reliability.md

Each run trains a small SAE on synthetic data, in its own process. It is stopped after a random time
and resumed until it ends. A state is lost if the newest checkpoint is older than before the stop,
or does not load. At its end a run must have the same weights as an undisturbed run. Afterwards the
script damages files of a checkpoint, one at a time.
"""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file

from sae_lens_atm.errors import CheckpointError, Interrupted
from sae_lens_atm.training.checkpoints import newest_checkpoint, samples_of
from sae_lens_atm.training.preflight.checks import check_run
from sae_lens_atm.training.quiet import silence_saelens
from sae_lens_atm.training.run import train
from sae_lens_atm.training.run_file import parse_run

RUN = {
    "runner": "synthetic",
    "hierarchy_model": {"hidden_dim": 32, "roots": 8, "depth": 2},
    "sae": {"architecture": "atm", "d_in": 32, "d_sae": 256, "k": 4, "mask_warm_up_steps": 5},
    "training_samples": 12_800,
    "batch_size": 64,
    "lr": 1e-3,
    "n_checkpoints": 40,
    "run_final_eval": False,
}
EVENTS = ("SIGTERM", "SIGINT", "SIGKILL", "full disk", "read-only folder")
NOBODY = 65_534


def work(folder: Path, resume: Path | None, event: str, at: int) -> None:
    """Train in a child process. Fill the disk or make the folder read-only at step `at`."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115

    def happen(trainer: Any, _output: Any) -> None:
        if trainer.n_training_steps != at:
            return
        if event == "full disk":  # no file may become larger
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        elif event == "read-only folder":
            checkpoints = folder / "checkpoints"
            checkpoints.mkdir(exist_ok=True)
            checkpoints.chmod(0o555)
            if os.geteuid() == 0:  # root may write everywhere
                os.seteuid(NOBODY)

    with suppress(Interrupted):
        train(parse_run({**RUN, "output_path": str(folder)}), resume, happen)


def one_attempt(folder: Path, event: str, wait: float, at: int) -> bool:
    """Resume and train until the event stops the run. Return whether it ended before."""
    try:
        resume = newest_checkpoint(folder)
    except CheckpointError:
        resume = None
    child = multiprocessing.get_context("fork").Process(
        target=work, args=(folder, resume, event, at)
    )
    child.start()
    if event.startswith("SIG"):
        child.join(wait)
        if child.is_alive() and child.pid is not None:
            os.kill(child.pid, getattr(signal, event))
    child.join()
    with suppress(FileNotFoundError):
        (folder / "checkpoints").chmod(0o755)
    return (folder / "cfg.json").exists()


def one_run(folder: Path, chance: random.Random, seconds: float, counts: Counter[str]) -> None:
    """Resume a run until it ends, and count events and lost states."""
    reached = -1
    while True:
        event = chance.choice(EVENTS)
        done = one_attempt(folder, event, chance.uniform(0, 0.6 * seconds), chance.randrange(200))
        if done:
            return
        counts[event] += 1
        try:
            newest = newest_checkpoint(folder)
            check_run(parse_run({**RUN, "output_path": str(folder)}), newest)
        except CheckpointError:
            counts["states lost"] += reached >= 0
            continue
        counts["states lost"] += samples_of(newest) < reached
        counts["states resumed"] += 1
        reached = samples_of(newest)


def damage_one(folder: Path, chance: random.Random) -> str:
    """Damage one file of a checkpoint. Return the kind of damage."""
    path = chance.choice(sorted(p for p in folder.iterdir() if p.name != "manifest.json"))
    content = path.read_bytes()
    place = chance.randrange(len(content))
    bit = bytes([content[place] ^ 1 << chance.randrange(8)])
    damages: dict[str, Callable[[], object]] = {
        "a bit flipped": lambda: path.write_bytes(content[:place] + bit + content[place + 1 :]),
        "cut off": lambda: path.write_bytes(content[:place]),
        "emptied": lambda: path.write_bytes(b""),
        "deleted": path.unlink,
    }
    how = chance.choice(list(damages))
    damages[how]()
    return how


def try_damages(folder: Path, scratch: Path, times: int, chance: random.Random) -> dict[str, Any]:
    """Damage the newest checkpoint in many ways. Count how often the one before is found."""
    (folder / "cfg.json").unlink()
    run = parse_run({**RUN, "output_path": str(folder)})
    newest = newest_checkpoint(folder)
    original = shutil.copytree(newest, scratch / "original")
    tried, noticed = Counter[str](), 0
    for _ in range(times):
        tried[damage_one(newest, chance)] += 1
        found = newest_checkpoint(folder)
        check_run(run, found)
        noticed += samples_of(found) < samples_of(newest)
        shutil.rmtree(newest)
        shutil.copytree(original, newest)
    return {"tried": dict(sorted(tried.items())), "noticed": noticed}


def report(found: dict[str, Any]) -> str:
    """Return the counts as a table."""
    events, damages = found["events"], found["damages"]
    rows = {
        "runs": found["runs"],
        **{f"stopped by {name}": number for name, number in events.items()},
        "resumed after that": found["states_resumed"],
        "states lost": found["states_lost"],
        "runs that ended with the same weights as an undisturbed run": found["identical"],
        **{f"checkpoints with a damaged file: {how}": n for how, n in damages["tried"].items()},
        "damages that were noticed, so that the previous checkpoint was used": damages["noticed"],
    }
    lines = "\n".join(f"| {name} | {number} |" for name, number in rows.items())
    return f"| | |\n|---|--:|\n{lines}\n"


def main(
    runs: int = 50,
    damages: int = 200,
    seed: int = 0,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the counts to this file.")
    ] = None,
    report_path: Annotated[
        Path | None,
        typer.Option("--report", help="Replace the table of counts in this page."),
    ] = None,
) -> None:
    """Stop runs in many ways, and count the states that were lost."""
    silence_saelens()
    warnings.simplefilter("ignore")
    scratch = Path(mkdtemp(prefix="soak-"))
    scratch.chmod(0o755)
    start = time.monotonic()
    one_attempt(scratch / "undisturbed", "", 0, 0)
    seconds = time.monotonic() - start
    expected = load_file(scratch / "undisturbed/sae_weights.safetensors")
    chance, counts, identical = random.Random(seed), Counter[str](), 0
    for i in range(runs):
        folder = scratch / f"run-{i}"
        one_run(folder, chance, seconds, counts)
        weights = load_file(folder / "sae_weights.safetensors")
        identical += all(torch.equal(weights[name], expected[name]) for name in expected)
        print(f"{i + 1}/{runs}: {dict(counts)}, identical {identical}", flush=True)
        shutil.rmtree(folder)
    found = {
        "runs": runs,
        "events": {name: counts[name] for name in EVENTS},
        "states_resumed": counts["states resumed"],
        "states_lost": counts["states lost"],
        "identical": identical,
        "damages": try_damages(scratch / "undisturbed", scratch, damages, chance),
        "seconds": round(time.monotonic() - start),
        "torch": torch.__version__,
    }
    shutil.rmtree(scratch)
    print(report(found))
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if report_path is not None:
        before, mark, rest = report_path.read_text(encoding="utf-8").partition("<!-- counts -->\n")
        after = rest.partition("<!-- end -->")[2]
        text = f"{before}{mark}{report(found)}<!-- end -->{after}"
        report_path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
