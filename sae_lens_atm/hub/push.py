"""A saved SAE on the Hugging Face Hub: checked, made ready, sent in one commit."""

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

from sae_lens_atm.compare.run.stored_run import FIGURES
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.files import read_json
from sae_lens_atm.hub.errors import clear_hub_errors
from sae_lens_atm.hub.loading import load_sae
from sae_lens_atm.hub.model_card import Described, card_metadata, section, updated_card
from sae_lens_atm.training.checkpoints import is_checkpoint

README, MAIN = "README.md", "main"
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
"""Of a runner's config: where it ran, and on whose account. It is not sent."""


@dataclass(frozen=True)
class Upload:
    """A SAE ready to be sent."""

    repo_id: str
    revision: str
    sae_id: str
    id_was_given: bool
    files: dict[str, bytes | Path]
    """By their names in the repo."""
    write_card: Callable[[str | None], str]
    """From the card that is there, if any, the one that is to be."""

    @property
    def sizes(self) -> dict[str, int]:
        """Of the files, in bytes."""
        return {
            name: len(f) if isinstance(f, bytes) else f.stat().st_size
            for name, f in self.files.items()
        }


def prepare(
    path: str | Path, repo_id: str, sae_id: str | None = None, revision: str = MAIN
) -> Upload:
    """Check a saved SAE and lay out what a push would send. Asks nobody.

    Only SAELens' four files are sent. Absolute paths in the two JSON files are cut to their last
    part, and what a runner's config says of the machine and of accounts is left out.

    Args:
        path: an inference save, or a run's folder that holds one (`sae`, in a comparison).
        repo_id: where to, `you/your-saes`.
        sae_id: its folder in the repo, and what `SAE.from_pretrained` is to call it.
        revision: a branch.

    Raises:
        SettingsError: the SAE cannot be loaded or is not finite, or a name is not allowed.
    """
    _check_repo_id(repo_id)
    if sae_id is not None and not re.fullmatch(f"{_FOLDER}(/{_FOLDER})*", sae_id):
        raise SettingsError(f"--id is {sae_id!r}: allowed are folders of letters, digits and _-.=")
    folder = find_save(path)
    sae = load_checked(folder)
    files: dict[str, bytes | Path] = {}
    read = {name: _read(folder / name) for name in (SAE_CFG_FILENAME, RUNNER_CFG_FILENAME)}
    for name, value in (read[SAE_CFG_FILENAME].get("metadata") or {}).items():
        setattr(sae.cfg.metadata, name, value)  # the card says no more than the files
    sae_id_or_default = sae_id or default_id(sae)
    for name in _SENT:
        if (folder / name).is_file():
            content = json.dumps(read[name], indent=2).encode() if name in read else folder / name
            files[f"{sae_id_or_default}/{name}"] = content
    figures, figures_from = _figures(folder, read[RUNNER_CFG_FILENAME])
    described = Described(sae, read[RUNNER_CFG_FILENAME], figures, figures_from)
    text = section(described, repo_id, revision, sae_id_or_default)
    metadata = card_metadata(described)

    def write_card(old: str | None) -> str:
        return updated_card(old, sae_id_or_default, text, metadata)

    return Upload(repo_id, revision, sae_id_or_default, sae_id is not None, files, write_card)


def push(upload: Upload, private: bool = False) -> CommitInfo:
    """Send a SAE and the card in one commit: a repo never holds half a SAE.

    The repo is made if there is none. The commit is refused if another came in between, so that
    no one's section of the card is lost.

    Raises:
        SettingsError: the branch is missing, or another SAE stands where nobody said to put one.
        HubError: the Hub refuses, or cannot be reached. The repo is as it was.
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
                "give another --id"
            )
        card = None
        if README in present:
            there = api.hf_hub_download(upload.repo_id, README, revision=info.sha)
            card = Path(there).read_bytes().decode("utf-8", errors="replace")
        files = {**upload.files, README: upload.write_card(card).encode()}
        # Not `upload_folder`: with hf_xet installed it sends several commits.
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
    """The folder of the inference save that a path means.

    Raises:
        SettingsError: there is none, or several.
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
        raise SettingsError(f"{folder} holds {len(saves)} SAEs: push one, such as {saves[0]}")
    if any(is_checkpoint(candidate) for candidate in folder.glob("checkpoints/*")):
        raise SettingsError(f"{folder} holds a run that is not finished: --resume it first")
    raise SettingsError(f"{folder} holds no {SAE_CFG_FILENAME}: it is not a saved SAE")


