import errno
import json
import math

import pytest
from safetensors import SafetensorError

from sae_lens_atm.errors import RankLostError, SaveError, SettingsError
from sae_lens_atm.files import (
    MANIFEST_FILENAME,
    locked,
    manifest_mismatch,
    read_json,
    read_manifest,
    replace_folder,
    restore_replaced,
    saved_at_once,
    saving,
    to_json,
    turn,
    write_json,
    write_manifest,
    write_text,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_text_is_replaced_at_once(tmp_path):
    path = tmp_path / "a.txt"
    assert write_text(path, "old") == path
    write_text(path, "new ü")
    assert path.read_text(encoding="utf-8") == "new ü"
    assert names(tmp_path) == ["a.txt"]


def test_one_after_the_other_and_waiting_can_be_stopped(tmp_path):
    lock, waited = tmp_path / ".lock", []
    with turn(lock, lambda: waited.append(1)):
        pass
    with turn(lock, lambda: waited.append(1)):  # it was released

        def stop():
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), turn(lock, stop):
            raise AssertionError
    assert waited == []


def test_files_move_together_and_the_last_one_completes_the_folder(tmp_path):
    out = tmp_path / "new/out"
    with saved_at_once(out) as partial:
        assert partial.parent == out
        for name in ("cfg.json", "z", "a"):
            (partial / name).write_text(name)
        assert not (out / "cfg.json").exists()
    assert names(out) == ["a", "cfg.json", "z"]
    with pytest.raises(OSError, match="disk"), saved_at_once(out) as partial:  # noqa: PT012
        (partial / "cfg.json").write_text("half")
        raise OSError("disk")
    assert (out / "cfg.json").read_text() == "cfg.json"
    with saved_at_once(out, last="z") as partial:  # what the failure left is removed
        assert names(partial) == []
    assert names(out) == ["a", "cfg.json", "z"]


def folder_with(path, text):
    path.mkdir()
    (path / "a").write_text(text)
    return path


def test_a_folder_is_replaced(tmp_path):
    final = tmp_path / "final"
    for text in ("first", "second"):
        replace_folder(folder_with(tmp_path / ".partial", text), final)
        assert (final / "a").read_text() == text
    assert names(tmp_path) == ["final"]


def test_a_replacement_that_did_not_end_is_undone(tmp_path):
    folder_with(tmp_path / ".final.replaced", "old")
    folder_with(tmp_path / ".other.replaced", "old")
    folder_with(tmp_path / "other", "new")
    restore_replaced(tmp_path)
    assert (tmp_path / "final/a").read_text() == "old"
    assert (tmp_path / "other/a").read_text() == "new"
    restore_replaced(tmp_path / "absent")


def test_a_damaged_json_file_is_named(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1')
    with pytest.raises(SettingsError, match=r"a\.json is not JSON \(.*\): replace or remove it"):
        read_json(tmp_path / "a.json")


def test_json_has_null_for_what_is_not_finite_and_short_lists(tmp_path):
    path = tmp_path / "a.json"
    assert read_json(path) == {}
    content = {"a": [1.0, math.nan, 2.123456789], "b": {"c": math.inf, "d": "x"}, "e": 0.1234567}
    write_json(path, content)
    assert read_json(path) == {"a": [1.0, None, 2.12346], "b": {"c": None, "d": "x"}, "e": 0.123457}
    assert '"a": [ 1.0, null, 2.12346 ]' in path.read_text()
    assert json.loads(to_json(content))["e"] == 0.1234567


def test_a_manifest_notices_every_change(tmp_path):
    assert read_manifest(tmp_path) is None
    assert manifest_mismatch(tmp_path) is None  # as in SAELens' checkpoints
    contents = {"a": b"12345", "b": b"x" * 3_000_000}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    write_manifest(tmp_path, skipped_batches=3)
    assert read_manifest(tmp_path)["skipped_batches"] == 3
    assert manifest_mismatch(tmp_path) is None
    for name, content in contents.items():
        path = tmp_path / name
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert manifest_mismatch(tmp_path).startswith(f"{name} ")
        assert manifest_mismatch(tmp_path, checksums=False) is None
        path.write_bytes(content + b"x")
        assert f"{name} has {len(content) + 1} bytes" in manifest_mismatch(
            tmp_path, checksums=False
        )
        path.unlink()
        assert manifest_mismatch(tmp_path, checksums=False) == f"{name} is missing"
        path.write_bytes(content)
    for text in ("[]", "{}", '{"files": []}', '{"files": {"cfg.json": 3}}', "\0"):
        (tmp_path / MANIFEST_FILENAME).write_text(text)
        assert manifest_mismatch(tmp_path) is not None


def test_only_one_process_writes_to_a_folder(tmp_path):
    error = pytest.raises(SettingsError, match=r"^output_path is .*out: another process")
    with locked(tmp_path / "out"), error, locked(tmp_path / "out"):
        pass
    with locked(tmp_path / "out"):
        pass


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space"), "No space left on the disk"),
        (
            SafetensorError("I/O error: IoError(Os { code: 28, kind: StorageFull })"),
            "No space left",
        ),
        (RuntimeError("PytorchStreamWriter failed\nwriting file"), "PytorchStreamWriter failed w"),
    ],
)
def test_an_error_while_saving_names_the_folder(tmp_path, error, reason):
    with pytest.raises(SaveError, match=f"^cannot save {tmp_path}: {reason}"), saving(tmp_path):
        raise error


def test_a_lost_rank_is_no_error_of_saving(tmp_path):
    with pytest.raises(RankLostError), saving(tmp_path):
        raise RankLostError("gone")


def test_a_text_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "figures.json").mkdir()  # the rename fails
    with pytest.raises(SaveError, match=r"cannot save .*figures\.json"):
        write_text(tmp_path / "figures.json", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
