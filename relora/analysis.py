"""Spectra, ranks and subspaces of weights and of their differences, as pure tensor functions.

They answer what ReLoRA claims: that the sum of many rank-r updates has a rank far above r. Inputs
may have any float dtype; decompositions are done in fp32, or in fp64 where the input is fp64, on
the input's device. Random draws have a generator of their own: every rank gets the same result.

Shapes that don't fit, tensors without entries, and matrices to decompose that have entries which
aren't finite raise ValueError.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Spectrum(NamedTuple):
    """What is kept of the SVD of an (m, n) matrix."""

    values: Tensor  # (k,) singular values, descending; k = size unless truncated
    left: Tensor  # (m, d) leading left singular vectors
    right: Tensor  # (n, d) leading right ones; those of singular values 0 are arbitrary
    norm: float  # Frobenius norm of the whole matrix, exact even where `values` is truncated
    size: int  # min(m, n)


def spectrum(
    matrix: Tensor, directions: int = 8, exact_up_to: int = 1024, rank: int = 512
) -> Spectrum:
    """Singular values and min(directions, k) leading singular vectors of an (m, n) matrix.

    The SVD is exact if min(m, n) <= `exact_up_to`, else it is `randomized_svd` with `rank` values.
    """
    matrix = _checked(matrix)
    # In two stages, the second in fp64: one fp32 sum over all entries would lose digits.
    norm = float(torch.linalg.vector_norm(torch.linalg.vector_norm(matrix, dim=1).double()))
    if min(matrix.shape) <= exact_up_to:
        # LAPACK takes half as long again for a wide matrix as for its transpose.
        wide = matrix.shape[0] < matrix.shape[1]
        left, values, right = torch.linalg.svd(matrix.T if wide else matrix, full_matrices=False)
        left, right = (right.T, left) if wide else (left, right.T)
    else:
        left, values, right = randomized_svd(matrix, rank)
    return _spectrum(left, values, right, norm, directions)


def factored_spectrum(b: Tensor, a: Tensor, scale: float, directions: int = 8) -> Spectrum:
    """The spectrum of s·B·A for B (m, r) and A (r, n), exact, with k = min(m, n, r).

    The (m, n) product is never formed: with B = Q₁R₁ and Aᵀ = Q₂R₂ the SVD of s·R₁R₂ᵀ has its
    singular values. A sum of updates is one update: B's side by side, A's one above the other.
    """
    if b.ndim != 2 or a.ndim != 2 or b.shape[1] != a.shape[0]:
        raise ValueError(f"B {tuple(b.shape)} and A {tuple(a.shape)} must be (m, r) and (r, n)")
    dtype = torch.promote_types(b.dtype, a.dtype)
    left_q, left_r = torch.linalg.qr(_checked(b.to(dtype)))
    right_q, right_r = torch.linalg.qr(_checked(a.to(dtype)).T)
    left, values, right = torch.linalg.svd(scale * left_r @ right_r.T, full_matrices=False)
    norm = float(torch.linalg.vector_norm(values.double()))
    return _spectrum(left_q @ left, values, right_q @ right.T, norm, directions)


def randomized_svd(
    matrix: Tensor, rank: int, oversampling: int = 10, power_iterations: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading k = min(rank, m, n) singular triplets of an (m, n) matrix, approximately.

    Halko, Martinsson, Tropp (arXiv 0909.4061): an orthonormal basis of the range by randomized
    subspace iteration (algorithm 4.4; 4.3 made safe from rounding), then the SVD of the matrix in
    that basis (algorithm 5.1). The values never exceed the true ones, but for rounding.

    Returns:
        Left vectors (m, k), values (k,) descending, right vectors (n, k).
    """
    matrix = _checked(matrix)
    m, n = matrix.shape
    generator = torch.Generator().manual_seed(seed)
    width = min(rank + oversampling, m, n)
    test = torch.randn(n, width, generator=generator, dtype=matrix.dtype).to(matrix.device)
    basis = torch.linalg.qr(matrix @ test).Q
    for _ in range(power_iterations):
        # Without a QR in between, rounding drowns all directions below ε^(1/(2q+1))·σ₁ (§4.5).
        basis = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ left[:, :rank], values[:rank], right[:rank].T


def stable_rank(spectrum: Spectrum) -> float:
    """‖·‖_F² / σ₁² (Rudelson & Vershynin, arXiv math/0503442, §1); 0 for a zero matrix."""
    largest = float(spectrum.values[0])
    return (spectrum.norm / largest) ** 2 if largest else 0.0


def effective_rank(spectrum: Spectrum) -> float:
    """exp(entropy of σ / Σσ) (Roy & Vetterli, EUSIPCO 2007); 0 for a zero matrix.

    Of a truncated spectrum an upper estimate: the missing energy, ‖·‖_F² − Σσ², counts as spread
    equally over the missing values. No other spread has a higher entropy.
    """
    values = spectrum.values.double()
    energy, missing = spectrum.norm**2, spectrum.size - len(values)
    rest = energy - float(values.square().sum())
    if not energy:
        return 0.0
    if missing and rest > 1e-12 * energy:  # less is rounding
        # None exceeds the last known: the norm's rounding, spread thin, would look like rank.
        each = min(math.sqrt(rest / missing), float(values[-1]))
        values = torch.cat([values, values.new_full((missing,), each)])
    return float(torch.special.entr(values / values.sum()).sum().exp())


