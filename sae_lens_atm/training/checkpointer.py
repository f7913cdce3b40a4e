"""Write the checkpoints of a run atomically, and remove old ones."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from sae_lens import SAETrainer
from sae_lens.constants import RUNNER_CFG_FILENAME
from sae_lens.training.prefetch import PrefetchingIterator
from typing_extensions import override

from sae_lens_atm.data.random_state import save_random_state
from sae_lens_atm.files import replace_folder, restore_replaced, saving, write_manifest
from sae_lens_atm.training.checkpoints import is_checkpoint, samples_of
from sae_lens_atm.training.supervise import Hook, Save


class Checkpointer(Hook):
    """Writes each checkpoint completely or not at all.

    A checkpoint is complete when its folder has its final name. Folders with a hidden name were
    being written or removed when a process ended.
    """

    def __init__(
        self,
        trainer: SAETrainer[Any, Any],
        keep: int | None = None,
        config: dict[str, Any] | None = None,
        facts: Callable[[], dict[str, Any]] = dict,
        writes: bool = True,
    ) -> None:
        """
        Args:
            trainer: whose checkpoints are written.
            keep: number of checkpoints to keep. Older ones are removed when a newer one is
                complete. None keeps all.
            config: the configuration of the run, where SAELens does not store it.
            facts: returns more entries of the manifest.
            writes: whether this process writes checkpoints.
        """
        self._trainer, self._keep, self._config = trainer, keep, config
        self._facts, self._writes = facts, writes

    @override
    def wrap_save(self, save: Save) -> Save:
        def save_complete(name: str, base: Path, aliases: list[str] | None) -> None:
            if not self._writes:
                return
            partial, final = base / f".{name}.partial", base / name
            _remove_leftovers(base)
            provider = self._trainer.data_provider
            is_ahead = isinstance(provider, PrefetchingIterator)
            try:
                with saving(final):
                    with provider.paused() if is_ahead else nullcontext():
                        save(partial.name, base, aliases)
                        save_random_state(partial)
                    if self._config is not None and not (partial / RUNNER_CFG_FILENAME).exists():
                        text = json.dumps(self._config)
                        (partial / RUNNER_CFG_FILENAME).write_text(text, encoding="utf-8")
                    write_manifest(partial, **self._facts())
            except BaseException:  # a full disk must not keep half a checkpoint
                shutil.rmtree(partial, ignore_errors=True)
                raise
            replace_folder(partial, final)  # there may be an earlier one of the same step
            if self._keep is not None:
                _remove_older(final, self._keep)

        return save_complete


def _remove_leftovers(base: Path) -> None:
    restore_replaced(base)
    for state in ("partial", "replaced", "removed"):
        for left in base.glob(f".*.{state}"):
            shutil.rmtree(left, ignore_errors=True)


def _remove_older(newest: Path, keep: int) -> None:
    """Remove all but the `keep` newest of the checkpoints up to this one."""
    samples = samples_of(newest)
    with suppress(OSError):  # some systems cannot open a folder
        handle = os.open(newest.parent, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    others = [
        folder
        for folder in newest.parent.iterdir()
        if folder != newest and is_checkpoint(folder) and 0 <= samples_of(folder) <= samples
    ]
    for old in sorted(others, key=samples_of, reverse=True)[max(keep - 1, 0) :]:
        # Hide it first, so that a partly removed folder is never taken for a checkpoint.
        removed = old.with_name(f".{old.name}.removed")
        old.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)
