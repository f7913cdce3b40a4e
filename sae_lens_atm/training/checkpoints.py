"""Checkpoints of a run: written to the side and renamed, found again, checked before use.

The contents are SAELens' own (`SAETrainer.save_checkpoint`), with the state of torch's random
numbers and a manifest beside them.
"""

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAETrainer, TrainingSAEConfig
from sae_lens.constants import (
    ACTIVATION_SCALER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    TRAINER_STATE_FILENAME,
)
from sae_lens.training.prefetch import PrefetchingIterator
from safetensors import safe_open

from sae_lens_atm.errors import CheckpointError
from sae_lens_atm.files import manifest_mismatch as what_is_wrong
from sae_lens_atm.files import read_manifest, write_manifest

RANDOM_STATE_FILENAME = "random_state.pt"
_NEEDED = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, TRAINER_STATE_FILENAME)


def save_atomically(
    trainer: SAETrainer[Any, Any],
    keep: int | None = None,
    facts: Callable[[], dict[str, Any]] = dict,
) -> None:
    """Make every later `trainer.save_checkpoint` all or nothing.

    A checkpoint is complete when its folder has its name. Whatever is left under a hidden name
    was being written, or removed, when the process died.

    Args:
        keep: how many checkpoints to keep; the others are removed when a newer one is complete.
        facts: what else the manifest is to say.
    """
    save = trainer.save_checkpoint

    def save_checkpoint(
        checkpoint_name: str,
        base_path: Path | str | None = None,
        wandb_aliases: list[str] | None = None,
    ) -> None:
        base = Path(base_path or trainer.cfg.checkpoint_path or ".")
        partial, final = base / f".{checkpoint_name}.partial", base / checkpoint_name
        _remove_leftovers(base)
        provider = trainer.data_provider
        is_ahead = isinstance(provider, PrefetchingIterator)
        try:
            with provider.paused() if is_ahead else nullcontext():
                save(partial.name, base_path=base, wandb_aliases=wandb_aliases)
                save_random_state(partial)
            write_manifest(partial, **facts())
        except BaseException:  # what is half written would only fill the disk
            shutil.rmtree(partial, ignore_errors=True)
            raise
        replaced = base / f".{checkpoint_name}.replaced"
        if final.exists():  # saved at this very step before
            final.rename(replaced)
        partial.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)
        if keep is not None:
            _remove_older(final, keep)

    trainer.save_checkpoint = save_checkpoint  # pyright: ignore[reportAttributeAccessIssue]


def _remove_leftovers(base: Path) -> None:
    _restore_replaced(base)
    for state in ("partial", "replaced", "removed"):
        for left in base.glob(f".*.{state}"):
            shutil.rmtree(left, ignore_errors=True)


def _restore_replaced(base: Path) -> None:
    """A process may have died between the two renames of a checkpoint that replaces another."""
    for replaced in base.glob(".*.replaced"):
        original = base / replaced.name.removeprefix(".").removesuffix(".replaced")
        if not original.exists():
            with suppress(OSError):
                replaced.rename(original)


def _remove_older(newest: Path, keep: int) -> None:
    """Of the checkpoints up to this one, leave the newest."""
    samples = samples_of(newest)
    with suppress(OSError):  # not everywhere can a folder be opened
        handle = os.open(newest.parent, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    others = [
        folder
        for folder in newest.parent.iterdir()
        if folder != newest and is_checkpoint(folder) and 0 <= samples_of(folder) <= samples
    ]
    for old in sorted(others, key=samples_of, reverse=True)[max(keep - 1, 0) :]:
        # Under a hidden name first, so that half of it is never taken for a checkpoint.
        removed = old.with_name(f".{old.name}.removed")
        old.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)


def save_nothing(trainer: SAETrainer[Any, Any]) -> None:
    """Leave checkpoints to another process."""

    def save_checkpoint(*_: Any, **__: Any) -> None:
        return

    trainer.save_checkpoint = save_checkpoint


def save_random_state(folder: Path) -> None:
    """Keep torch's global random state, from which synthetic data are drawn."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    torch.save(state, folder / RANDOM_STATE_FILENAME)


def load_random_state(folder: Path) -> None:
    """Undo the draws since `save_random_state`."""
    path = folder / RANDOM_STATE_FILENAME
    if not path.exists():
        return
    state = torch.load(path, weights_only=True)
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a complete checkpoint that training can go on from."""
    return not folder.name.startswith(".") and _what_is_missing(folder) is None


def _what_is_missing(folder: Path, closely: bool = False) -> str | None:
    for name in _NEEDED:
        if not (folder / name).is_file():
            return f"{name} is missing"
    return what_is_wrong(folder, closely)