def numerical_rank(spectrum: Spectrum, tolerance: float | None = None) -> int:
    """How many singular values are above tolerance · σ₁; 0 for a zero matrix.

    The default tolerance is that of numpy's matrix_rank, max(m, n) · ε of the values' dtype. It
    takes rounding in the SVD for zero; the difference of two stored weights also has the rounding
    of their storage, for which it is far too small. A truncated spectrum can't show more than k.
    """
    values = spectrum.values
    if tolerance is None:
        tolerance = max(len(spectrum.left), len(spectrum.right)) * torch.finfo(values.dtype).eps
    return int((values > tolerance * values[0]).sum())


def principal_angles(u: Tensor, v: Tensor) -> Tensor:
    """The min(i, j) angles between the column spaces of u (m, i) and v (m, j), in radians, fp64.

    Ascending. Columns must be orthonormal. Angles below 45° come from sines, since the cosine of a
    small angle is 1 − θ²/2: below 1e-8 nothing is left of it (Björck & Golub, Math. Comp. 27, 1973;
    Knyazev & Argentati, SIAM J. Sci. Comput. 23, 2002, algorithm 3.1).
    """
    if u.shape[-1] < v.shape[-1]:
        u, v = v, u
    product = _products(u, v)
    cosines = torch.linalg.svdvals(product).clamp(max=1)
    sines = torch.linalg.svdvals(v.double() - u.double() @ product).clamp(max=1).flip(0)
    return torch.where(cosines.square() > 0.5, sines.asin(), cosines.acos())


def overlap(u: Tensor, v: Tensor) -> float:
    """‖UᵀV‖_F² / min(i, j) for u (m, i) and v (m, j) with orthonormal columns.

    The mean squared cosine of the principal angles: 1 if one space holds the other, 0 if they are
    orthogonal, max(i, j) / m on average if they are random.
    """
    return float(subspace_similarity(u, v)[-1, -1])


def subspace_similarity(u: Tensor, v: Tensor) -> Tensor:
    """φ, (i, j) in fp64: entry [a−1, b−1] is the overlap of u's first a and v's first b columns.

    φ(a, b) = ‖U_:aᵀ V_:b‖_F² / min(a, b) (LoRA, arXiv 2106.09685, §7.2 and appendix G), for u
    (m, i) and v (m, j) with orthonormal columns.
    """
    squares = _products(u, v).square().cumsum(0).cumsum(1)
    i, j = (torch.arange(1, count + 1, device=u.device) for count in squares.shape)
    return (squares / torch.minimum(i[:, None], j)).clamp(max=1)


def projection_norm(weight: Tensor, left: Tensor, right: Tensor) -> float:
    """‖UᵀWV‖_F for W (m, n), U (m, i), V (n, j): how much of W is in their directions."""
    if weight.shape != (len(left), len(right)):
        raise ValueError(f"directions of {len(left)} × {len(right)}, weight {tuple(weight.shape)}")
    return float(torch.linalg.matrix_norm(left.T @ weight.to(left.dtype) @ right))


def amplification(weight: Tensor, update: Spectrum) -> float:
    """‖UᵀΔWV‖_F / ‖UᵀWV‖_F: how much an update amplifies directions that W hardly has.

    LoRA, arXiv 2106.09685, §7.3 and table 7, where U and V are all r directions of ΔW, so that
    ‖UᵀΔWV‖ is ‖ΔW‖; here they are those that `update` has, without any of singular value 0, which
    are arbitrary. `weight` is (m, n), as the update is. 0 for a zero update, else inf if W has
    nothing in these directions.
    """
    if not update.norm:
        return 0.0
    count = min(numerical_rank(update, 1e-5), update.left.shape[1])
    projected = projection_norm(weight, update.left[:, :count], update.right[:, :count])
    norm = float(torch.linalg.vector_norm(update.values[:count].double()))
    return norm / projected if projected else math.inf


def _checked(matrix: Tensor) -> Tensor:
    """A matrix as fp32, or as fp64 if it is; ValueError if it has no SVD."""
    if matrix.ndim != 2 or not matrix.numel():
        raise ValueError(f"must be a matrix with entries, its shape is {tuple(matrix.shape)}")
    if not matrix.isfinite().all():
        raise ValueError("the matrix has entries that are not finite")
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))


def _spectrum(left: Tensor, values: Tensor, right: Tensor, norm: float, count: int) -> Spectrum:
    """Cloned, as a view would keep all directions in memory."""
    size = min(len(left), len(right))
    return Spectrum(values, left[:, :count].clone(), right[:, :count].clone(), norm, size)


def _products(u: Tensor, v: Tensor) -> Tensor:
    """UᵀV in fp64, (i, j)."""
    if u.ndim != 2 or v.ndim != 2 or len(u) != len(v) or not (u.numel() and v.numel()):
        raise ValueError(f"bases {tuple(u.shape)} and {tuple(v.shape)} must be (m, i) and (m, j)")
    return u.double().T @ v.double()
