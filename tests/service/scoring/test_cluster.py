"""A mapper against `map`, on a real Ray cluster of this machine: order, errors, lost workers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from posthoc.contract import DataError
from posthoc.folds import Mapper
from service.scoring.cluster import AHEAD, ATTEMPTS, ClusterError, connect

ROOT = Path(__file__).resolve().parents[3]


def squared(x: int) -> int:
    return x * x


@pytest.fixture(scope="module")
def workers(cluster: None) -> Iterator[Mapper]:
    with connect(2) as found:
        yield found


@pytest.fixture
def mapper(workers: Mapper) -> Mapper:
    """Two workers, which most tests share: a process takes a second to start."""
    return workers


@pytest.fixture
def room(workers: Mapper) -> None:
    """The cluster without those."""
    workers.close()


def test_results_come_in_the_order_of_the_items(mapper: Mapper) -> None:
    for n in (0, 1, 40):
        assert list(mapper(squared, range(n))) == [x * x for x in range(n)]


@pytest.mark.parametrize("n", [1, 5])
def test_one_worker_and_more_than_there_is_room_for(room: None, n: int) -> None:
    with connect(n) as mapper:
        assert list(mapper(squared, range(20))) == [x * x for x in range(20)]
        assert mapper.workers == n


def uneven(x: int) -> int:
    """The first of every four items takes longest."""
    return sum(range(2_000_000 if x % 4 == 0 else 10)) * 0 + x


def test_items_are_drawn_as_they_are_needed_and_late_ones_are_waited_for(mapper: Mapper) -> None:
    drawn: list[int] = []

    def items() -> Iterator[int]:
        for x in range(60):
            drawn.append(x)
            yield x

    for i, got in enumerate(mapper(uneven, items())):
        assert got == i
        assert len(drawn) <= i + 2 * AHEAD


class Kept:
    """Writes a line each time that it arrives somewhere, and counts what it is asked."""

    def __init__(self, path: Path):
        self.path, self.asked = path, 0

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__ |= state
        with self.path.open("a") as file:
            file.write(f"{os.getpid()}\n")

    def __call__(self, x: int) -> tuple[int, int]:
        self.asked += 1
        return os.getpid(), self.asked


def test_a_function_is_sent_to_each_worker_once_and_lives_there(
    mapper: Mapper, tmp_path: Path
) -> None:
    said = list(mapper(Kept(tmp_path / "sent"), range(30)))
    arrived = (tmp_path / "sent").read_text().split()
    workers = {pid for pid, _ in said}
    assert sorted(map(int, arrived)) == sorted(workers) and len(workers) <= 2
    assert os.getpid() not in workers
    for pid in workers:
        asked = [n for p, n in said if p == pid]
        assert sorted(asked) == list(range(1, len(asked) + 1))


def broken(x: int) -> int:
    if x == 7:
        raise DataError(f"row {x} is bad; mend it")
    if x == 70:
        raise ZeroDivisionError("nothing of ours")
    return x


def test_errors_of_the_function_arrive_as_they_are(mapper: Mapper) -> None:
    with pytest.raises(DataError) as caught:
        list(mapper(broken, range(20)))
    assert str(caught.value) == "row 7 is bad; mend it"
    with pytest.raises(ZeroDivisionError, match="nothing of ours"):
        list(mapper(broken, range(60, 80)))
    assert list(mapper(squared, range(5))) == [0, 1, 4, 9, 16]  # and the workers are there again


def fragile(folder: Path, times: int, x: int) -> int:
    """Takes its process with it at every fifth item, so many times."""
    if x % 5 == 2:
        for attempt in range(times):
            try:
                (folder / f"{x}-{attempt}").touch(exist_ok=False)
            except FileExistsError:
                continue
            os._exit(1)
    return x * x


def test_what_a_lost_worker_had_is_done_by_another(mapper: Mapper, tmp_path: Path) -> None:
    assert list(mapper(partial(fragile, tmp_path, 1), range(12))) == [x * x for x in range(12)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2-0", "7-0"]


def test_an_item_that_ends_every_worker_is_given_up(mapper: Mapper, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=f"{ATTEMPTS} workers were lost over one piece"):
        list(mapper(partial(fragile, tmp_path, 99), range(5)))
    assert len(list(tmp_path.iterdir())) == ATTEMPTS
    assert list(mapper(squared, range(3))) == [0, 1, 4]


def test_results_that_nobody_takes_leave_the_workers_usable(mapper: Mapper) -> None:
    some = mapper(squared, range(100))
    assert [next(some) for _ in range(3)] == [0, 1, 4]
    some.close()  # type: ignore[attr-defined]
    assert list(mapper(squared, range(3))) == [0, 1, 4]


def here(x: int) -> str:
    return str(Path.cwd())


def test_relative_paths_mean_what_they_mean_at_home(
    room: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with connect(1) as mapper:
        assert list(mapper(here, [0])) == [str(tmp_path)]


def test_no_workers_are_no_cluster() -> None:
    with pytest.raises(ClusterError, match="0 workers do nothing"), connect(0):
        pass


FIT = """
import sys
sys.modules.update(MODULES)
from hedged.cli import main
sys.argv = ["hedged", "fit", "m.onnx", "--data", "d.parquet", "--task", "classification",
            "--target", "y", "-o", "b", "--engine", "ray"]
main()
"""


@pytest.mark.parametrize(
    ("modules", "address", "message"),
    [
        # None is what an environment without it answers.
        (
            {"ray": None},
            "",
            "the engine ray needs Ray, which is not installed: pip install 'hedged[ray]'",
        ),
        (
            {},
            "127.0.0.1:1",
            "no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1: Connection refused; start it, or "
            "unset the variable to use this machine",
        ),
    ],
)
def test_a_cluster_that_cannot_be_had_is_told_in_a_line(
    tmp_path: Path, modules: dict[str, None], address: str, message: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FIT.replace("MODULES", repr(modules))],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": address},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines() == [f"hedged: {message}"]
