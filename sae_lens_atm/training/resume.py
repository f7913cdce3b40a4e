"""Resuming a run in its own folder."""

from pathlib import Path

from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME, TRAINER_STATE_FILENAME

from sae_lens_atm.files import read_json
from sae_lens_atm.training.checkpoints import check_finished, newest_checkpoint, reading
from sae_lens_atm.training.run_file import Run


def resume_in_place(run: Run, resume: Path) -> None:
    """Set the run's folders to those of the run that it resumes.

    Args:
        run: the run that resumes.
        resume: the folder of a run, or one of its checkpoints.

    Raises:
        CheckpointError: there is no run.
    """
    if is_finished(resume):
        run.runner.output_path, run.runner.checkpoint_path = str(resume), f"{resume}/checkpoints"
        return
    checkpoint = newest_checkpoint(resume)
    with reading(checkpoint):
        stored = read_json(checkpoint / RUNNER_CFG_FILENAME)
        stored_folder = Path(stored.get("checkpoint_path") or "")
    folder = checkpoint.parent
    if folder.name == "checkpoints":
        run.runner.output_path = str(folder.parent)
    elif stored_folder.resolve() == folder.resolve():
        run.runner.output_path = stored["output_path"]
    else:
        return
    run.runner.checkpoint_path = str(folder)


def is_finished(folder: Path) -> bool:
    """Return whether a folder holds the SAE of a finished run."""
    return (folder / SAE_CFG_FILENAME).is_file() and not (folder / TRAINER_STATE_FILENAME).exists()


def is_already_trained(run: Run, extend: int) -> bool:
    """Return whether the run's folder holds its finished SAE.

    Raises:
        CheckpointError: the folder holds the SAE of another run.
    """
    output = Path(run.runner.output_path or "")
    return is_finished(output) and check_finished(output, run, extend)
