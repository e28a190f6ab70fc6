"""What Hedged installs is under licences that ask nothing of who ships it: none of the GPL family,
none that forbids a use."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.supply.dockerfile import ROOT

# "BSL-1.0" is Boost's, and permissive; the Business Source License is BUSL.
REFUSED = re.compile(
    r"GPL|General Public|BUSL|Business Source|SSPL|Server Side|Commons Clause", re.I
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ASKED = {
    "hedged": PROJECT["dependencies"],
    **{k: v for k, v in PROJECT["optional-dependencies"].items() if k != "dev"},
}


def licence(name: str) -> str:
    """What a package says of its licence: by expression, else by its field and classifiers, else
    by the first line of its file."""
    package = distribution(name)
    told = package.metadata
    if expression := told.get("License-Expression"):
        return str(expression)
    classes = [c for c in told.get_all("Classifier", []) if c.startswith("License ::")]
    # The field may hold the whole text, which names other licences in passing.
    if said := [*(told.get("License") or "").splitlines()[:1], *classes]:
        return " | ".join(said)
    files = (package.read_text(f"licenses/{f}") for f in told.get_all("License-File", []))
    return " | ".join(text.strip().splitlines()[0] for text in files if text)


def everything(asked: list[str]) -> set[str]:
    """The installed packages that requirements lead to."""
    found: set[str] = set()
    todo = [(Requirement(line), "") for line in asked]
    while todo:
        need, extra = todo.pop()
        name = canonicalize_name(need.name)
        if need.marker and not need.marker.evaluate({"extra": extra}):
            continue
        try:
            needs = distribution(name).requires or []
        except PackageNotFoundError:
            continue  # what another platform needs
        if name not in found:
            found.add(name)
            todo += [(Requirement(line), e) for line in needs for e in ("", *need.extras)]
    return found


@pytest.mark.parametrize("part", ASKED)
def test_no_licence_asks_for_what_a_user_may_not_want_to_give(part: str) -> None:
    packages = everything(ASKED[part])
    assert packages >= {canonicalize_name(Requirement(line).name) for line in ASKED[part][:1]}
    told = {name: licence(name) for name in sorted(packages)}
    assert {name: text for name, text in told.items() if REFUSED.search(text)} == {}
    assert [name for name, text in told.items() if not text] == []


def test_a_licence_of_that_family_would_be_seen() -> None:
    assert REFUSED.search("LGPL-3.0-only") and REFUSED.search("BUSL-1.1")
    assert not REFUSED.search("BSD-3-Clause AND BSL-1.0")
