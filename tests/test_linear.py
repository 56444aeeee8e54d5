"""`Linear` against `torch.nn.Linear`: results, gradients, and every situation that oneDNN's operator cannot serve.

The operator exists wherever PyTorch was built with oneDNN, so that these tests run it also on
processors on which `Linear` would not choose it.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from optlens import linear as module
from optlens.linear import SMALLEST_MATRIX, SMALLEST_PRODUCT, Linear, linear

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    reason="this PyTorch was built without oneDNN",
)
pytestmark = needs_onednn
N_IN, N_OUT = 192, 320
ROWS = SMALLEST_PRODUCT // (N_IN * N_OUT) + 1
# float32 sums of 192 products of standard normal numbers: 2**-24 * sqrt(192) * |largest|, twice over
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Choose oneDNN on any processor, and count its products."""
    count = []
    true = module._multiply

    def counted(*operands):
        count.append(operands)
        return true(*operands)

    monkeypatch.setattr(module, "USE_ONEDNN", True)
    monkeypatch.setattr(module, "_multiply", counted)
    return count


def operands(rows=ROWS, dtype=torch.float32, requires_grad=False):
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, N_IN), (N_OUT, N_IN), (N_OUT,)
    return [
        torch.randn(shape, generator=generator, dtype=dtype).requires_grad_(requires_grad)
        for shape in shapes
    ]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    "shape",
    [(ROWS, N_IN), (3, ROWS, N_IN), (2, 3, ROWS, N_IN), (1, ROWS, N_IN)],
    ids=["2d", "3d", "4d", "one-prompt"],
)
def test_results_equal_those_of_torch(shape, with_bias, calls):
    _, weight, bias = operands()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    bias = bias if with_bias else None
    result = linear(x, weight, bias)
    torch.testing.assert_close(result, F.linear(x, weight, bias), **TOLERANCE)
    assert result.is_contiguous()
    assert len(calls) == 1


@pytest.mark.parametrize("kind", ["transposed", "sliced", "expanded", "reversed weight"])
def test_any_layout_of_memory_gives_the_same_numbers(kind, calls):
    x, weight, bias = operands()
    if kind == "transposed":
        x = x.t().contiguous().t()
        weight = weight.t().contiguous().t()
    elif kind == "sliced":
        x, weight = F.pad(x, (3, 5))[:, 3:-5], F.pad(weight, (1, 1, 1, 1))[1:-1, 1:-1]
    elif kind == "expanded":
        x = x[:1].expand(ROWS, -1)
    else:
        weight = weight.repeat_interleave(2, 0)[::2]
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), **TOLERANCE)
    assert len(calls) == 1


def test_gradients_equal_those_of_torch(calls):
    mine, theirs = operands(requires_grad=True), operands(requires_grad=True)
    upstream = torch.randn(ROWS, N_OUT, generator=torch.Generator().manual_seed(2))
    linear(*mine).backward(upstream)
    assert len(calls) == 3  # forward, and the gradients of x and weight
    F.linear(*theirs).backward(upstream)
    for ours, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("wanted", range(3), ids=["x", "weight", "bias"])
def test_only_gradients_that_are_wanted_are_computed(wanted, calls):
    given = operands()
    given[wanted].requires_grad_(True)
    linear(*given).sum().backward()
    assert len(calls) == (1 if wanted == 2 else 2)
    expected = operands()
    expected[wanted].requires_grad_(True)
    F.linear(*expected).sum().backward()
    torch.testing.assert_close(given[wanted].grad, expected[wanted].grad, rtol=1e-5, atol=1e-4)


def test_gradients_of_gradients_equal_those_of_torch():
    def penalty(product, x, weight, bias):
        (slope,) = torch.autograd.grad(
            product(x, weight, bias).square().sum(), x, create_graph=True
        )
        slope.square().sum().backward()
        return weight.grad / weight.grad.abs().max()

    torch.testing.assert_close(
        penalty(linear, *operands(requires_grad=True)),
        penalty(F.linear, *operands(requires_grad=True)),
        rtol=0,
        atol=1e-5,
    )


