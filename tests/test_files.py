"""Files appear whole or not at all."""

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch

from secateur.errors import RunError
from secateur.files import append_line, atomic, human, parse_size, read_tensors, sha256, write_json, write_tensors
from secateur.workspace import Journal


def test_a_file_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file"
    with atomic(target) as partial:
        partial.write_text("new")
        assert not target.exists() and partial.parent == target.parent
    assert target.read_text() == "new" and list(target.parent.iterdir()) == [target]


def test_what_fails_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic(target) as partial:
        partial.write_text("half")
        _ = 1 / 0
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told(tmp_path: Path, number: int) -> None:
    with pytest.raises(RunError, match=r"the disk is full: file .* same command again"), atomic(tmp_path / "file"):
        raise OSError(number, os.strerror(number))


def test_another_trouble_of_the_disk_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="Read-only file system"), atomic(tmp_path / "file"):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_files_are_as_readable_as_others(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_tensors(tmp_path / "tensors", {"a": torch.ones(2)})
    assert (tmp_path / "tensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_tensors_and_their_metadata_come_back(tmp_path: Path) -> None:
    wide = torch.arange(12.0).view(3, 4)
    given = {"rows": wide.T, "half": wide.bfloat16(), "none": torch.empty(0)}
    write_tensors(tmp_path / "file", given, {"state": json.dumps({"episode": 3})})
    tensors, metadata = read_tensors(tmp_path / "file")
    assert all(torch.equal(tensors[name], given[name]) and tensors[name].dtype == given[name].dtype for name in given)
    assert json.loads(metadata["state"]) == {"episode": 3}
    first = sha256(tmp_path / "file")
    write_tensors(tmp_path / "file", given, {"state": json.dumps({"episode": 3})})
    assert sha256(tmp_path / "file") == first


def test_sha256_tells_how_far_it_is(tmp_path: Path) -> None:
    content = os.urandom(5 << 20)
    (tmp_path / "file").write_bytes(content)
    seen: list[int] = []
    assert sha256(tmp_path / "file", seen=seen.append) == hashlib.sha256(content).hexdigest()
    assert sum(seen) == len(content) and len(seen) > 1


def test_json_keeps_letters(tmp_path: Path) -> None:
    write_json(tmp_path / "file", {"name": "Sécateur", "path": "ü"})
    assert "Sécateur" in (tmp_path / "file").read_text(encoding="utf-8")


def test_a_journal_survives_a_torn_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "state")
    assert list(journal.entries()) == []
    journal.add({"shard": "one"})
    with (tmp_path / "state" / "journal-0.jsonl").open("ab") as file:
        file.write(b'\n{"shard": "to')
    journal.add({"shard": "three"})
    assert [entry["shard"] for entry in journal.entries()] == ["one", "three"]


def test_lines_are_added(tmp_path: Path) -> None:
    append_line(tmp_path / "deep" / "file", "a")
    append_line(tmp_path / "deep" / "file", "b")
    assert (tmp_path / "deep" / "file").read_text() == "\na\nb"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0), ("17", 17), ("17b", 17), ("3GB", 3 * 10**9), ("3 gb", 3 * 10**9), ("1.5k", 1500), ("512MB", 512 * 10**6),
        ("2GiB", 2 * 1024**3), ("1KiB", 1024), (".5MiB", 512 * 1024), ("1t", 10**12), (" 8G ", 8 * 10**9),
    ],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-3GB", "3XB", "inf", "nan", "1e9", "3 4", "1,5GB", "0x10"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1536, "1.5 kB"), (123456, "123 kB"), (3e9, "3.0 GB"), (5e12, "5.0 TB")],
)
def test_sizes_as_people_read_them(size: float, text: str) -> None:
    assert human(size) == text
