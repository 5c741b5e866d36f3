"""The Frechet distance between two Gaussians, and what it is between two sets of features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Gaussian:
    """mean: (D,), covariance: (D, D), float64.  count: samples they were estimated from."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int

    @classmethod
    def of(cls, features: np.ndarray) -> Gaussian:
        """Of features (n, D), with n - 1 in the covariance. ValueError for fewer than two, or for NaN and infinity."""
        features = np.asarray(features, dtype=np.float64)
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(
                f"features are {features.shape}: expected (videos, features) of at least 2 videos"
            )
        bad = int((~np.isfinite(features)).any(axis=1).sum())
        if bad:
            raise ValueError(f"the features of {bad} of {len(features)} videos are NaN or infinite")
        mean = features.mean(axis=0)
        centred = features - mean
        return cls(mean, centred.T @ centred / (len(features) - 1), len(features))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2))  (Dowson & Landau 1982; Heusel et al. 2017; Unterthiner et al. 2018).

    The squared Wasserstein-2 distance, so not below 0, in the squared unit of the features. With roots A = R^T R and
    B = S^T S from the eigenvalues of each, tr (A B)^(1/2) is the sum of the singular values of R S^T, the square roots
    of the eigenvalues of the symmetric R B R^T. No root of a non-symmetric product is taken, and no eigenvalue that
    should be 0: fewer samples than features, whose covariances are singular, are no special case.

    From samples it is biased upwards (``bias_of_unit_gaussians``), so only distances from the same numbers of samples
    can be compared.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"{len(a.mean)} and {len(b.mean)} features: expected those of one network")
    difference = a.mean - b.mean
    cross = np.linalg.svd(_root(a.covariance) @ _root(b.covariance).T, compute_uv=False).sum()
    distance = difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return max(float(distance), 0.0)  # equal sets: rounding leaves some 1e-14 of the traces, of either sign


def bias_of_unit_gaussians(features: int, count_a: int, count_b: int) -> float:
    """What ``frechet_distance`` gives on average for two samples of one N(0, I), to first order in 1 / count.

    The means differ by D (1 / n + 1 / m). Near the identity the other term is |A - B|^2 / 4 (Frobenius), and each
    sample covariance is off by (D^2 + D) / n in that norm squared: (D^2 + D) (1 / n + 1 / m) / 4 in all. Good for
    counts well above D. Real features have no unit variance and lie near fewer dimensions: the scale of the effect, no
    correction.
    """
    d, inverse = features, 1 / count_a + 1 / count_b
    return (d + (d * d + d) / 4) * inverse


def _root(covariance: np.ndarray) -> np.ndarray:
    """R (rank, D) with R^T R = covariance. Eigenvalues within rounding of 0 are left out."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
    return np.sqrt(values[kept])[:, None] * vectors[:, kept].T
