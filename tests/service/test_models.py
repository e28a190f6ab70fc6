"""Bundles on disk: which are live, and which may be served."""

from __future__ import annotations

import shutil

import pytest

from posthoc.contract import BundleError
from service.bundles import find_bundles
from service.live import open_models


def test_a_damaged_bundle_is_not_served(classifier, tmp_path):
    copy = tmp_path / "root" / "tiny" / "1"
    shutil.copytree(classifier, copy)
    assert find_bundles(tmp_path / "root") == {"tiny": copy}
    assert list(open_models(tmp_path / "root", device="cpu", threads=1).models) == ["tiny"]
    copy.rename(copy.with_name("2"))
    with pytest.raises(BundleError, match="is version '1' of 'tiny'; rename the folder"):
        open_models(tmp_path / "root", device="cpu", threads=1)
    copy.with_name("2").rename(copy)
    copy.parent.rename(tmp_path / "root" / "small")
    with pytest.raises(BundleError, match="'tiny' and lies in the folder of 'small'"):
        open_models(tmp_path / "root", device="cpu", threads=1)
    (tmp_path / "root" / "small" / "1" / "head.onnx").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"head\.onnx was changed"):
        open_models(tmp_path / "root", device="cpu", threads=1)


def test_the_live_version_is_named(classifier, tmp_path):
    for version in ("1", "2"):
        shutil.copytree(classifier, tmp_path / "tiny" / version)
    with pytest.raises(BundleError, match="2 versions"):
        find_bundles(tmp_path)
    active = tmp_path / "tiny" / "active.json"
    active.write_text('{"version": "2"}')
    assert find_bundles(tmp_path) == {"tiny": tmp_path / "tiny" / "2"}
    for text, says in (("[]", "must be"), ("{", "must be"), ('{"version": "3"}', "'3'")):
        active.write_text(text)
        with pytest.raises(BundleError, match=says):
            find_bundles(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match="no bundle"):
        find_bundles(tmp_path / "empty")
    with pytest.raises(BundleError, match="no such folder"):
        find_bundles(tmp_path / "nothing")


def test_what_a_killed_fit_has_left_is_no_version(classifier, tmp_path):
    shutil.copytree(classifier, tmp_path / "tiny" / "1")
    shutil.copytree(classifier, tmp_path / "tiny" / ".2.part-4711")
    assert find_bundles(tmp_path) == {"tiny": tmp_path / "tiny" / "1"}
    shutil.copytree(classifier, tmp_path / "tiny" / "2")
    with pytest.raises(
        BundleError, match=f"2 versions .*: hedged activate {tmp_path} tiny VERSION"
    ):
        find_bundles(tmp_path)
    (tmp_path / "tiny" / "active.json").write_text('{"version": ".2.part-4711"}')
    with pytest.raises(BundleError, match="there are 1, 2"):
        find_bundles(tmp_path)
