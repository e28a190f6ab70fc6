"""Torch modules for tests, found as ``tests.posthoc.torch_nets:NAME``."""

import torch

not_a_factory = 7
called = []  # what a hostile file writes to


def boom():
    called.append("boom")


class Table(torch.nn.Module):
    """Four numbers a row to three logits; ``scale`` is an optional input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Dropout(0.5)
        )
        self.head = torch.nn.Linear(8, 3)

    def forward(self, x, scale=None):
        logits = self.head(self.body(x))
        return logits if scale is None else logits * scale


class Doubles(Table):
    def __init__(self):
        super().__init__()
        self.double()


class Tied(torch.nn.Module):
    """Two names for one matrix."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first = torch.nn.Linear(4, 4, bias=False)
        self.second = torch.nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.head = torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


class Language(torch.nn.Module):
    """A small transformer that scores every token and returns the scores of the last one, as
    decoder models for classification do; all inputs have defaults, outputs have names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(30, 16)
        self.qkv = torch.nn.Linear(16, 48)
        self.norm = torch.nn.LayerNorm(16)
        self.score = torch.nn.Linear(16, 3, bias=False)

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        h = self.embed(input_ids)
        n, t, width = h.shape
        q, k, v = (p.reshape(n, t, 2, 8).transpose(1, 2) for p in self.qkv(h).chunk(3, -1))
        seen = attention_mask[:, None, None, :].bool()
        a = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        h = self.norm(h + a.transpose(1, 2).reshape(n, t, width))
        last = (attention_mask.sum(1) - 1).clamp(min=0)
        logits = self.score(h)[torch.arange(n, device=h.device), last]
        return {"logits": logits, "hidden": h.mean(1), "loss": None}


class Image(torch.nn.Module):
    """A convolution, a pool, a 1×1 convolution as the head, probabilities."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Conv2d(1, 6, 3)
        self.head = torch.nn.Conv2d(6, 3, 1)

    def forward(self, image):
        pooled = torch.nn.functional.adaptive_avg_pool2d(torch.relu(self.body(image)), 1)
        return torch.softmax(self.head(pooled).flatten(1), 1)


class Pairs(torch.nn.Module):
    """Two tables of embeddings, one regression value."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.users, self.items = torch.nn.Embedding(20, 4), torch.nn.Embedding(10, 4)
        self.head = torch.nn.Linear(8, 1)

    def forward(self, user, *, item):
        return self.head(torch.cat([self.users(user), self.items(item)], 1)).squeeze(1)


class Unsupported(torch.nn.Module):
    def forward(self, x):
        return torch.linalg.cholesky(x[:, :1, None] ** 2 + torch.eye(3))[:, 0]


class Nameless(torch.nn.Module):
    def forward(self, *xs):
        return xs[0]


def needs_an_argument(size):
    return Table()


def fails():
    raise FileNotFoundError("no such config")


def gives_a_function():
    return lambda x: x


module = Table()
