"""Muon (Jordan et al. 2024): the orthogonalization of a matrix.

The coefficients `simple` are Jordan's, `quintic` those of Cesista et al. 2025. The scales
are after Liu et al. 2025 (spectral), Pethick et al. 2025 (unit RMS norm) and Jordan.
"""

import torch
from torch import Tensor

from megatron_ray.config.optimizer import MuonConfig

_EPS = 1e-7
"""Least norm that a matrix is divided by."""

COEFFICIENTS = {
    "simple": ((3.4445, -4.7750, 2.0315),),
    "quintic": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
}
"""Coefficients (a, b, c) of a x + b x^3 + c x^5, by iteration."""


def orthogonalize(matrix: Tensor, muon: MuonConfig) -> Tensor:
    """Returns the nearly orthogonal matrix next to a matrix [outputs, inputs], scaled."""
    outputs, inputs = matrix.shape
    return newton_schulz(matrix, muon) * muon.factor(outputs, inputs)


def newton_schulz(matrix: Tensor, muon: MuonConfig) -> Tensor:
    """Returns a matrix whose singular values are moved towards 1.

    In the type of the matrix, or in bf16 if `muon.precision` is that.
    """
    # The Frobenius norm bounds the largest singular value.
    x = matrix / torch.linalg.vector_norm(matrix).clamp(min=_EPS)
    if muon.precision == "bf16":
        x = x.bfloat16()
    # The products are squares of the smaller side.
    is_tall = matrix.shape[0] > matrix.shape[1]
    if is_tall:
        x = x.mT.contiguous()
    coefficients = COEFFICIENTS[muon.coefficients]
    for index in range(muon.steps):
        a, b, c = coefficients[index % len(coefficients)]
        gram = x @ x.mT
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    if is_tall:
        x = x.mT
    orthogonal: Tensor = x.to(matrix.dtype)
    return orthogonal
