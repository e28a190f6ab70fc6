"""A bundle that was altered in any way is refused, and the refusal names what was altered."""

from __future__ import annotations

import json
import math
import os
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.bundle import (
    MANIFEST,
    PREDICTOR,
    Guarantee,
    conformal_rank,
    load_bundle,
    sha256,
    threshold_at,
    write_bundle,
)
from calibration.predictor import Predictor
from posthoc.contract import BundleError, DataError
from tests.factory import rows


@pytest.fixture
def copy(classification_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(classification_bundle, tmp_path / "bundle"))


def test_an_untouched_bundle_loads_and_reproduces(classification_bundle: Path) -> None:
    bundle = load_bundle(classification_bundle)
    assert bundle.identity == sha256((classification_bundle / MANIFEST).read_bytes())
    Predictor(bundle).self_check()
    assert bundle.manifest.splits.rows.keys() == {"module", "calibration", "conformal", "test"}


def test_every_single_changed_byte_is_found(copy: Path) -> None:
    rng = np.random.default_rng(0)
    for name in sorted(p.name for p in copy.iterdir() if p.name != MANIFEST):
        path = copy / name
        whole = path.read_bytes()
        for at in rng.integers(0, len(whole), 5):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(BundleError, match=f"{name} was changed"):
                load_bundle(copy)
        path.write_bytes(whole[:-1])
        with pytest.raises(BundleError, match=f"{name} was changed"):
            load_bundle(copy)
        path.write_bytes(whole)
    load_bundle(copy)


def test_an_extra_file_is_refused(copy: Path) -> None:
    (copy / "notes.txt").write_text("hello")
    with pytest.raises(BundleError, match=r"notes\.txt.*not named"):
        load_bundle(copy)


def test_a_missing_file_is_refused(copy: Path) -> None:
    (copy / "golden.npz").unlink()
    with pytest.raises(BundleError, match=r"golden\.npz cannot be read"):
        load_bundle(copy)


@pytest.mark.parametrize("name", [PREDICTOR, MANIFEST])
def test_a_symlink_is_refused_even_to_the_same_bytes(copy: Path, tmp_path: Path, name: str) -> None:
    target = tmp_path / "elsewhere"
    (copy / name).rename(target)
    (copy / name).symlink_to(target)
    with pytest.raises(BundleError, match=f"{name} is a symlink"):
        load_bundle(copy)


def test_a_pipe_is_refused(copy: Path) -> None:
    (copy / PREDICTOR).unlink()
    os.mkfifo(copy / PREDICTOR)
    with pytest.raises(BundleError, match="not a plain file"):
        load_bundle(copy)


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a/b", "..", "a\\b"])
def test_a_path_outside_the_folder_is_refused(copy: Path, name: str) -> None:
    edit(copy, lambda m: m["files"].update({name: {"size": 1, "sha256": "0" * 64}}))
    with pytest.raises(BundleError, match="outside the folder"):
        load_bundle(copy)


@pytest.mark.parametrize("version", [2, 0, None, "1"])
def test_an_unknown_schema_is_refused(copy: Path, version: object) -> None:
    edit(copy, lambda m: m.update({"schema_version": version}))
    with pytest.raises(BundleError, match="schema version"):
        load_bundle(copy)


def test_a_manifest_that_leaves_a_needed_file_out_is_refused(copy: Path) -> None:
    (copy / PREDICTOR).unlink()
    edit(copy, lambda m: m["files"].pop(PREDICTOR))
    with pytest.raises(BundleError, match=f"{PREDICTOR} is missing"):
        load_bundle(copy)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"schema_version": 1}', b"\xff"])
def test_a_broken_manifest_is_refused(copy: Path, text: bytes) -> None:
    (copy / MANIFEST).write_bytes(text)
    with pytest.raises(BundleError):
        load_bundle(copy)


def test_external_data_is_refused_before_anything_runs(copy: Path) -> None:
    model = onnx.load(copy / PREDICTOR)
    external = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0}
    onnx.save(model, copy / PREDICTOR, **external)
    (copy / "weights.bin").unlink()
    data = (copy / PREDICTOR).read_bytes()
    record = {"size": len(data), "sha256": sha256(data)}
    edit(copy, lambda m: m["files"].update({PREDICTOR: record}))
    with pytest.raises(BundleError, match=r"outside itself.*weights\.bin"):
        load_bundle(copy)


