"""Op `boosted_importance` in plain torch, node by node: gradient-boosted trees of depth 3 and what their splits remove.

For factor k with C > 2 classes, raw predictions F (N, C) start at the log of the classes' shares. Each round has a tree
for each class c:

    p = softmax(F),  r = [y = c] - p_c                    # residuals
    the tree: from the root down to depth 3, each node is split where the sum of squared errors falls most:
        centred r, sorted by a latent's code; t = sum of r over the first n of the node's m samples
        gain = t^2 m / (n (m - n))
    F_c += .1 (C - 1) / C mean(r) / mean(p_c (1 - p_c))   # over the samples of a leaf

With two classes there is one tree a round, for class 1 against a raw prediction of 0, and no factor (C - 1) / C. A node
of a variance up to 2^-52 is a leaf. Codes are compared in float32: two that differ by at most 1e-7 are not split. Gains
that agree to 2^-30 are equal. Of equal ones on a latent the first or the last place is taken, of latents any, by hashes
of the seed; all equal latents share in what the split removes, which is the mean over such draws.

This is scikit-learn's GradientBoostingClassifier with its defaults. There trees draw latents in random order and the
first of equal ones wins, or the one that rounding favours.
"""

from __future__ import annotations

import torch
from torch import Tensor

DEPTH = 3
LEARNING_RATE = 0.1
PURE = 2.0**-52
EQUAL = 1e-7
TIE = 2.0**-30
_WORD = (1 << 64) - 1


