"""The Cholesky factor of an inverse, by which GPTQ and SparseGPT go from column to column.

Both settle one column after the other and let the columns behind it make up for the error. The best answer
needs the inverse of the Hessian's part that is still free, a new one at every column. With H⁻¹ = UᵀU, U
upper triangular, the inverse of the part from column j on is U[j:, j:]ᵀ U[j:, j:], whose first row is
U_jj · U_j,j:. So one factor holds them all, and no inverse is ever updated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmcourse.errors import ShapeError


def inverse_factor(hessian: Tensor) -> Tensor:
    """U [K, K], upper triangular, with UᵀU the inverse of a positive definite matrix; in its number format.

    Raises   ShapeError for a matrix that is not positive definite.
    """
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if int(failed):
        raise ShapeError(
            f"the damped Gram matrix is not positive definite (row {int(failed)}).",
            "Σ x xᵀ is, up to the rounding of its sums; one of numbers that are not finite is not, either.",
            "calibrate(…, dtype=torch.float64), a larger damping, or a look at the inputs for inf and nan.",
        )
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
