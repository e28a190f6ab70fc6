"""Trains the members of ABNN: the scales and shifts of normalisations, by gradients through the
frozen graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from posthoc.contract import Array, FitError
from posthoc.frozen import Frozen
from posthoc.methods.network import abnn
from posthoc.network.attach import NetworkRows, channel_axis
from posthoc.network.autograd import Network
from posthoc.network.sites import Site

FEWEST = 50  # module rows
MOMENTUM = 0.9
IGNORED = -1
Member = list[tuple[Array, Array]]  # (d, δ) of every site, C each


def train(
    frozen: Frozen, sites: list[Site], rows: NetworkRows, settings: abnn.Settings
) -> tuple[list[Member], dict[str, Any]]:
    """The members that the guard keeps, and what is to be said of them.

    Raises FitError for fewer than 50 rows and where no member is kept.
    """
    if rows.y is not None:  # of images: those with a labelled pixel
        rows = rows.take(np.asarray((rows.y.reshape(len(rows), -1) >= 0).any(1)))
    if rows.y is None or len(rows) < FEWEST:
        known = 0 if rows.y is None else len(rows)
        raise FitError(f"abnn needs at least {FEWEST} labelled module rows and has {known}")
    axis = channel_axis(frozen)
    network = Network(frozen.model, [frozen.z])
    index = np.arange(len(rows))
    judges = rows.take(index % abnn.HELD_OUT == abnn.HELD_OUT - 1)
    learners = rows.take(index % abnn.HELD_OUT != abnn.HELD_OUT - 1)
    run = _Run(network, frozen.z, axis, frozen.z_dim == 1, sites, settings)
    before = run.judged(judges, None)
    kept: list[Member] = []
    rejected, epochs, bounds = 0, [], []
    for m in range(settings.members):
        rng = np.random.default_rng([settings.seed, 1, m])
        found, steps = _member(run, learners, judges, rng, settings)
        bound, worse = abnn.guard(before[1], run.judged(judges, found, m)[1])
        bounds.append(round(bound, 5))
        epochs.append(steps)
        if worse:
            rejected += 1
        else:
            kept.append([(d.numpy(), s.numpy()) for d, s in found])
    if not kept:
        raise FitError(
            f"abnn: all {settings.members} members lose more than half a point of accuracy on "
            f"{len(judges)} held-out rows; take a smaller alpha, learning_rate or prior"
        )
    said: dict[str, Any] = {
        "kept": len(kept),
        "rejected": rejected,
        "epochs_taken": epochs,
        "accuracy_loss_bound": bounds,
        "judges": len(judges),
    }
    if len(judges) < abnn.ENOUGH:
        said["guard"] = f"too few rows to be sure of half a point; it takes {abnn.ENOUGH:,}"
    return kept, said


class _Run:
    """The frozen graph with the members' parameters and noise at its sites."""

    def __init__(
        self,
        network: Network,
        z: str,
        axis: int,
        single: bool,
        sites: list[Site],
        settings: abnn.Settings,
    ):
        self.network, self.z, self.axis, self.single = network, z, axis, single
        self.sites, self.settings = sites, settings

    def logits(
        self,
        rows: NetworkRows,
        member: list[tuple[Tensor, Tensor]] | None,
        noise: torch.Generator | None,
    ) -> Tensor:
        """N×C, or (N·P)×C of maps, of a member (None: the frozen network)."""
        hooks = {}
        for site, pair in zip(self.sites, member or (), strict=False):
            hooks[site.tensor] = self._hook(site, *pair, noise)
        feed = {k: torch.as_tensor(rows.inputs[k]) for k in self.network.inputs}
        z = self.network(feed, hooks)[self.z].to(torch.float32)
        z = z.movedim(self.axis, -1).reshape(-1, z.shape[self.axis])
        return torch.cat([torch.zeros_like(z), z], 1) if self.single else z

    def _hook(self, site: Site, scale: Tensor, shift: Tensor, noise: torch.Generator | None) -> Any:
        rank = len(site.shape) + 1
        at = [1] * rank
        at[site.axis] = -1
        assert site.beta is not None
        beta = torch.as_tensor(site.beta, dtype=torch.float32).reshape(at)

        def apply(h: Tensor) -> Tensor:
            g = 1.0 + scale.reshape(at)
            if noise is not None and self.settings.alpha:
                shape = list(h.shape)
                if self.settings.noise == "channel":
                    shape = [
                        n if a in (site.axis, site.batch) else 1 for a, n in enumerate(h.shape)
                    ]
                eps = torch.randn(shape, generator=noise)
                g = g * (1.0 + self.settings.alpha * eps)
            return (h * g + beta * (1.0 - g) + shift.reshape(at)).to(h.dtype)

        return apply

    def judged(
        self,
        rows: NetworkRows,
        member: list[tuple[Tensor, Tensor]] | None,
        seed: int = 0,
        weights: Tensor | None = None,
    ) -> tuple[float, Array]:
        """Mean log loss (with classes weighted), and which rows are right (of images: their share
        of labelled pixels), of the mean over as many noisy passes as are served."""
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000 + seed)
        noisy = member is not None and self.settings.alpha > 0
        passes = self.settings.samples if noisy else 1
        losses, right = [], []
        with torch.no_grad():
            for i in range(0, len(rows), self.settings.batch):
                part = rows.take(slice(i, i + self.settings.batch))
                noise = generator if noisy else None
                p = sum(self.logits(part, member, noise).softmax(1) for _ in range(passes)) / passes
                y = torch.as_tensor(np.asarray(part.y, np.int64)).reshape(-1)
                assert isinstance(p, Tensor)
                known = y >= 0
                own = p.gather(1, y.clamp(min=0)[:, None])[:, 0].clamp(min=1e-12)
                loss = -own.log() if weights is None else -own.log() * weights[y.clamp(min=0)]
                losses.append(loss[known].numpy())
                hit = ((p.argmax(1) == y) & known).reshape(len(part), -1).sum(1)
                total = known.reshape(len(part), -1).sum(1).clamp(min=1)
                right.append((hit / total).numpy())
        return float(np.concatenate(losses).mean()), np.concatenate(right)


