"""A bundle in words: what it serves, what it promises and how it did on its test rows."""

from __future__ import annotations

from rich.table import Table

from calibration.bundle import Bundle, Guarantee, Manifest, OodRecord
from hedged.commands import console
from posthoc import registry
from posthoc.slices import most_rows

_MANY_ROWS = 256  # of a run, by default: what allows as many need not be told


def describe(bundle: Bundle) -> None:
    """Print a bundle for a person."""
    m = bundle.manifest
    say = console.out.print
    say(f"[bold]{m.name}[/] version {m.version} · {m.task} · {bundle.path}")
    say(f"identity {bundle.identity}")
    say(f"frozen model {m.frozen.file} sha256 {m.frozen.sha256[:16]}… ({m.frozen.size:,} bytes)")
    made = m.module.settings.get("copies", m.module.settings.get("samples"))
    if m.module.name == "weights":
        say(f"beside it {made} copies with sampled weights")
    elif m.module.name != "none" and "network" in registry.info(m.module.name).needs:
        copies = "a network over its output" if made is None else f"{made} noisy copies"
        say(f"beside it {copies}, in one graph")
    else:
        head = m.frozen.head or "none found: a black box, outputs only"
        width = f", {m.frozen.features} features" if m.frozen.features else ""
        say(f"linear head: {head}{width}")
    rows = ", ".join(f"{k} {v:,}" for k, v in m.splits.rows.items())
    if m.dense is None:
        say(f"rows: {rows}")
    else:
        say(f"images: {rows}, {m.dense.pixels} pixels of each")
    if bad := m.data.get("bad_rows"):
        say(f"[yellow]{bad:,} of {m.data['rows']:,} are left out: see the notes below[/]")
    if m.splits.items is not None and m.splits.by is not None:
        items = ", ".join(f"{k} {v:,}" for k, v in m.splits.items.items())
        say(f"items, by {m.splits.by}: {items}")
    if m.memory is not None and (most := most_rows(m.memory.row_bytes)) < _MANY_ROWS:
        held = m.memory.row_bytes / 1e6
        say(f"memory: a row takes about {held:,.0f} MB inside; a run has at most {most} of them")
    scaling = ", ".join(f"{k} {v:.4g}" for k, v in m.scaling.items())
    prior = m.module.settings.get("prior_precision")
    say(f"module {m.module.name}" + (f", prior precision {prior:.4g}" if prior else ""))
    if m.prediction == "module":
        say("the answer is the module's, not the frozen model's")
    if m.module.name != "none" and m.task == "classification":
        say(f"logits to probabilities: {m.predictive}")
    say(f"scaling: {scaling}")
    if m.family is not None:
        tried = (f"{k} {v:+.4f} (at least {low:+.4f})" for k, (v, low) in m.family.gains.items())
        gains = (
            f"; gains over the temperature in nats: {', '.join(tried)}" if m.family.gains else ""
        )
        say(f"then: {m.family.name}{gains}")
    if m.confidence != "probs":
        say(f"confidence: {m.confidence} over whether the label is right")
    _promises(bundle)
    _measured(bundle)


def _promises(bundle: Bundle) -> None:
    m = bundle.manifest
    table = Table(title="Promises, each by itself", title_justify="left")
    unit = "rows" if m.dense is None else "images"
    for column in ("what", "level", unit, "needs", "threshold"):
        table.add_column(column)
    for g in m.conformal.guarantees:
        q = "everything" if g.threshold is None else f"{g.threshold:.5g}"
        what, level = f"{m.conformal.method}: covers the truth", f"≥ {1 - g.alpha:.3g}"
        if g.kind == "risk":
            what, level = f"{m.conformal.method}: share of an image not covered", f"≤ {g.alpha:g}"
        elif g.kind == "missed":
            named = m.conformal.settings["mask"]
            named = m.classes[named] if m.classes else f"class {named}"
            what, level = f"mask of {named}: share of it missed", f"≤ {g.alpha:g}"
        if m.conformal.shift is not None:
            worth = m.conformal.weights["effective_rows"]
            what = f"{m.conformal.method}: covers the truth in production, if the weights are right"
            q = f"by weights; {g.n} rows are worth {worth:.0f}"
        if g.cells:
            what = f"{m.conformal.method}: covers the truth of any row"
        table.add_row(what, level, str(g.n), str(g.n_needed), q)
        if g.cells:
            _own_cells(table, m, g)
    if m.ood is not None:
        o = m.ood
        q = "nothing flagged" if o.threshold is None else f"{o.threshold:.5g}"
        what = f"{o.score.name}: flags clean rows"
        table.add_row(what, f"≤ {o.alpha:g}, {1 - o.delta:.3g} sure", str(o.n), str(o.n_needed), q)
    if m.abstain is not None:
        a = m.abstain
        q = "abstains on all" if a.threshold is None else f"{a.threshold:.5g}"
        q = "answers all" if a.answered == 1.0 else q
        what = f"wrong among the {a.answered:.1%} answered"
        level = f"≤ {a.max_error:g}, {1 - a.delta:.3g} sure"
        table.add_row(what, level, str(a.n), str(a.n_needed), q)
    console.out.print(table)
    for g in m.conformal.guarantees:
        if line := _law(g):
            console.out.print(f"  {line}", style="dim")
    if m.ood is not None and m.ood.tried:
        console.out.print(f"  {_tried(m.ood)}", style="dim")
    for note in m.notes:
        console.out.print(f"  {note}", style="dim")


def _tried(o: OodRecord) -> str:
    """How the score was chosen."""
    means = {s: sum(told.values()) / len(told) for s, told in o.tried.items()}
    others = [v for s, v in means.items() if s != o.score.name]
    kinds = ", ".join(o.tried[o.score.name])
    beside = f"; the others {min(others):.3f} to {max(others):.3f}" if others else ""
    return f"{o.score.name}: AUROC {means[o.score.name]:.3f} on {kinds}{beside}"


def _law(g: Guarantee) -> str:
    """The exact level, and what luck of the calibration rows leaves of it; empty for others."""
    if g.law is None or g.cells:
        return ""
    from scipy.stats import beta

    low, high = beta(*g.law).ppf([0.005, 0.995])
    return (
        f"{1 - g.alpha:.3g}: {g.exact:.4f} over all calibrations, this one's between {low:.3f} and "
        f"{high:.3f} (99 %, Beta{g.law}); with ties more"
    )


def _own_cells(table: Table, m: Manifest, g: Guarantee) -> None:
    """A line for the thresholds of classes, clusters or groups: how many rows they have."""
    counts = [c.n for c in g.cells]
    short = sum(c.threshold is None for c in g.cells)
    q = f"{len(counts) - short} of their own"
    if short:
        q += f", {short} have too few rows: everything"
    what = f"… of each {m.conformal.given} ({len(counts)})"
    rows = f"{min(counts)} to {max(counts)}"
    table.add_row(what, f"≥ {1 - g.alpha:.3g}", rows, str(g.n_needed), q)


def _measured(bundle: Bundle) -> None:
    evaluation = bundle.manifest.evaluation
    if not evaluation:
        return
    unit = "rows" if bundle.manifest.dense is None else "images"
    console.out.print(f"On its {evaluation['rows']:,} test {unit}:")
    for who in ("frozen", "hedged"):
        if who in evaluation:
            figures = "  ".join(f"{k} {v:.4f}" for k, v in evaluation[who].items())
            console.out.print(f"  {who:<8}{figures}")
    for level, found in evaluation.get("levels", {}).items():
        figures = "  ".join(f"{k} {v:.4g}" for k, v in found.items())
        console.out.print(f"  level {level}: {figures}")
