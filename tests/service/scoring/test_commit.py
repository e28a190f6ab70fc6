from __future__ import annotations

from pathlib import Path

import pytest

from service.scoring.commit import locked, make_folder, new_file, remove_parts
from service.scoring.errors import ScoringError
from service.scoring.output import open_output, write_file
from service.scoring.places import open_place


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "a.bin"
    with new_file(path) as file:
        file.write(b"one")
        file.flush()
        (part,) = path.parent.iterdir()
        assert part.name.startswith(".part-") and part.read_bytes() == b"one"
    assert path.read_bytes() == b"one" and len(list(path.parent.iterdir())) == 1
    with pytest.raises(ZeroDivisionError), new_file(path) as file:
        file.write(b"two")
        raise ZeroDivisionError
    assert path.read_bytes() == b"one" and len(list(path.parent.iterdir())) == 1


def test_what_the_system_refuses_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ScoringError, match=r"cannot write .*file/a: .*same command again"):
        write_file(open_output(open_place(tmp_path / "file")), "a", b"")
    (tmp_path / "taken").mkdir()
    with pytest.raises(ScoringError, match=r"cannot write .*taken"):
        write_file(open_output(open_place(tmp_path)), "taken", b"")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken"]


def test_parts_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b")
    for name in (".part-1-x.parquet", "a/b/.part-2-y.parquet", "a/b/y.parquet"):
        (tmp_path / name).touch()
    remove_parts(tmp_path)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["y.parquet"]


def test_a_folder_is_held_by_one_run(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(ScoringError, match="another run"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())
