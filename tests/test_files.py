"""A file is whole, or it is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from realtime.files import NewFile, check_writable


def test_a_new_file_takes_the_place_of_the_old_one_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), NewFile(path) as part:
        part.write_text("ha")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with NewFile(path) as part:
        part.write_text("new")
        assert path.read_text() == "old" and part.parent == tmp_path and part.suffix == ".json"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_name_that_cannot_be_taken_leaves_no_part(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError), NewFile(tmp_path / "a") as part:
        part.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_whether_a_file_could_be_written_is_known_before(tmp_path: Path) -> None:
    check_writable(tmp_path / "a.json")
    assert not list(tmp_path.iterdir())
    with pytest.raises(IsADirectoryError):
        check_writable(tmp_path)
    with pytest.raises(FileNotFoundError):
        check_writable(tmp_path / "none" / "a.json")
