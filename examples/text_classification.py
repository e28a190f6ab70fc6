"""Which language is a sentence in? Sets of languages where a few words fit several.

The texts are the translated messages of Django, Sphinx and django-countries, read from their
packages. A small network, a torch module, sees hashed letter n-grams and knows twelve languages. A
message in twelve languages is twelve rows that are hard or easy together: `split_by` keeps them in
one split, and one row of each counts for what is promised. Strange rows: four other languages.

    python examples/text_classification.py [--out FOLDER]
"""
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import re
from importlib.metadata import files
from pathlib import Path

import numpy as np
import shared
import torch
from safetensors.torch import save_file
from sklearn.feature_extraction.text import HashingVectorizer
from torch import nn

import hedged

ASKED = ("Kunne ikke slette brukeren", "No se puede borrar", "Lösenord")
KNOWN = ["cs", "da", "de", "es", "fr", "it", "nb", "nl", "pl", "pt", "sk", "sv"]
UNKNOWN = {"galician": "gl", "finnish": "fi", "turkish": "tr", "greek": "el"}
PACKAGES = ("Django", "Sphinx", "django-countries")
FILES = [file for name in PACKAGES for file in files(name) or () if file.suffix == ".po"]
MESSAGE = re.compile(r'^msgid "(.+)"\nmsgstr "(.{12,})"$', re.M)
PLACEHOLDER = re.compile(r"%\(\w+\)\w|%\w|\{\w*\}|<[^>]*>")  # the same in all languages
GRAMS = HashingVectorizer(analyzer="char_wb", ngram_range=(1, 3), n_features=1024, dtype=np.float32)


def network() -> nn.Module:
    """The frozen model, untrained."""
    return nn.Sequential(nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, len(KNOWN)))


def sentences(language: str) -> dict[str, str]:
    """English message -> its translation."""
    found: dict[str, str] = {}
    for file in FILES:
        if file.parts[-3] == language:
            found |= dict(MESSAGE.findall(PLACEHOLDER.sub(" ", file.read_text())))
    return {english: text for english, text in found.items() if text != english}


def table(languages: list[str]) -> dict[str, np.ndarray]:
    """The columns message, language and grams."""
    rows = [(m, one, text) for one in languages for m, text in sentences(one).items()]
    message, language, text = map(np.asarray, zip(*rows, strict=True))
    return {"message": message, "language": language, "grams": GRAMS.transform(text).toarray()}


def train(rows: dict[str, np.ndarray]) -> nn.Module:
    """The network, from scratch; in float64, so that it comes out alike on every machine."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    made = network().double()
    optimizer = torch.optim.Adam(made.parameters(), lr=3e-3)
    x = torch.tensor(rows["grams"]).double()
    y = torch.tensor([KNOWN.index(one) for one in rows["language"]])
    for _ in range(20):
        for batch in torch.randperm(len(y)).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(made(x[batch]), y[batch]).backward()
            optimizer.step()
    return made.float()


def main(out: Path) -> None:
    """Make the frozen model, fit error bars for it, and tell what they are worth."""
    rows = table(KNOWN)
    messages = np.random.default_rng(0).permutation(np.unique(rows["message"]))
    parts = np.split(messages, [400, 900])
    sets = {}
    for name, part in zip(("train", "held-out", "fresh"), parts, strict=True):
        kept = np.isin(rows["message"], part)
        sets[name] = {column: values[kept] for column, values in rows.items()}
    sets |= {name: table([language]) for name, language in UNKNOWN.items()}
    for name, columns in sets.items():
        np.savez(out / f"{name}.npz", allow_pickle=False, **columns)
    save_file(train(sets["train"]).state_dict(), out / "network.safetensors")

    hedged.fit(
        f"{Path(__file__).stem}:network",
        out / "held-out.npz",
        out / "bundle",
        task="classification",
        target="language",
        inputs={"input": ["grams"]},
        classes=KNOWN,
        split_by="message",
        name="languages",
        source={"checkpoint": out / "network.safetensors", "cache_dir": out / "cache"},
    )
    tell(out, sets)


def tell(out: Path, sets: dict[str, dict[str, np.ndarray]]) -> None:
    """Print what the error bars are worth on rows that neither they nor the network have seen."""
    strange: dict[str, str | Path] = {name: out / f"{name}.npz" for name in UNKNOWN}
    found = hedged.evaluate(out / "bundle", out / "fresh.npz", ood=strange)
    print(f"{found.n} fresh sentences, 95 % intervals")
    shared.show_systems(found, "accuracy", "nll", "brier")
    shared.show_gain(found, "temperature scaling")
    shared.show_levels(found)
    predictor = hedged.load(out / "bundle")
    for name in ("fresh", *UNKNOWN):
        flags = predictor.run({"input": sets[name]["grams"]}, outputs=["ood"])["ood"]
        print(f"{name}: {flags.mean():.4f} flagged as strange")
    for told in found.ood:
        print(f"{told.out}: AUROC {told.auroc.value:.4f} ({told.score})")
    asked = predictor.run({"input": GRAMS.transform(ASKED).toarray()}, outputs=["set"])["set"]
    for text, members in zip(ASKED, asked, strict=True):
        print(f"{text}: {', '.join(np.asarray(KNOWN)[members])}")


if __name__ == "__main__":
    shared.run(main, __doc__)
