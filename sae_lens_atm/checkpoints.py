"""Checkpoints of a run: written to the side and renamed, found again, checked before use.

The contents are SAELens' own (`SAETrainer.save_checkpoint`), with the state of torch's random
numbers beside them.
"""

import json
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAETrainer, TrainingSAEConfig
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, TRAINER_STATE_FILENAME
from safetensors import safe_open

RANDOM_STATE_FILENAME = "random_state.pt"


class CheckpointError(ValueError):
    """A checkpoint that cannot be resumed from, and why."""


def save_atomically(trainer: SAETrainer[Any, Any]) -> None:
    """Make every later `trainer.save_checkpoint` all or nothing.

    A checkpoint is complete when its folder has its name. Whatever is left under a hidden name
    was being written when the process died.
    """
    save = trainer.save_checkpoint

    def save_checkpoint(
        checkpoint_name: str,
        base_path: Path | str | None = None,
        wandb_aliases: list[str] | None = None,
    ) -> None:
        base = Path(base_path or trainer.cfg.checkpoint_path or ".")
        partial, final = base / f".{checkpoint_name}.partial", base / checkpoint_name
        shutil.rmtree(partial, ignore_errors=True)
        save(partial.name, base_path=base, wandb_aliases=wandb_aliases)
        save_random_state(partial)
        replaced = base / f".{checkpoint_name}.replaced"
        if final.exists():  # saved at this very step before
            final.rename(replaced)
        partial.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)

    trainer.save_checkpoint = save_checkpoint  # pyright: ignore[reportAttributeAccessIssue]


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
    files = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, TRAINER_STATE_FILENAME)
    return not folder.name.startswith(".") and all((folder / name).is_file() for name in files)


def newest_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a path means: itself, or the newest in a run's folder.

    Raises:
        CheckpointError: there is none.
    """
    folder = Path(path)
    if is_checkpoint(folder):
        return folder
    inside = [*folder.glob("*"), *folder.glob("checkpoints/*")] if folder.is_dir() else []
    complete = [candidate for candidate in inside if is_checkpoint(candidate)]
    if not complete:
        what = "holds no complete checkpoint" if folder.exists() else "does not exist"
        raise CheckpointError(f"cannot resume: {folder} {what}")
    return max(complete, key=_samples_of)


def _samples_of(checkpoint: Path) -> int:
    """The samples trained on, which SAELens names checkpoints after (`1024`, `final_2048`)."""
    number = checkpoint.name.rpartition("_")[2]
    return int(number) if number.isdigit() else -1


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

    Raises:
        CheckpointError: it is of another architecture or shape, or damaged.
    """
    with reading(folder):
        saved = json.loads((folder / SAE_CFG_FILENAME).read_text(encoding="utf-8"))
        wanted = _as_saved(cfg)
        # A field that a newer SAELens has added is not in the file, and no difference.
        differing = [key for key, value in wanted.items() if saved.get(key, value) != value]
        with safe_open(folder / SAE_WEIGHTS_FILENAME, framework="pt") as tensors:
            shape = tuple(tensors.get_slice("W_dec").get_shape())
        for name in (TRAINER_STATE_FILENAME, RANDOM_STATE_FILENAME):
            if (folder / name).exists():
                # Mapped, not read: the optimiser's state is twice as large as the SAE.
                torch.load(folder / name, map_location="cpu", weights_only=True, mmap=True)
    for key in differing:
        raise CheckpointError(
            f"cannot resume: {key} is {wanted[key]!r} in this run and {saved[key]!r} in {folder}"
        )
    if shape != (cfg.d_sae, cfg.d_in):
        raise CheckpointError(
            f"cannot resume: W_dec in {folder} has shape {shape}, not {(cfg.d_sae, cfg.d_in)}"
        )


def _as_saved(cfg: TrainingSAEConfig) -> dict[str, Any]:
    """What a checkpoint's cfg.json must say: everything but where the SAE is and comes from."""
    content = json.loads(json.dumps({**cfg.to_dict(), "metadata": None}))
    first = {"architecture": content["architecture"], "d_in": cfg.d_in, "d_sae": cfg.d_sae}
    return {**first, **{k: v for k, v in content.items() if k not in ("metadata", "device")}}
