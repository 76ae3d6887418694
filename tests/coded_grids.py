"""Codes of whole factor grids with known disentanglement, and the bad input that every labelled metric is given."""

import numpy as np


def grid(*sizes):
    """All combinations of factors, (prod sizes, K)."""
    return np.stack([axis.ravel() for axis in np.meshgrid(*map(np.arange, sizes), indexing="ij")], 1)


SIZES = (3, 4, 5)
FACTORS = grid(*SIZES)


def perfect():
    """One latent for each factor, in another order, sign and scale."""
    return FACTORS[:, [2, 0, 1]] * [1.0, -3.0, 0.5] + [0.0, 7.0, -1.0]


def rotated(seed=4):
    """Standardised factors under a random rotation: every latent answers to every factor."""
    z = perfect()
    z = (z - z.mean(0)) / z.std(0)
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return z @ q


def noisy(n=600, seed=0, latents=5):
    """Samples, not a grid: codes that tell something of the factors and of each other."""
    rng = np.random.default_rng(seed)
    factors = np.stack([rng.integers(0, size, n) for size in (3, 7, 2)], 1)
    codes = rng.normal(size=(n, latents))
    codes[:, :3] += factors[:, [0, 1, 1]] * [1.0, 0.7, 0.3]
    codes[:, -1] += codes[:, 0]
    return codes, factors