def test_gradients_flow_through_batches_of_more_axes():
    _, weight, bias = operands(requires_grad=True)
    x = torch.randn(2, 3, ROWS, N_IN, generator=torch.Generator().manual_seed(3))
    linear(x, weight, bias).sum().backward()
    mine = weight.grad.clone()
    weight.grad = None
    F.linear(x, weight, bias).sum().backward()
    torch.testing.assert_close(mine, weight.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(bias.grad, torch.full_like(bias, 2.0 * 6 * ROWS))


def test_the_same_bits_with_and_without_gradients():
    x, weight, bias = operands()
    with torch.no_grad():
        plain = linear(x, weight, bias)
    assert torch.equal(plain, linear(x, weight.requires_grad_(), bias))
    with torch.inference_mode():
        assert torch.equal(plain, linear(x, weight, bias))


class Subclass(torch.Tensor):
    """Stands for a quantised weight."""


# ------------------------------------------------------------- where the operator cannot serve


def autocast(x, weight, bias):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = linear(x, weight, bias)
    assert result.dtype == torch.bfloat16
    return result.float()


def mapped(x, weight, bias):
    return torch.func.vmap(lambda row: linear(row, weight, bias))(x.unflatten(0, (1, -1)))[0]


def forward_mode(x, weight, bias):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        value, tangent = torch.autograd.forward_ad.unpack_dual(linear(dual, weight, bias))
    torch.testing.assert_close(tangent, F.linear(x, weight), **TOLERANCE)
    return value


def counted_flops(x, weight, bias):
    with FlopCounterMode(display=False) as counter:
        result = linear(x, weight, bias)
    assert counter.get_total_flops() == 2 * x.numel() * len(weight)
    return result


def float64(x, weight, bias):
    return linear(x.double(), weight.double(), bias.double()).float()


def subclass(x, weight, bias):
    return linear(x, weight.as_subclass(Subclass), bias).as_subclass(torch.Tensor)


def subclassed_input(x, weight, bias):
    return linear(x.as_subclass(Subclass), weight, bias).as_subclass(torch.Tensor)


def few_rows(x, weight, bias):
    part = linear(x[: ROWS // 2], weight, bias)
    return torch.cat([part, linear(x[ROWS // 2 : -1], weight, bias), linear(x[-1:], weight, bias)])


def one_vector(x, weight, bias):
    wide = weight.repeat(ROWS, 1)
    return linear(x[0], wide, bias.repeat(ROWS)).unflatten(0, (ROWS, -1))[:1].expand(ROWS, -1)


@pytest.mark.parametrize(
    "way",
    [autocast, mapped, forward_mode, counted_flops, float64, subclass, subclassed_input, few_rows],
    ids=lambda way: way.__name__,
)
def test_torch_takes_over_where_the_operator_cannot_serve(way, calls):
    x, weight, bias = operands()
    expected = F.linear(x, weight, bias)
    tolerance = {"rtol": 0.02, "atol": 0.3} if way is autocast else TOLERANCE
    torch.testing.assert_close(way(x, weight, bias), expected, **tolerance)
    assert not calls


def test_one_vector_is_served_by_torch(calls):
    x, weight, bias = operands()
    result = one_vector(x, weight, bias)
    torch.testing.assert_close(result[0], F.linear(x, weight, bias)[0], **TOLERANCE)
    assert not calls


@pytest.mark.parametrize("n_in", [SMALLEST_MATRIX // N_OUT, SMALLEST_MATRIX // N_OUT + 1])
def test_a_single_row_is_worth_it_where_the_matrix_is_large(n_in, calls):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, n_in, generator=generator) for n in (1, N_OUT))
    # sums of 780 products: as TOLERANCE, for twice their root
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=1e-5, atol=4e-5)
    assert len(calls) == (weight.numel() >= SMALLEST_MATRIX)


@pytest.mark.parametrize("shape", [(0, N_IN), (2, 0, N_IN)])
@pytest.mark.parametrize("n_out", [N_OUT, SMALLEST_MATRIX])
def test_no_rows_give_no_rows(shape, n_out):
    weight = torch.zeros(n_out, N_IN, requires_grad=True)
    result = linear(torch.zeros(shape), weight)
    assert result.shape == (*shape[:-1], n_out)
    result.sum().backward()
    assert not weight.grad.any()


def test_wrong_shapes_raise_torchs_own_error(calls):
    x, weight, bias = operands()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(x[:, 1:].repeat(2, 1), weight, bias)
    assert not calls


def test_a_module_is_a_torch_linear_in_all_but_speed(calls):
    torch.manual_seed(0)
    mine = Linear(N_IN, N_OUT)
    torch.manual_seed(0)
    theirs = nn.Linear(N_IN, N_OUT)
    assert isinstance(mine, nn.Linear)  # quantisers and adapters look for it
    assert repr(mine) == repr(theirs)
    theirs.load_state_dict(mine.state_dict())
    x = operands()[0]
    torch.testing.assert_close(mine(x), theirs(x), **TOLERANCE)
    assert len(calls) == 1


def test_the_compiler_meets_torchs_operator(calls):
    x, weight, bias = operands()
    compiled = torch.compile(linear, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, bias), F.linear(x, weight, bias), **TOLERANCE)
    assert not calls