def load_checked(folder: Path) -> SAE[Any]:
    """Load a SAE that may be pushed: of an inference architecture, all of it finite.

    A checkpoint is refused, not converted: its training may not be over, its SAE loads only with
    this package, and whoever wants to publish it as it is can do so in one line.

    Raises:
        SettingsError: it may not.
    """
    sae = load_sae(str(folder))  # strict: shapes are those of the config
    if sae.cfg.architecture() == "atm" or is_checkpoint(folder):
        raise SettingsError(
            f"{folder} is a training checkpoint: push the run's output_path when it is finished, "
            "or a folder that sae.save_inference_model(FOLDER) wrote"
        )
    for name, tensor in sae.state_dict().items():
        if not bool(tensor.isfinite().all()):
            raise SettingsError(f"{folder}: {name} holds NaN or infinity")
    return sae


def default_id(sae: SAE[Any]) -> str:
    """A name for a SAE in a repo: where it belongs, what it is, how wide, how sparse."""
    metadata = sae.cfg.metadata
    parts = [metadata.training_architecture or sae.cfg.architecture(), str(sae.cfg.d_sae)]
    if metadata.l0 is not None:
        parts.append(f"l0-{round(metadata.l0, 1):g}")
    folders = [metadata.hook_name or "", "-".join(parts)]
    return "/".join(re.sub(r"[^\w.=-]", "-", folder) for folder in folders if folder)


def without_local_paths(value: Any) -> Any:
    """The content of a JSON file without what is private in it (see `prepare`)."""
    if isinstance(value, dict):
        items = cast(dict[str, Any], value).items()
        return {k: without_local_paths(v) for k, v in items if k not in _PRIVATE}
    if isinstance(value, list):
        return [without_local_paths(v) for v in cast(list[Any], value)]
    return PureWindowsPath(value).name if isinstance(value, str) and _is_local(value) else value


def _is_local(text: str) -> bool:
    windows, home = PureWindowsPath(text), Path.home()  # Windows' take both kinds of slashes
    return (
        bool(windows.root or windows.drive)
        or text.startswith(("~", "..", "file:"))
        or (bool(home.name) and f"{home}/" in text)
    )


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        reason = " ".join(str(error).split())
        raise SettingsError(
            f"repo id is {repo_id!r}: allowed is NAMESPACE/NAME ({reason})"
        ) from error
    if "/" not in repo_id:
        raise SettingsError(f"repo id is {repo_id!r}: allowed is NAMESPACE/NAME")


def _repo(api: HfApi, upload: Upload, private: bool) -> ModelInfo:
    """The repo at the head of the branch, made if there is none."""
    try:
        info = api.model_info(upload.repo_id, revision=upload.revision)
    except RevisionNotFoundError as error:
        raise SettingsError(
            f"repo {upload.repo_id} has no branch {upload.revision!r}: `hf repos branch create "
            f"{upload.repo_id} {upload.revision}` makes it"
        ) from error
    except RepositoryNotFoundError:
        if upload.revision != MAIN:
            raise
        api.create_repo(upload.repo_id, private=private or None, exist_ok=True)
        info = api.model_info(upload.repo_id, revision=upload.revision)
    if private and not info.private:
        raise SettingsError(f"repo {upload.repo_id} is public: --private does not change that")
    return info


def _figures(folder: Path, runner: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The figures kept with a SAE, and how they were come by."""
    stats = _read(folder / "eval_stats.json")
    if stats or folder.name != "sae":
        data = "fresh samples" if "synthetic_model" in runner else "text of the training data set"
        return stats, f"measured when training was finished, on {data} (`eval_stats.json`):"
    kept = _read(folder.parent / FIGURES).get("figures", {})
    return kept, "measured by `sae-lens-atm compare` on data held out from training:"


def _read(path: Path) -> dict[str, Any]:
    try:
        content: Any = read_json(path)
    except ValueError as error:
        raise SettingsError(f"{path} is not JSON") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{path} holds {type(content).__name__}: allowed is a mapping of keys")
    return without_local_paths(content)
