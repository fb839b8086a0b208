"""The estimators against their definitions, by exact expectations instead of samples."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dispc.learn.estimator import ESTIMATORS, MEDIAN_OF_NOISE, OFFSET, gumbel, reinmax

NUMBERS = st.floats(-5, 5)


def expected_gradient(x: float, function: tuple[float, float, float]) -> float:
    """E over B of the gradient that ReinMax passes to x, for a + b g + c g^2 of the gate g."""
    _, linear, square = function
    total = 0.0
    keep = torch.sigmoid(torch.tensor(x + OFFSET, dtype=torch.float64)).item()
    for noise, odds in ((0.0, keep), (1.0, 1.0 - keep)):  # noise below the odds keeps, noise above drops
        latent = torch.tensor([x], dtype=torch.float64, requires_grad=True)
        gate, _ = reinmax(latent, torch.tensor([noise]))
        (linear * gate + square * gate.square()).sum().backward()
        assert latent.grad is not None
        total += odds * latent.grad.item()
    return total


@given(NUMBERS, st.tuples(NUMBERS, NUMBERS, NUMBERS))
def test_reinmax_gradients_of_quadratics_are_exact_in_expectation(
    x: float, function: tuple[float, float, float]
) -> None:
    _, linear, square = function
    keep = torch.sigmoid(torch.tensor(x + OFFSET, dtype=torch.float64)).item()
    exact = keep * (1 - keep) * (linear + square)  # d/dx of p f(1) + (1 - p) f(0)
    assert expected_gradient(x, function) == pytest.approx(exact, abs=1e-9)


def test_the_transcribed_line_would_not_be_exact() -> None:
    """With ln pi1 for the log odds, as the paper prints it, the expectation is off: the correction matters."""

    def transcribed(x: float) -> float:
        total = 0.0
        for sample, odds in ((1.0, torch.sigmoid(torch.tensor(x))), (0.0, 1 - torch.sigmoid(torch.tensor(x)))):
            latent = torch.tensor([x], requires_grad=True)
            pi1 = (sample + torch.sigmoid(latent)) / 2
            pi1 = torch.sigmoid((pi1.log() - latent).detach() + latent)
            (2 * pi1 - torch.sigmoid(latent) / 2).sum().backward()
            assert latent.grad is not None
            total += float(odds * latent.grad)
        return total

    exact = float(torch.sigmoid(torch.tensor(1.0)) * torch.sigmoid(torch.tensor(-1.0)))
    assert abs(transcribed(1.0) - exact) > 0.01
    assert expected_gradient(1.0 - OFFSET, (0.0, 1.0, 0.0)) == pytest.approx(exact, abs=1e-6)


@given(st.lists(NUMBERS, min_size=1, max_size=20), st.integers(0, 99))
def test_reinmax_gates_are_zero_or_one_and_kept_by_the_noise(values: list[float], seed: int) -> None:
    latents = torch.tensor(values)
    noise = torch.rand(len(values), generator=torch.Generator().manual_seed(seed))
    gates, counted = reinmax(latents, noise)
    torch.testing.assert_close(gates, (noise < torch.sigmoid(latents + OFFSET)).float(), atol=1e-6, rtol=0)
    assert counted is gates


def test_extreme_latents_give_finite_gradients() -> None:
    for name, estimate in ESTIMATORS.items():
        latents = torch.tensor([-80.0, -20.0, 0.0, 20.0, 80.0], requires_grad=True)
        gates, counted = estimate(latents, torch.tensor([0.0, 0.5, 0.99999994, 0.5, 0.0]), OFFSET)
        (gates.sum() + counted.sum()).backward()
        assert latents.grad is not None and bool(torch.isfinite(latents.grad).all()), name


def test_gumbel_is_soft_for_the_model_and_hard_for_the_budget() -> None:
    latents = torch.linspace(-6, 2, 1001, requires_grad=True)
    noise = torch.rand(1001, generator=torch.Generator().manual_seed(0))
    soft, counted = gumbel(latents, noise)
    assert bool(((soft > 0.01) & (soft < 0.99)).any())
    assert set(counted.detach().round(decimals=5).tolist()) <= {0.0, 1.0}


def test_the_median_of_the_noise_is_where_a_gate_is_on_half_of_the_time() -> None:
    noise = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    for name, estimate in ESTIMATORS.items():
        latents = torch.full_like(noise, -OFFSET - MEDIAN_OF_NOISE[name])
        gates: Tensor = estimate(latents, noise, OFFSET)[0]
        assert float((gates > 0.5).float().mean()) == pytest.approx(0.5, abs=0.01), name