def forward(
    codes: Tensor, labels: Tensor, classes: list[int], codes_test: Tensor, rounds: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`codes` (N, L) and `codes_test` (T, L) float64, `labels` (N, K) int64 with every one of 0..classes[k]-1 among
    them. Returns what splits on each latent remove of the squared error (L, K), and predicted classes (N, K), (T, K).
    """
    codes, codes_test = codes.float(), codes_test.float()
    order = codes.argsort(dim=0, stable=True)
    reduction = torch.zeros(codes.shape[1], len(classes), dtype=torch.float64, device=codes.device)
    keys = factor_keys(seed, len(classes))
    fitted, predicted = [], []
    for k, count in enumerate(classes):
        label = labels[:, k]
        raw, raw_test = (prior(label, count).repeat(n, 1) for n in (len(codes), len(codes_test)))
        shrink = (count - 1) / count if count > 2 else 1.0
        of_trees = torch.arange(count, device=label.device) if count > 2 else torch.ones(1, device=label.device)
        hot = (label[:, None] == of_trees).double()
        for step in range(rounds):
            residuals = hot - (raw.softmax(1) if count > 2 else raw.sigmoid())
            for tree in range(len(of_trees)):
                key = _mixed(_mixed(int(keys[k]) + tree) + step)
                splits = _grow(codes, order, residuals[:, tree], key, reduction[:, k])
                _add_leaves(splits, codes, codes_test, residuals[:, tree], shrink, raw[:, tree], raw_test[:, tree])
        fitted.append(_decided(raw))
        predicted.append(_decided(raw_test))
    return reduction, torch.stack(fitted, 1), torch.stack(predicted, 1)


def prior(label: Tensor, count: int) -> Tensor:
    """The raw predictions of no trees: (C,), or (1,) of two classes."""
    shares = torch.bincount(label, minlength=count).double() / len(label)
    return shares.log() if count > 2 else (shares[1] / shares[0]).log()[None]


def factor_keys(seed: int, factors: int) -> Tensor:
    """One for each factor, int64 as bits of an unsigned number: where the hashes that break ties start."""
    keys = [_mixed(_mixed(seed & _WORD) + k) for k in range(factors)]
    return torch.tensor([key - (1 << 64) if key >> 63 else key for key in keys], device="cpu")


def _decided(raw: Tensor) -> Tensor:
    return raw.argmax(1) if raw.shape[1] > 1 else (raw[:, 0] >= 0).long()


def _grow(codes: Tensor, order: Tensor, residuals: Tensor, key: int, reduction: Tensor) -> dict[int, tuple[int, float]]:
    """The splits of a tree: node -> latent and threshold. Node n has children 2 n + 1, 2 n + 2. Adds to `reduction`."""
    splits = {}
    latents = codes.shape[1]
    members = {0: torch.ones(len(codes), dtype=torch.bool, device=codes.device)}
    for level in range(DEPTH):
        firsts = [_mixed(key + (2**DEPTH + 2**level * latents + f)) & 1 == 1 for f in range(latents)]
        for node in range(2**level - 1, 2 ** (level + 1) - 1):
            mine = members.get(node)
            found = None if mine is None else _split(codes, order, residuals, mine, firsts, _mixed(key + node))
            if mine is None or found is None:
                continue
            latent, threshold, shares = found
            splits[node] = latent, threshold
            reduction += shares
            right = codes[:, latent].double() > threshold
            members[2 * node + 1], members[2 * node + 2] = mine & ~right, mine & right
    return splits


def _split(
    codes: Tensor, order: Tensor, residuals: Tensor, mine: Tensor, firsts: list[bool], key: int
) -> tuple[int, float, Tensor] | None:
    """Latent and threshold of a node's best split, and what it removes by latent (L,); None for a leaf."""
    size = int(mine.sum())
    centred = residuals - residuals[mine].mean()
    if float(centred[mine].square().sum()) <= PURE * size:
        return None
    gains, thresholds = [], []
    for latent in range(codes.shape[1]):
        rows = order[mine[order[:, latent]], latent]
        sorted_codes = codes[rows, latent]
        left = torch.arange(1, size, dtype=torch.float64, device=codes.device)
        gain = centred[rows].cumsum(0)[:-1].square() / (left * (size - left))
        gain = torch.where(sorted_codes[1:] > sorted_codes[:-1] + EQUAL, gain, -torch.inf)
        # the best place is the last of those where a gain is more than all before, which a later equal one is or is not
        lift = 1 + TIE if firsts[latent] else 1 - TIE
        before = torch.cat([gain.new_tensor([-1.0]), (gain.cummax(0).values[:-1] * lift).clamp(min=-1)])
        better = (gain > before).nonzero()
        at = int(better[-1]) if len(better) else 0
        gains.append(float(gain.max()) if len(better) else -1.0)
        thresholds.append(float(sorted_codes[at].double() / 2 + sorted_codes[at + 1].double() / 2))
    best = max(gains)
    if best < 0:
        return None
    tied = [latent for latent, gain in enumerate(gains) if gain >= best * (1 - TIE)]
    latent = max(tied, key=lambda latent: _mixed(key + latent))
    shares = torch.zeros(codes.shape[1], dtype=torch.float64, device=codes.device)
    shares[tied] = best * size / len(tied)
    return latent, thresholds[latent], shares


def _add_leaves(
    splits: dict[int, tuple[int, float]],
    codes: Tensor,
    codes_test: Tensor,
    residuals: Tensor,
    shrink: float,
    raw: Tensor,
    raw_test: Tensor,
) -> None:
    leaf, leaf_test = _leaves(splits, codes), _leaves(splits, codes_test)
    for node in leaf.unique().tolist():
        mine = residuals[leaf == node]
        # with p the probability, p (1 - p) = |y - p| (1 - |y - p|)
        curvature = float((mine.abs() * (1 - mine.abs())).mean())
        step = 0.0 if curvature < 1e-150 else LEARNING_RATE * shrink * float(mine.mean()) / curvature
        raw[leaf == node] += step
        raw_test[leaf_test == node] += step


def _leaves(splits: dict[int, tuple[int, float]], codes: Tensor) -> Tensor:
    """The node in which each sample ends."""
    node = torch.zeros(len(codes), dtype=torch.int64, device=codes.device)
    for parent in sorted(splits):
        latent, threshold = splits[parent]
        right = codes[:, latent].double() > threshold
        node = torch.where(node == parent, torch.where(right, 2 * parent + 2, 2 * parent + 1), node)
    return node


def _mixed(z: int) -> int:
    """SplitMix64's output function of z plus its increment, all modulo 2^64 (Steele, Lea and Flood 2014)."""
    z = (z + 0x9E3779B97F4A7C15) & _WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
    return z ^ (z >> 31)
