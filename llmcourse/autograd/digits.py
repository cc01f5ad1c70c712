"""1,797 handwritten digits of 8 × 8 pixels, bundled with scikit-learn (no download).

They are the test part of the "Optical Recognition of Handwritten Digits" set by E. Alpaydin and
C. Kaynak (UCI Machine Learning Repository, 1998, doi:10.24432/C50P49). Every fifth image is held
out: no random numbers, so everyone has the same split.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Digits:
    """Pixels [N, 64], float32 from 0 (paper) to 1 (ink), and classes [N], integers 0 … 9."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def load_digits() -> Digits:
    """The digits, 1,437 for training and 360 held out."""
    from sklearn.datasets import load_digits as bundled

    x, y = bundled(return_X_y=True)
    x = (x / 16).astype(np.float32)
    held_out = np.arange(len(x)) % 5 == 0
    return Digits(x[~held_out], y[~held_out], x[held_out], y[held_out])
