"""Imports go down only: hedged → service → calibration → posthoc, and what serves stays light.

Run as a script by `make lint`. It reads every import statement, those inside functions too.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

FLOORS = {"posthoc": 0, "calibration": 1, "service": 2, "hedged": 3}
NOWHERE = {"pickle", "cloudpickle", "dill", "joblib"}
# torch may be imported where a torch model is exported, and nowhere else; Ray in scoring only.
ONLY_IN = {
    "torch": (
        "posthoc/export.py",
        "posthoc/model/torch_models.py",
        "posthoc/laplace_torch.py",
        "posthoc/methods/bayescap/image.py",
        "posthoc/methods/bayescap/network.py",
        "posthoc/methods/laplace/importing.py",
        "posthoc/methods/network/abnn_training.py",
        "posthoc/methods/network/mc_batch_norm.py",
        "posthoc/network/autograd/",
        "posthoc/network/keep.py",
    ),
    "ray": ("service/scoring/",),
}
ROOT = Path(__file__).resolve().parent.parent


def imports(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, module) of every absolute import."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, a.name) for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.append((node.lineno, node.module))
    return found


def faults(path: Path) -> list[str]:
    """What one file imports and should not."""
    name = path.relative_to(ROOT).as_posix()
    floor = FLOORS[path.relative_to(ROOT).parts[0]]
    out = []
    for line, module in imports(ast.parse(path.read_text())):
        top = module.partition(".")[0]
        if FLOORS.get(top, -1) > floor:
            out.append(f"{name}:{line} imports {module}: imports go down only")
        if top in NOWHERE:
            out.append(f"{name}:{line} imports {module}: nothing here unpickles")
        if top in ONLY_IN and not name.startswith(ONLY_IN[top]):
            out.append(f"{name}:{line} imports {module}: it belongs in {ONLY_IN[top][0]}")
    return out


def main() -> int:
    """Print every fault; 1 when there is one."""
    found = [f for d in FLOORS for p in sorted((ROOT / d).rglob("*.py")) for f in faults(p)]
    print("\n".join(found) or "imports: all go down")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