def test_a_bundle_is_never_overwritten(copy: Path) -> None:
    bundle = load_bundle(copy)
    with pytest.raises(BundleError, match="immutable"):
        write_bundle(copy, bundle.manifest, bundle.files)
    assert not list(copy.parent.glob(".*part*"))


def test_optional_fields_of_a_later_release_are_read_over(copy: Path) -> None:
    edit(copy, lambda m: m.update({"a_later_field": 1}))
    assert load_bundle(copy).manifest.name == "tiny"


@settings(deadline=None, derandomize=True, max_examples=300)
@given(n=st.integers(1, 5000), percent=st.sampled_from([1, 2, 5, 10, 15, 20, 30, 50]))
def test_the_rank_is_exact(n: int, percent: int) -> None:
    exact = math.ceil((n + 1) * (1 - Fraction(percent, 100)))
    assert conformal_rank(n, percent / 100) == min(n + 1, exact)


def test_the_rank_by_hand() -> None:
    assert [conformal_rank(n, 0.1) for n in (8, 9, 45, 50)] == [9, 9, 42, 46]
    assert threshold_at(np.arange(8.0), 0.1) == math.inf
    assert threshold_at(np.arange(9.0), 0.1) == 8.0


@pytest.mark.parametrize(
    ("n", "alpha", "exact", "law"),
    [(50, 0.1, 46 / 51, (46, 5)), (45, 0.1, 42 / 46, (42, 4)), (8, 0.1, 1.0, None)],
)
def test_a_guarantee_knows_its_law(
    n: int, alpha: float, exact: float, law: tuple[int, int] | None
) -> None:
    """Uniform scores: the coverage of one calibration is its threshold, k/(n+1) on the average."""
    rank = conformal_rank(n, alpha)
    promised = Guarantee(
        alpha=alpha, n=n, rank=rank, threshold=None if rank > n else 0.5, n_needed=9
    )
    assert (promised.exact, promised.law) == (exact, law)
    if law is None:
        return
    scores = np.sort(np.random.default_rng(0).uniform(size=(4000, n)), axis=1)
    own = np.asarray([threshold_at(s, alpha) for s in scores])
    a, b = law
    assert own.mean() == pytest.approx(exact, abs=4 * own.std() / math.sqrt(4000))
    assert own.var() == pytest.approx(a * b / ((a + b) ** 2 * (a + b + 1)), rel=0.1)
    risky = promised.model_copy(update={"kind": "risk"})
    assert risky.law is None and promised.model_copy(update={"threshold": None}).law is None


def test_alpha_beyond_the_rows_names_the_rows_it_needs(classification_bundle: Path) -> None:
    predictor = Predictor(classification_bundle)
    n = predictor.manifest.conformal.guarantees[0].n
    scores = predictor.bundle.conformal_scores["set"]
    assert predictor.q_hat(0.2) == scores[conformal_rank(n, 0.2) - 1]
    with pytest.raises(DataError, match=f"at least 9999 .*holds {n}"):
        predictor.q_hat(0.0001)
    with pytest.raises(DataError, match="between 0 and 1"):
        predictor.q_hat(0)


def test_a_threshold_for_each_row_equals_a_run_for_each(classification_bundle: Path) -> None:
    predictor = Predictor(classification_bundle)
    x = rows("classification", 40, 9)[0]
    q = np.where(np.arange(40) % 2, predictor.q_hat(0.1), predictor.q_hat(0.05))
    mixed = predictor.run({"x": x}, q_hat=q)["set"]
    for alpha, odd in ((0.1, 1), (0.05, 0)):
        alone = predictor.run({"x": x}, q_hat=predictor.q_hat(alpha))["set"]
        np.testing.assert_array_equal(mixed[odd::2], alone[odd::2])


def test_wrong_inputs_are_named(classification_bundle: Path) -> None:
    predictor = Predictor(classification_bundle)
    with pytest.raises(DataError, match="'x' is missing"):
        predictor.run({})
    with pytest.raises(DataError, match=r"'x' has shape \(2, 5\); the model takes N×4"):
        predictor.run({"x": np.zeros((2, 5))})


def edit(bundle: Path, change: object) -> None:
    """Apply ``change`` to the manifest's JSON."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    change(manifest)  # type: ignore[operator]
    (bundle / MANIFEST).write_text(json.dumps(manifest))
