"""Where noise ends among the singular values of a matrix, by the law of Marchenko and Pastur.

A random matrix of m rows and n >= m columns, whose entries are independent with the standard
deviation s, has its singular values between s (sqrt(n) - sqrt(m)) and s (sqrt(n) + sqrt(m)).
"""

import functools

import numpy as np

_ANGLES = 4096


@functools.lru_cache(maxsize=1024)
def _median_of_noise(ratio: float) -> float:
    """Returns the median of the singular values of noise with s sqrt(n) = 1.

    Args:
      ratio: m / n.
    """
    # The eigenvalues are 1 + ratio - 2 sqrt(ratio) cos(angle). In the angle the density has no
    # root at its ends. For a square matrix it is 0 / 0 at the first one, and 1 + cos in the limit.
    angles = np.linspace(0, np.pi, _ANGLES)
    eigenvalues = np.maximum(1 + ratio - 2 * np.sqrt(ratio) * np.cos(angles), 0)
    is_square = ratio == 1
    density = 1 + np.cos(angles) if is_square else np.sin(angles) ** 2 / eigenvalues
    steps = density[1:] + density[:-1]
    shares = np.concatenate([[0], np.cumsum(steps) / np.sum(steps)])
    return float(np.interp(0.5, shares, np.sqrt(eigenvalues)))


# The largest eigenvalue of noise is above the edge of the law in one of six matrices. It is below
# its centre plus so many of its deviations in 99 of 100 (Tracy-Widom law of order 1).
_TRACY_WIDOM_99 = 2.0234


def noise_edge(values: np.ndarray, shape: tuple[int, int]) -> float:
    """Returns the largest singular value that noise alone would give.

    The deviation of the noise is estimated from the median of all singular values, which a signal
    of low rank hardly moves.

    From Gavish and Donoho, `The Optimal Hard Threshold for Singular Values is 4/sqrt(3)
    <https://arxiv.org/abs/1305.5870>`_, 2014 (the median), and Johnstone, `On the Distribution of
    the Largest Eigenvalue in Principal Components Analysis
    <https://doi.org/10.1214/aos/1009210544>`_, 2001 (the edge of a matrix of finite size).

    Args:
      values: The singular values.
      shape: The shape of the matrix.
    """
    few, many = sorted(shape)
    deviation = np.median(values) / _median_of_noise(few / many) / np.sqrt(many)
    roots = np.sqrt(many), np.sqrt(few)
    spread = sum(roots) * (1 / roots[0] + 1 / roots[1]) ** (1 / 3)
    return float(deviation * np.sqrt(sum(roots) ** 2 + _TRACY_WIDOM_99 * spread))