def newest_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a path means: itself, or the newest whole one in a run's folder.

    Newer ones that are not whole are skipped, and a warning says so.

    Raises:
        CheckpointError: there is none.
    """
    folder = Path(path)
    if is_checkpoint(folder):
        return folder
    inside: list[Path] = []
    for base in (folder, folder / "checkpoints"):
        if base.is_dir():
            _restore_replaced(base)
            inside += [f for f in base.iterdir() if samples_of(f) >= 0 or is_checkpoint(f)]
    for candidate in sorted(inside, key=samples_of, reverse=True):
        wrong = _what_is_missing(candidate, closely=True)
        if candidate.name.startswith("."):
            wrong = "it was being written when the run ended"
        if wrong is None:
            return candidate
        warnings.warn(f"{candidate} is no whole checkpoint, skipped: {wrong}", stacklevel=1)
    if samples_of(folder) >= 0 and any((folder / name).exists() for name in _NEEDED):
        raise CheckpointError(f"cannot resume: {folder} is damaged ({_what_is_missing(folder)})")
    what = "holds no complete checkpoint" if folder.exists() else "does not exist"
    raise CheckpointError(f"cannot resume: {folder} {what}")


def samples_of(checkpoint: Path) -> int:
    """The samples trained on, which SAELens names checkpoints after (`1024`, `final_2048`), also
    of one that is not whole; -1 of another folder."""
    name = checkpoint.name.removeprefix(".").removesuffix(".partial")
    number = name.removeprefix("final_")
    return int(number) if number.isascii() and number.isdigit() else -1


def skipped_batches(checkpoint: Path) -> int:
    """How many bad batches had been skipped."""
    with reading(checkpoint):
        return int((read_manifest(checkpoint) or {}).get("skipped_batches", 0))


@contextmanager
def reading(folder: Path) -> Generator[None]:
    """Say which checkpoint is damaged, whatever it is that reading it stumbles on."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"cannot resume: {folder} is damaged ({reason})") from error


def check_resumable(folder: Path, cfg: TrainingSAEConfig) -> None:
    """Check that a checkpoint belongs to this SAE and can be read, before anything is built.

    Nothing in it is executed, though SAELens and older versions of torch would: its pickles are
    read as plain data here, or refused.

    Raises:
        CheckpointError: it is of another architecture or shape, or damaged.
    """
    wrong = what_is_wrong(folder)
    if wrong is not None:
        raise CheckpointError(f"cannot resume: {folder} is damaged ({wrong})")
    with reading(folder):
        saved = json.loads((folder / SAE_CFG_FILENAME).read_text(encoding="utf-8"))
        wanted = _as_saved(cfg)
        # A field that a newer SAELens has added is not in the file, and no difference.
        differing = [key for key, value in wanted.items() if saved.get(key, value) != value]
    for key in differing:
        raise CheckpointError(
            f"cannot resume: {key} is {wanted[key]!r} in this run and {saved[key]!r} in {folder}"
        )
    with reading(folder):
        with safe_open(folder / SAE_WEIGHTS_FILENAME, framework="pt") as tensors:
            shape = tuple(tensors.get_slice("W_dec").get_shape())
            broken = [n for n in tensors.keys() if is_broken(n, tensors.get_tensor(n))]  # noqa: SIM118
        check_pickles(folder)
        scaler = json.loads((folder / ACTIVATION_SCALER_CFG_FILENAME).read_text(encoding="utf-8"))
        if not math.isfinite(scaler["scaling_factor"] or 1.0):
            raise ValueError(f"scaling_factor is {scaler['scaling_factor']}")
    if shape != (cfg.d_sae, cfg.d_in):
        raise CheckpointError(
            f"cannot resume: W_dec in {folder} has shape {shape}, not {(cfg.d_sae, cfg.d_in)}"
        )
    for name in broken:
        raise CheckpointError(f"cannot resume: {name} in {folder} holds NaN or Inf values")


def check_pickles(folder: Path) -> None:
    """Read what SAELens unpickles, as plain data; anything else raises."""
    for name in (TRAINER_STATE_FILENAME, RANDOM_STATE_FILENAME):
        if (folder / name).exists():
            # Mapped, not read: the optimiser's state is twice as large as the SAE.
            torch.load(folder / name, map_location="cpu", weights_only=True, mmap=True)


def is_broken(name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor of a SAE cannot be used. A threshold may be infinite: never to fire."""
    if not tensor.is_floating_point():
        return False
    finite = not tensor.isnan().any() if "threshold" in name else tensor.isfinite().all()
    return not finite


def _as_saved(cfg: TrainingSAEConfig) -> dict[str, Any]:
    """What a checkpoint's cfg.json must say: everything but where the SAE is and comes from."""
    content = json.loads(json.dumps({**cfg.to_dict(), "metadata": None}))
    first = {"architecture": content["architecture"], "d_in": cfg.d_in, "d_sae": cfg.d_sae}
    return {**first, **{k: v for k, v in content.items() if k not in ("metadata", "device")}}
