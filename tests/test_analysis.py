"""Spectra, ranks and subspaces against hand-computed cases and numpy in fp64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from relora.analysis import (
    Spectrum,
    amplification,
    effective_rank,
    factored_spectrum,
    numerical_rank,
    overlap,
    principal_angles,
    projection_norm,
    randomized_svd,
    spectrum,
    stable_rank,
    subspace_similarity,
)

SHAPES = [(60, 60), (90, 40), (40, 90)]


def error_bound(
    sigma: float,
    shape: tuple[int, int],
    rank: int,
    oversampling: int = 10,
    power_iterations: int = 2,
) -> float:
    """What the spectral-norm error of `randomized_svd` is at most, in expectation.

    With σ = σ_{k+1}, k = rank, p = oversampling, q = power_iterations (arXiv 0909.4061):

        σ + [1 + √(k/(p−1)) + e√(k+p)/p · √(min(m, n) − k)]^{1/(2q+1)} · σ

    The bracket is corollary 10.10, the first σ theorem 9.3 (the basis has k + p vectors, of which
    k are kept). No factorization of rank k has an error below σ.
    The theorem supposes k >= 2, p >= 2 and k + p <= min(m, n).
    """
    k, p, size = rank, oversampling, min(shape)
    assert k >= 2 <= p
    assert k + p <= size
    factor = 1 + math.sqrt(k / (p - 1)) + math.e * math.sqrt(k + p) / p * math.sqrt(size - k)
    return sigma * (1 + factor ** (1 / (2 * power_iterations + 1)))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def basis(m: int, count: int, seed: int = 0) -> Tensor:
    """(m, count) random orthonormal columns."""
    return torch.linalg.qr(normal(m, count, seed=seed)).Q


def with_values(m: int, n: int, values: Tensor, seed: int = 0) -> Tensor:
    """(m, n) fp64 with these singular values and random directions."""
    count = len(values)
    return basis(m, count, seed) * values.double() @ basis(n, count, seed + 1).T


def line(angle: float) -> Tensor:
    return torch.tensor([[math.cos(angle)], [math.sin(angle)]], dtype=torch.float64)


def same_directions(u: Tensor, v: Tensor, tolerance: float) -> bool:
    """Whether columns are equal but for their signs."""
    cosines = (u.double() * v.double()).sum(0).abs()
    return u.shape == v.shape and bool((cosines > 1 - tolerance).all())


# --- spectra -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_spectrum_is_that_of_numpy(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = normal(*shape).to(dtype)
    left, values, right = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    found = spectrum(matrix, directions=5)
    wide = dtype == torch.float64
    assert found.values.dtype == (torch.float64 if wide else torch.float32)
    np.testing.assert_allclose(found.values, values, rtol=1e-12 if wide else 1e-4)
    assert same_directions(found.left, torch.from_numpy(left[:, :5].copy()), 1e-6)
    assert same_directions(found.right, torch.from_numpy(right[:5].T.copy()), 1e-6)
    assert found.norm == pytest.approx(np.linalg.norm(values), rel=1e-12 if wide else 1e-6)
    assert found.size == min(shape)


@pytest.mark.parametrize("exact_up_to", [1024, 10])
def test_transposing_swaps_left_and_right(exact_up_to: int) -> None:
    matrix = with_values(70, 30, 0.5 ** torch.arange(30))
    one, other = (spectrum(m, 4, exact_up_to, 20) for m in (matrix, matrix.T))
    torch.testing.assert_close(one.values, other.values, rtol=1e-6, atol=1e-9)
    assert same_directions(one.left, other.right, 1e-9)
    assert same_directions(one.right, other.left, 1e-9)
    assert (one.size, one.norm) == (other.size, pytest.approx(other.norm))


def test_no_more_directions_than_values() -> None:
    assert spectrum(normal(5, 3)).left.shape == (5, 3)
    assert spectrum(normal(50, 30), exact_up_to=10, rank=4).right.shape == (30, 4)
    assert factored_spectrum(normal(9, 2), normal(2, 7), 1.0).left.shape == (9, 2)
    assert spectrum(normal(5, 3), directions=0).left.shape == (5, 0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 7, 50])  # the last above min(m, n) of two shapes
def test_factored_spectrum_is_that_of_the_product(shape: tuple[int, int], rank: int) -> None:
    b, a = normal(shape[0], rank, seed=1), normal(rank, shape[1], seed=2)
    dense, factored = spectrum(-0.3 * b @ a), factored_spectrum(b, a, -0.3)
    k = len(factored.values)
    assert (k, factored.size) == (min(rank, *shape), dense.size)
    torch.testing.assert_close(factored.values, dense.values[:k], rtol=1e-6, atol=1e-9)
    assert factored.norm == pytest.approx(dense.norm, rel=1e-9)
    d = factored.left.shape[1]
    assert same_directions(factored.left, dense.left[:, :d], 1e-6)
    assert same_directions(factored.right, dense.right[:, :d], 1e-6)
    # A pair's signs belong together: uᵀ(s·B·A)v = σ.
    core = factored.left.T @ (-0.3 * b @ a) @ factored.right
    torch.testing.assert_close(core, factored.values[:d].diag(), rtol=1e-6, atol=1e-9)
    for measure in (stable_rank, effective_rank, numerical_rank):
        assert measure(factored) == pytest.approx(measure(dense), rel=1e-6)


def test_factors_in_fp32_and_bf16_are_decomposed_in_fp32() -> None:
    b, a = normal(40, 4, dtype=torch.float32), normal(4, 30, seed=1).bfloat16()
    found = factored_spectrum(b, a, 2.0)
    dense = np.linalg.svd(2 * b.double().numpy() @ a.double().numpy(), compute_uv=False)
    assert found.values.dtype == torch.float32
    np.testing.assert_allclose(found.values, dense[:4], rtol=1e-6)


def test_updates_side_by_side_are_their_sum() -> None:
    b, a = normal(30, 6), normal(6, 20, seed=1)
    summed = b[:, :2] @ a[:2] + b[:, 2:4] @ a[2:4] + b[:, 4:] @ a[4:]
    found = factored_spectrum(b, a, 1.0).values
    torch.testing.assert_close(found, spectrum(summed).values[:6], rtol=1e-9, atol=0)


def zeros() -> list[Spectrum]:
    return [
        spectrum(torch.zeros(12, 9)),
        spectrum(torch.zeros(12, 9), exact_up_to=4, rank=3),
        factored_spectrum(torch.zeros(12, 2), torch.ones(2, 9), 1.0),
        factored_spectrum(torch.ones(12, 2), torch.ones(2, 9), 0.0),
    ]


@pytest.mark.parametrize("zero", zeros())
def test_a_zero_matrix_has_no_rank_and_no_norm(zero: Spectrum) -> None:
    assert zero.norm == 0
    assert not zero.values.any()
    assert zero.left.isfinite().all()
    assert zero.right.isfinite().all()
    assert stable_rank(zero) == effective_rank(zero) == numerical_rank(zero) == 0
    assert amplification(torch.ones(12, 9), zero) == 0


@pytest.mark.parametrize("bad", [torch.ones(3), torch.ones(0, 3), torch.tensor([[1.0, math.nan]])])
def test_what_has_no_svd_is_refused(bad: Tensor) -> None:
    with pytest.raises(ValueError, match="matri"):
        spectrum(bad)
    with pytest.raises(ValueError, match="matri"):
        randomized_svd(bad, 1)
    with pytest.raises(ValueError, match=r"must be|not finite"):
        factored_spectrum(bad, torch.ones(bad.shape[-1], 2), 1.0)


def test_factors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(5, 2\).*\(3, 5\)"):
        factored_spectrum(torch.ones(5, 2), torch.ones(3, 5), 1.0)


# --- randomized SVD ------------------------------------------------------------------------------

DECAYS = {
    "exponential": 0.7 ** torch.arange(200, dtype=torch.float64),
    "linear": 1 - torch.arange(200, dtype=torch.float64) / 250,
    "1/j": 1 / torch.arange(1, 201, dtype=torch.float64),
    "1/√j": torch.arange(1, 201, dtype=torch.float64).rsqrt(),
    "flat": torch.ones(200, dtype=torch.float64),
    "rank 5": (torch.arange(200) < 5).double(),
}


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("shape", [(200, 200), (300, 200), (200, 300)])
@pytest.mark.parametrize("power", [0, 2])
def test_randomized_error_is_below_the_bound(
    decay: str, shape: tuple[int, int], power: int
) -> None:
    k, values = 20, DECAYS[decay]
    matrix = with_values(*shape, values)
    errors = []
    for seed in range(3):
        left, s, right = randomized_svd(matrix, k, power_iterations=power, seed=seed)
        errors.append(float(torch.linalg.matrix_norm(matrix - left * s @ right.T, 2)))
    sigma, rounding = float(values[k]), 1e-12
    assert sum(errors) / 3 <= error_bound(sigma, shape, k, power_iterations=power) + rounding
    assert min(errors) >= sigma * (1 - 1e-9)  # none of rank k is nearer
    if power:
        assert max(errors) <= 1.2 * sigma + rounding
        assert bool((s <= values[:k] + rounding).all())
        near = {"exponential": 1e-9, "1/j": 1e-2, "rank 5": 1e-12}.get(decay, 0.1)
        torch.testing.assert_close(s, values[:k], rtol=near, atol=rounding)


@given(st.integers(2, 25), st.integers(2, 12), st.integers(0, 3), st.floats(0.3, 1))
@settings(max_examples=25, deadline=None)
def test_the_bound_holds_for_any_setting(k: int, p: int, q: int, base: float) -> None:
    values = base ** torch.arange(40, dtype=torch.float64)
    matrix = with_values(45, 40, values)
    left, s, right = randomized_svd(matrix, k, p, q)
    error = float(torch.linalg.matrix_norm(matrix - left * s @ right.T, 2))
    assert error <= error_bound(float(values[k]), (45, 40), k, p, q) + 1e-12


def test_the_bound_is_the_papers_worked_by_hand() -> None:
    # k = 4, p = 5, q = 0: 1 + √(4/4) + e·√9/5·√(8 − 4) = 2 + 6e/5, and one σ for keeping k of 9.
    assert error_bound(2.0, (20, 9), 4, 5, 0) == pytest.approx(2 * (3 + 3 * math.e / 5 * 5**0.5))
    bracket = 2 + 3 * math.e / 5 * 5**0.5
    assert error_bound(1.0, (9, 20), 4, 5, 1) == pytest.approx(1 + bracket ** (1 / 3))


def test_directions_of_a_truncated_spectrum_are_those_of_the_exact_one() -> None:
    matrix = with_values(120, 80, 0.8 ** torch.arange(80)).float()
    exact, truncated = spectrum(matrix), spectrum(matrix, exact_up_to=10, rank=20)
    assert same_directions(exact.left, truncated.left, 1e-5)
    assert same_directions(exact.right, truncated.right, 1e-5)
    assert (truncated.norm, truncated.size) == (exact.norm, 80)
    torch.testing.assert_close(truncated.values, exact.values[:20], rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_rank_above_the_size_gives_the_whole_svd(shape: tuple[int, int]) -> None:
    matrix = normal(*shape)
    left, values, right = randomized_svd(matrix, 1000)
    assert left.shape == (shape[0], min(shape))
    torch.testing.assert_close(left * values @ right.T, matrix)


def test_small_directions_survive_power_iterations_in_fp32() -> None:
    """Without a QR in between, ε^(1/5) = 0.04·σ₁ would be the smallest to be seen."""
    values = torch.cat([torch.ones(5), torch.full((5,), 1e-4), torch.zeros(90)])
    found = randomized_svd(with_values(100, 100, values).float(), 10)[1]
    torch.testing.assert_close(found, values[:10], rtol=1e-2, atol=0)


def test_a_seed_decides_the_draw_and_the_global_one_is_untouched() -> None:
    matrix = normal(50, 40)
    state = torch.get_rng_state()
    one = randomized_svd(matrix, 5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    other = randomized_svd(matrix, 5)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[1], randomized_svd(matrix, 5, seed=1)[1])


# --- ranks ---------------------------------------------------------------------------------------


def test_stable_rank_of_diag_2_1_is_1_25() -> None:
    assert stable_rank(spectrum(torch.diag(torch.tensor([2.0, 1.0])))) == pytest.approx(1.25)


@pytest.mark.parametrize("exact_up_to", [1024, 10])  # 10: truncated to 12 of 24
def test_every_rank_of_the_identity_is_its_size(exact_up_to: int) -> None:
    found = spectrum(torch.eye(24, dtype=torch.float64), 8, exact_up_to, 12)
    assert stable_rank(found) == pytest.approx(24)
    assert effective_rank(found) == pytest.approx(24)
    assert numerical_rank(found) == len(found.values)


@pytest.mark.parametrize("exact_up_to", [1024, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_rank_of_an_outer_product_is_1(exact_up_to: int, dtype: torch.dtype) -> None:
    found = spectrum((normal(50, 1) @ normal(1, 30, seed=1)).to(dtype), 8, exact_up_to, 12)
    assert stable_rank(found) == pytest.approx(1, rel=1e-5)
    assert effective_rank(found) == pytest.approx(1, rel=1e-4)
    assert numerical_rank(found) == 1


def test_effective_rank_worked_by_hand() -> None:
    # Shares 1/2, 1/4, 1/4: the entropy is 1.5 ln 2.
    found = spectrum(torch.diag(torch.tensor([2.0, 1.0, 1.0])))
    assert effective_rank(found) == pytest.approx(2**1.5)


@pytest.mark.parametrize("decay", DECAYS)
def test_effective_rank_of_a_truncated_spectrum_is_an_upper_estimate(decay: str) -> None:
    matrix = with_values(200, 220, DECAYS[decay])
    exact = effective_rank(spectrum(matrix))
    truncated = effective_rank(spectrum(matrix, exact_up_to=10, rank=50))
    assert exact * (1 - 1e-6) <= truncated <= 1.25 * exact


def test_rounding_of_the_norm_is_not_taken_for_rank() -> None:
    none = torch.zeros(1000, 0)
    found = Spectrum(torch.tensor([1, 1e-9]), none, none, norm=1 + 1e-7, size=1000)
    assert effective_rank(found) == pytest.approx(1, abs=1e-4)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12), st.data())
@settings(deadline=None)
def test_spread_energy_has_the_highest_entropy(values: list[float], data: st.DataObject) -> None:
    whole = torch.tensor(sorted([1.0, *values], reverse=True), dtype=torch.float64)
    kept = data.draw(st.integers(1, len(whole)))
    none, norm = torch.zeros(len(whole), 0), float(whole.norm())
    exact, truncated = (Spectrum(v, none, none, norm, len(whole)) for v in (whole, whole[:kept]))
    assert effective_rank(truncated) >= effective_rank(exact) * (1 - 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rank_of_summed_updates_adds_up(dtype: torch.dtype) -> None:
    total, ranks = torch.zeros(40, 25, dtype=dtype), []
    for cycle in range(3):
        b, a = normal(40, 3, seed=cycle, dtype=dtype), normal(3, 25, seed=9 + cycle, dtype=dtype)
        total += b @ a
        ranks.append(numerical_rank(spectrum(total)))
        assert ranks[-1] == np.linalg.matrix_rank(total.numpy())
    assert ranks == [3, 6, 9]


def test_numerical_rank_counts_what_is_above_the_tolerance() -> None:
    found = spectrum(torch.diag(torch.tensor([4.0, 2.0, 1.0])))
    assert [numerical_rank(found, tolerance) for tolerance in (0.2, 0.25, 0.5, 1)] == [3, 2, 1, 0]


@given(st.integers(1, 12), st.integers(1, 12), st.floats(1e-12, 1e12), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_ranks_are_ordered_and_blind_to_scale(m: int, n: int, scale: float, seed: int) -> None:
    found, scaled = (spectrum(factor * normal(m, n, seed=seed)) for factor in (1, scale))
    ranks = stable_rank(found), effective_rank(found), numerical_rank(found)
    assert 1 - 1e-9 <= ranks[0] <= ranks[1] * (1 + 1e-9) <= ranks[2] * (1 + 2e-9)
    assert ranks == pytest.approx(
        (stable_rank(scaled), effective_rank(scaled), numerical_rank(scaled)), rel=1e-9
    )


# --- subspaces -----------------------------------------------------------------------------------


@pytest.mark.parametrize("angle", [0, 1e-12, 1e-6, 0.1, math.pi / 4, 1.2, math.pi / 2 - 1e-9])
def test_two_lines_are_apart_by_their_angle(angle: float) -> None:
    found = principal_angles(line(0.3), line(0.3 + angle))
    assert found.tolist() == pytest.approx([angle], rel=0, abs=1e-15)


def test_principal_angles_in_fp32_resolve_1e_6() -> None:
    found = principal_angles(line(0).float(), line(1e-6).float())
    assert found.tolist() == pytest.approx([1e-6], rel=1e-3)


def test_principal_angles_are_those_a_basis_was_turned_by() -> None:
    turned = [1e-7, 0.01, 0.7, 0.9, 1.5]
    frame = basis(20, 12)
    angles = torch.tensor(turned, dtype=torch.float64)
    u = frame[:, :7]  # two columns more than v
    v = frame[:, :5] * angles.cos() + frame[:, 7:] * angles.sin()
    v = v @ basis(5, 5, seed=3)  # the space counts, not its basis
    torch.testing.assert_close(principal_angles(u, v), angles, rtol=1e-7, atol=1e-14)
    torch.testing.assert_close(principal_angles(v, u), angles, rtol=1e-7, atol=1e-14)
    assert overlap(u, v) == pytest.approx(float(angles.cos().square().mean()))


def test_equal_spaces_overlap_by_1_and_orthogonal_ones_by_0() -> None:
    frame = basis(30, 12)
    u, v = frame[:, :6], frame[:, 6:]
    assert overlap(u, u @ basis(6, 6, seed=1)) == pytest.approx(1)
    assert overlap(u, frame) == pytest.approx(1)  # one holds the other
    assert overlap(u, v) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(principal_angles(u, v), torch.full((6,), math.pi / 2).double())


def test_similarity_of_a_basis_is_1_with_itself_and_0_with_what_is_orthogonal() -> None:
    u, v = basis(10, 10).split([4, 6], dim=1)
    torch.testing.assert_close(subspace_similarity(u, u), torch.ones(4, 4).double())
    assert subspace_similarity(u, v).max() < 1e-12


def test_similarity_worked_by_hand() -> None:
    e = torch.eye(4, dtype=torch.float64)
    u = e[:, [0, 1]]
    v = torch.stack([e[:, 1], 0.6 * e[:, 0] + 0.8 * e[:, 2], e[:, 3]], dim=1)
    # (UᵀV)² = [[0, .36, 0], [1, 0, 0]]
    expected = torch.tensor([[0, 0.36, 0.36], [1, 0.68, 0.68]]).double()
    torch.testing.assert_close(subspace_similarity(u, v), expected)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_similarity_is_the_overlap_of_prefixes(i: int, j: int, seed: int) -> None:
    u, v = basis(9, i, seed), basis(9, j, seed + 100)
    found = subspace_similarity(u, v)
    assert found.shape == (i, j)
    for a in range(i):
        for b in range(j):
            product = u[:, : a + 1].numpy().T @ v[:, : b + 1].numpy()
            expected = np.linalg.norm(product) ** 2 / min(a + 1, b + 1)
            assert float(found[a, b]) == pytest.approx(expected, abs=1e-12)
    assert overlap(u, v) == pytest.approx(float(principal_angles(u, v).cos().square().mean()))
    assert overlap(u, v) == pytest.approx(overlap(v, u))


@pytest.mark.parametrize("bad", [torch.ones(4), torch.ones(4, 0), torch.ones(3, 2)])
def test_bases_that_do_not_fit_are_refused(bad: Tensor) -> None:
    for measure in (principal_angles, overlap, subspace_similarity):
        with pytest.raises(ValueError, match="bases"):
            measure(torch.eye(4), bad)


def test_amplification_worked_by_hand() -> None:
    weight = torch.tensor([[9.0, 0.5, 7.0], [8.0, 7.0, 0.25]])
    update = spectrum(torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.0, 4.0]]))
    # U = (e₂, e₁), V = (e₃, e₂): UᵀWV = [[.25, 7], [7, .5]], up to signs.
    projection = math.sqrt(0.25**2 + 0.5**2 + 2 * 49)
    assert projection_norm(weight, update.left, update.right) == pytest.approx(projection)
    assert amplification(weight, update) == pytest.approx(5 / projection)
    first = spectrum(torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.0, 4.0]]), directions=1)
    assert amplification(weight.bfloat16(), first) == pytest.approx(4 / 0.25)


def test_a_multiple_of_the_weight_amplifies_by_its_factor() -> None:
    weight = normal(12, 8)
    assert amplification(weight, spectrum(3 * weight)) == pytest.approx(3)
    large = normal(60, 50)  # of more directions than are kept
    assert amplification(large, spectrum(3 * large)) == pytest.approx(3)
    b, a = normal(12, 2, seed=1), normal(2, 8, seed=2)
    dense, factored = spectrum(b @ a, directions=2), factored_spectrum(b, a, 1.0)
    assert amplification(weight, dense) == pytest.approx(amplification(weight, factored))


def test_amplification_of_what_the_weight_lacks_is_infinite() -> None:
    update = factored_spectrum(torch.eye(3)[:, :1], torch.eye(3)[:1], 2.0)
    assert amplification(torch.diag(torch.tensor([0.0, 1.0, 1.0])), update) == math.inf


def test_a_transposed_weight_is_refused() -> None:
    with pytest.raises(ValueError, match=r"12 × 8.*\(8, 12\)"):
        amplification(torch.ones(8, 12), spectrum(normal(12, 8)))
