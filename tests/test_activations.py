"""Every activation function equals transformers' of the same name."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2CLS, ACT2FN

from optlens.activations import ACTIVATIONS, WITH_PARAMETERS

# From far below to far above, densely around 0, and the corners 0, -3, 3 and 6 of the piecewise ones.
POINTS = torch.cat(
    [
        torch.linspace(-60, 60, 1201, dtype=torch.float64),
        torch.linspace(-1e-3, 1e-3, 101, dtype=torch.float64),
        torch.tensor([0.0, -0.0, 3.0, -3.0, 6.0, 1e4, -1e4], dtype=torch.float64),
    ]
)


def test_every_name_that_has_no_parameters_is_there():
    built = {name: ACT2FN[name] for name in ACT2CLS}
    assert WITH_PARAMETERS == {name for name, module in built.items() if list(module.parameters())}
    assert set(ACTIVATIONS) == set(built) - WITH_PARAMETERS


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_values_and_slopes_equal_transformers(name):
    ours, theirs = (POINTS.clone().requires_grad_() for _ in range(2))
    value, expected = ACTIVATIONS[name](ours), ACT2FN[name](theirs)
    # a few units in the last place: the same formula in another order of operations
    torch.testing.assert_close(value, expected, rtol=1e-14, atol=1e-15)
    (slope,) = torch.autograd.grad(value.sum(), ours)
    (expected_slope,) = torch.autograd.grad(expected.sum(), theirs)
    # the slope of sqrt(softplus) where softplus underflows is 0/0 in both
    torch.testing.assert_close(slope, expected_slope, rtol=1e-12, atol=1e-13, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_narrow_types_equal_transformers(name, dtype):
    points = POINTS.to(dtype)
    before = points.clone()
    # one unit in the last place; the cubes of the approximate GELUs overflow float16 alike in both
    torch.testing.assert_close(
        ACTIVATIONS[name](points),
        ACT2FN[name](points),
        rtol=2 * torch.finfo(dtype).eps,
        atol=torch.finfo(dtype).tiny,
        equal_nan=True,
    )
    torch.testing.assert_close(points, before, rtol=0, atol=0)  # and the input is left as it was
