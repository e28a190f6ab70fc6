"""The file of a monitor is one monitor's."""

from __future__ import annotations

import pytest

from posthoc.contract import DataError
from service.monitor.saved import held, restore, save
from service.monitor.stream import Options
from service.monitor.watch import Watch


def test_one_monitor_has_a_file_at_a_time(tmp_path):
    file = tmp_path / "state.json"
    with held(file):
        save(Watch(), Options(), file)  # the file is another one now, and still held
        with pytest.raises(DataError, match=r"state\.json: another hedged monitor"), held(file):
            pass
        with held(tmp_path / "other.json"):
            pass
    with held(file):
        assert restore(file, Options()) == Watch()


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match="cannot be written"), held(tmp_path / "no" / "state.json"):
        pass


def test_errors_of_other_files_are_not_its_own(tmp_path):
    with pytest.raises(FileNotFoundError), held(tmp_path / "state.json"):
        (tmp_path / "none").read_text()
