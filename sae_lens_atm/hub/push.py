"""Push a saved SAE to the Hugging Face Hub: check it, prepare its files, send one commit."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, cast

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
)
from huggingface_hub.errors import (
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from sae_lens import SAE
from sae_lens.constants import (
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
)

from sae_lens_atm.errors import SettingsError, one_line
from sae_lens_atm.files import read_json
from sae_lens_atm.hub.errors import clear_hub_errors
from sae_lens_atm.hub.loading import load_sae
from sae_lens_atm.hub.model_card import Described, card_metadata, section, updated_card
from sae_lens_atm.training.checkpoints import is_checkpoint

README, MAIN = "README.md", "main"
COMPARISON_FIGURES = "figures.json"
"""The file beside an SAE's folder in which `compare` saves its figures."""
_SENT = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME, RUNNER_CFG_FILENAME)
_FOLDER = r"\w[\w.=-]*"
_PRIVATE = (
    "output_path",
    "checkpoint_path",
    "cached_activations_path",
    "from_pretrained_path",
    "resume_from_checkpoint",
    "logger",
)
"""Fields of a runner's config that are not sent: paths and accounts."""


@dataclass(frozen=True)
class Upload:
    """An SAE that is ready to be sent."""

    repo_id: str
    revision: str
    sae_id: str
    id_was_given: bool
    files: dict[str, bytes | Path]
    """Content or path, by the name in the repo."""
    write_card: Callable[[str | None], str]
    """Returns the new card, given the present one or None."""

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the files in bytes."""
        return {
            name: len(f) if isinstance(f, bytes) else f.stat().st_size
            for name, f in self.files.items()
        }


def prepare(
    path: str | Path, repo_id: str, sae_id: str | None = None, revision: str = MAIN
) -> Upload:
    """Check a saved SAE and prepare the files of a push. The Hub is not asked.

    Only SAELens' four files are sent. Local paths in the two JSON files are cut to their last
    part. Fields about the machine and accounts are removed.

    Args:
        path: a saved SAE, or the folder of a run.
        repo_id: the repo, for example ``"you/your-saes"``.
        sae_id: the SAE's folder in the repo, the name for `SAE.from_pretrained`. By default made
            from hook, architecture, width and L0.
        revision: a branch of the repo.

    Raises:
        SettingsError: the SAE cannot be loaded or is not finite, or a name is not allowed.
    """
    _check_repo_id(repo_id)
    if sae_id is not None and not re.fullmatch(f"{_FOLDER}(/{_FOLDER})*", sae_id):
        raise SettingsError(f"--id must be folders of letters, digits and _-.=, got {sae_id!r}")
    folder = find_save(path)
    sae = load_inference(folder)
    files: dict[str, bytes | Path] = {}
    read = {name: _read(folder / name) for name in (SAE_CFG_FILENAME, RUNNER_CFG_FILENAME)}
    for name, value in (read[SAE_CFG_FILENAME].get("metadata") or {}).items():
        setattr(sae.cfg.metadata, name, value)  # no private paths in the card
    sae_id_or_default = sae_id or default_id(sae)
    for name in _SENT:
        if (folder / name).is_file():
            content = json.dumps(read[name], indent=2).encode() if name in read else folder / name
            files[f"{sae_id_or_default}/{name}"] = content
    figures, figures_from = _figures(folder, read[RUNNER_CFG_FILENAME])
    described = Described(sae, read[RUNNER_CFG_FILENAME], figures, figures_from, folder)
    text = section(described, repo_id, revision, sae_id_or_default)
    metadata = card_metadata(described)

    def write_card(old: str | None) -> str:
        return updated_card(old, sae_id_or_default, text, metadata)

    return Upload(repo_id, revision, sae_id_or_default, sae_id is not None, files, write_card)


def push(upload: Upload, private: bool = False) -> CommitInfo:
    """Send an SAE and the card in one commit, so that a repo never holds half an SAE.

    The repo is created if it does not exist. The Hub rejects the commit if another commit was
    made meanwhile, so that no section of the card is lost.

    Args:
        upload: the SAE, from `prepare`.
        private: create the repo as private.

    Raises:
        SettingsError: the branch does not exist, or the default folder holds another SAE.
        HubError: the Hub refused, or cannot be reached. The repo is unchanged.
    """
    what = f"repo {upload.repo_id}"
    if upload.revision != MAIN:
        what += f", branch {upload.revision}"
    with clear_hub_errors(what):
        api = HfApi(library_name="sae-lens-atm")
        info = _repo(api, upload, private)
        present = {file.rfilename for file in info.siblings or ()}
        former = {f"{upload.sae_id}/{name}" for name in _SENT} & present
        if former and not upload.id_was_given:
            raise SettingsError(
                f"{what} already holds {upload.sae_id}: replace it with --id {upload.sae_id}, or "
                "set another --id"
            )
        card = None
        if README in present:
            present_card = api.hf_hub_download(upload.repo_id, README, revision=info.sha)
            card = Path(present_card).read_bytes().decode("utf-8", errors="replace")
        files = {**upload.files, README: upload.write_card(card).encode()}
        # With hf_xet installed, `upload_folder` makes several commits.
        return api.create_commit(
            upload.repo_id,
            [
                *(CommitOperationAdd(name, content) for name, content in files.items()),
                *(CommitOperationDelete(name) for name in sorted(former - files.keys())),
            ],
            commit_message=f"Upload SAE {upload.sae_id}",
            revision=upload.revision,
            parent_commit=info.sha,
        )


def find_save(path: str | Path) -> Path:
    """Return the folder of the saved SAE at a path, or in the folder of a run.

    Raises:
        SettingsError: there is none, or there are several.
    """
    folder = Path(path)
    if not folder.exists():
        raise SettingsError(f"no folder {folder}")
    for candidate in (folder, folder / "sae"):
        if (candidate / SAE_CFG_FILENAME).is_file():
            return candidate
    saves = sorted(file.parent for file in folder.glob(f"runs/*/sae/{SAE_CFG_FILENAME}"))
    if len(saves) == 1:
        return saves[0]
    if saves:
        raise SettingsError(
            f"{folder} holds {len(saves)} SAEs: push one of them, for example {saves[0]}"
        )
    if any(is_checkpoint(candidate) for candidate in folder.glob("checkpoints/*")):
        raise SettingsError(
            f"{folder} holds an unfinished run: finish it with `train --resume` first"
        )
    raise SettingsError(f"{folder} holds no {SAE_CFG_FILENAME}: it is not a saved SAE")


def load_inference(folder: Path) -> SAE[Any]:
    """Load an SAE in an inference format.

    Raises:
        SettingsError: it cannot be loaded, or it is a checkpoint. The training of a checkpoint may
            not be over, and only this package loads it.
    """
    sae = load_sae(str(folder))
    if sae.cfg.architecture() == "atm" or is_checkpoint(folder):
        raise SettingsError(
            f"{folder} is a training checkpoint: push the output_path of a finished run, or a "
            "folder written by sae.save_inference_model"
        )
    return sae


def default_id(sae: SAE[Any]) -> str:
    """Return a folder for an SAE in a repo, from its hook, architecture, width and L0."""
    metadata = sae.cfg.metadata
    parts = [metadata.training_architecture or sae.cfg.architecture(), str(sae.cfg.d_sae)]
    if metadata.l0 is not None:
        parts.append(f"l0-{round(metadata.l0, 1):g}")
    folders = [metadata.hook_name or "", "-".join(parts)]
    return "/".join(re.sub(r"[^\w.=-]", "-", folder) for folder in folders if folder)


def without_local_paths(value: Any) -> Any:
    """Return the content of a JSON file without local paths and private fields."""
    if isinstance(value, dict):
        items = cast(dict[str, Any], value).items()
        return {k: without_local_paths(v) for k, v in items if k not in _PRIVATE}
    if isinstance(value, list):
        return [without_local_paths(v) for v in cast(list[Any], value)]
    return PureWindowsPath(value).name if isinstance(value, str) and _is_local(value) else value


def _is_local(text: str) -> bool:
    windows, home = PureWindowsPath(text), Path.home()  # handles both kinds of slashes
    return (
        bool(windows.root or windows.drive)
        or text.startswith(("~", "..", "file:"))
        or (bool(home.name) and f"{home}/" in text)
    )


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        reason = one_line(error)
        raise SettingsError(
            f"repo id must be NAMESPACE/NAME, got {repo_id!r} ({reason})"
        ) from error
    if "/" not in repo_id:
        raise SettingsError(f"repo id must be NAMESPACE/NAME, got {repo_id!r}")


def _repo(api: HfApi, upload: Upload, private: bool) -> ModelInfo:
    """Return the repo at the head of the branch. Create it if it does not exist."""
    try:
        info = api.model_info(upload.repo_id, revision=upload.revision)
    except RevisionNotFoundError as error:
        raise SettingsError(
            f"repo {upload.repo_id} has no branch {upload.revision!r}: create it with `hf repos "
            f"branch create {upload.repo_id} {upload.revision}`"
        ) from error
    except RepositoryNotFoundError:
        if upload.revision != MAIN:
            raise
        api.create_repo(upload.repo_id, private=private or None, exist_ok=True)
        info = api.model_info(upload.repo_id, revision=upload.revision)
    if private and not info.private:
        raise SettingsError(f"repo {upload.repo_id} is public: --private applies to new repos only")
    return info


def _figures(folder: Path, runner: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the figures saved with an SAE, and a phrase on their origin."""
    stats = _read(folder / "eval_stats.json")
    if stats or folder.name != "sae":
        data = "fresh samples" if "synthetic_model" in runner else "text of the training dataset"
        return stats, f"measured at the end of training, on {data} (`eval_stats.json`):"
    figures = _read(folder.parent / COMPARISON_FIGURES).get("figures", {})
    return figures, "measured by `sae-lens-atm compare` on data held out from training:"


def _read(path: Path) -> dict[str, Any]:
    try:
        content: Any = read_json(path)
    except ValueError as error:
        raise SettingsError(f"{path} is not JSON") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{path} must hold a mapping of keys, got {type(content).__name__}")
    return without_local_paths(content)
