"""The text encoder against its definition, on a small checkpoint with BERT's names."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from bench import minilm

WIDTH, HEADS, HIDDEN, LAYERS, WORDS, POSITIONS = 12, 3, 20, 2, 30, 9


def _checkpoint() -> dict[str, torch.Tensor]:
    torch_rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch_rng)

    given = {
        "embeddings.word_embeddings.weight": draw(WORDS, WIDTH),
        "embeddings.position_embeddings.weight": draw(POSITIONS, WIDTH),
        "embeddings.token_type_embeddings.weight": draw(2, WIDTH),
        "embeddings.LayerNorm.weight": draw(WIDTH),
        "embeddings.LayerNorm.bias": draw(WIDTH),
    }
    for i in range(LAYERS):
        shapes = {
            **{f"attention.self.{n}": (WIDTH, WIDTH) for n in ("query", "key", "value")},
            "attention.output.dense": (WIDTH, WIDTH),
            "intermediate.dense": (HIDDEN, WIDTH),
            "output.dense": (WIDTH, HIDDEN),
            "attention.output.LayerNorm": (WIDTH,),
            "output.LayerNorm": (WIDTH,),
        }
        for name, shape in shapes.items():
            given[f"encoder.layer.{i}.{name}.weight"] = draw(*shape) / 2
            given[f"encoder.layer.{i}.{name}.bias"] = draw(shape[0]) / 2
    return given


def _slow(given: dict[str, torch.Tensor], ids: list[int]) -> np.ndarray:
    """One document, piece by piece and head by head, in float64 (Devlin et al. 2019)."""
    w = {k: v.numpy().astype(np.float64) for k, v in given.items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        scaled = (x - x.mean()) / math.sqrt(x.var() + 1e-12)
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    words, positions, kinds = (
        w[f"embeddings.{n}_embeddings.weight"] for n in ("word", "position", "token_type")
    )
    x = [
        norm(words[t] + positions[i] + kinds[0], "embeddings.LayerNorm") for i, t in enumerate(ids)
    ]
    part = WIDTH // HEADS
    for layer in range(LAYERS):
        at = f"encoder.layer.{layer}"
        q, k, v = (
            [linear(p, f"{at}.attention.self.{n}") for p in x] for n in ("query", "key", "value")
        )
        mixed = []
        for i in range(len(x)):
            pieces = []
            for h in range(HEADS):
                s = slice(h * part, (h + 1) * part)
                score = np.array([q[i][s] @ k[j][s] / math.sqrt(part) for j in range(len(x))])
                weight = np.exp(score - score.max())
                weight /= weight.sum()
                pieces.append(sum(weight[j] * v[j][s] for j in range(len(x))))
            mixed.append(linear(np.concatenate(pieces), f"{at}.attention.output.dense"))
        x = [norm(a + b, f"{at}.attention.output.LayerNorm") for a, b in zip(x, mixed, strict=True)]
        erf = np.vectorize(math.erf)
        for i, p in enumerate(x):
            h = linear(p, f"{at}.intermediate.dense")
            h = 0.5 * h * (1 + erf(h / math.sqrt(2)))
            x[i] = norm(p + linear(h, f"{at}.output.dense"), f"{at}.output.LayerNorm")
    mean = np.mean(x, axis=0)
    return np.asarray(mean / np.linalg.norm(mean))


def test_the_encoder_is_bert_with_a_mean_of_length_one(tmp_path: Path) -> None:
    given = _checkpoint()
    save_file(given, tmp_path / "model.safetensors")
    documents = [[2, 5, 7, 9, 3], [2, 11, 3], [2, 4, 4, 29, 28, 1, 3]]
    ids = torch.zeros(3, POSITIONS, dtype=torch.long)
    for row, document in zip(ids, documents, strict=True):
        row[: len(document)] = torch.tensor(document)
    got = minilm.load(tmp_path / "model.safetensors", HEADS)(ids).numpy()
    for vector, document in zip(got, documents, strict=True):
        assert np.abs(vector - _slow(given, document)).max() < 1e-5


def test_word_pieces_are_the_longest_from_the_left(tmp_path: Path) -> None:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##aff", "##able", "##a", "the", ",", "una"]
    (tmp_path / "vocab.txt").write_text("\n".join(names) + "\n")
    pieces = minilm.vocabulary(tmp_path / "vocab.txt")
    assert len(pieces) == len(names)

    def named(text: str) -> list[str]:
        return [names[i] for i in minilm.tokenise(text, pieces)]

    assert named("") == ["[CLS]", "[SEP]"]
    assert named("The unaffable") == ["[CLS]", "the", "[UNK]", "[SEP]"]  # "una", then no "##ff"
    assert named("unable, the") == ["[CLS]", "[UNK]", ",", "the", "[SEP]"]
    assert named("unaaff") == ["[CLS]", "una", "##aff", "[SEP]"]
    assert named("q" * 200 + " the") == ["[CLS]", "[UNK]", "the", "[SEP]"]
    long = minilm.tokenise("the " * 500, pieces)
    assert len(long) == minilm.MAX_PIECES
    assert [names[i] for i in (long[0], long[-1])] == ["[CLS]", "[SEP]"]