def _member(
    run: _Run,
    learners: NetworkRows,
    judges: NetworkRows,
    rng: np.random.Generator,
    settings: abnn.Settings,
) -> tuple[list[tuple[Tensor, Tensor]], int]:
    """One member's (d, δ) at its best epoch, and which that was (0: as it began)."""
    pairs = [
        (torch.zeros(s.channels, requires_grad=True), torch.zeros(s.channels, requires_grad=True))
        for s in run.sites
    ]
    classes = 2 if run.single else _classes(run, learners)
    weights = torch.as_tensor(abnn.class_weights(rng, classes, settings.prior))
    noise = torch.Generator().manual_seed(int(rng.integers(2**62)))
    optimiser = torch.optim.SGD(
        [p for pair in pairs for p in pair],
        lr=settings.learning_rate,
        momentum=MOMENTUM,
        weight_decay=settings.weight_decay,
        nesterov=True,
    )

    def copied() -> list[tuple[Tensor, Tensor]]:
        return [(d.detach().clone(), s.detach().clone()) for d, s in pairs]

    # By its own objective: by the plain loss every member would stay where they all began.
    best, least, at = copied(), run.judged(judges, copied(), 0, weights)[0], 0
    for epoch in range(1, settings.epochs + 1):
        order = rng.permutation(len(learners))
        for i in range(0, len(order), settings.batch):
            part = learners.take(order[i : i + settings.batch])
            y = torch.as_tensor(np.asarray(part.y, np.int64)).reshape(-1)
            y = torch.where(y >= 0, y, IGNORED)
            if not bool((y >= 0).any()):
                continue
            optimiser.zero_grad()
            z = run.logits(part, pairs, noise)
            torch.nn.functional.cross_entropy(z, y, weights, ignore_index=IGNORED).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        loss = run.judged(judges, copied(), 0, weights)[0]
        if not np.isfinite(loss):
            break
        if loss < least:
            best, least, at = copied(), loss, epoch
    return best, at


def _classes(run: _Run, rows: NetworkRows) -> int:
    with torch.no_grad():
        return int(run.logits(rows.take(slice(0, 2)), None, None).shape[1])
