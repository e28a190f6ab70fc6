"""What the images are made of, told and checked from their lock files:

    python deploy/supply.py sbom     a CycloneDX bill of materials of each, into build/sbom
    python deploy/supply.py audit    known vulnerabilities of what is locked, asked of PyPI

`audit` fails for a package that has one, and for a package that nothing is known of. What follows
the word goes to the tool, CycloneDX's or pip-audit: `audit --ignore-vuln ID`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = tuple(ROOT / "deploy" / "locks" / f"serve-{target}.txt" for target in ("cpu", "cuda"))


def sbom_command(lock: Path, out: Path, options: Sequence[str] = ()) -> list[str]:
    """The command that writes the bill of materials of one lock file."""
    return [
        sys.executable, "-m", "cyclonedx_py", "requirements", str(lock),
        "--pyproject", str(ROOT / "pyproject.toml"),
        "--spec-version", "1.6", "--output-format", "JSON", "--output-reproducible",
        "--output-file", str(out), *options,
    ]  # fmt: skip


def audit_command(options: Sequence[str], locks: Sequence[Path] = LOCKS) -> list[str]:
    """The command that looks every locked package up. Without --strict pip-audit passes where the
    service knows nothing of a package, as it does where the service is a mirror without them."""
    files = [word for lock in locks for word in ("--requirement", str(lock))]
    return [
        sys.executable, "-m", "pip_audit", "--strict", "--require-hashes", "--disable-pip",
        "--progress-spinner", "off", *files, *options,
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; the exit code of the tool."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --output is the tools' own
    )
    parser.add_argument("what", choices=("sbom", "audit"))
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "sbom", help="folder of sbom")
    options, others = parser.parse_known_args(arguments)
    if options.what == "audit":
        return subprocess.run(audit_command(others)).returncode
    options.out.mkdir(parents=True, exist_ok=True)
    for lock in LOCKS:
        out = options.out / f"{lock.stem}.cdx.json"
        # It warns that a requirements file has no graph of dependencies, which is known.
        done = subprocess.run(sbom_command(lock, out, others), stderr=subprocess.PIPE, text=True)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return done.returncode
        print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
