import copy
import pickle

import pytest
import torch
from torch import nn

from optlens.checkpoints.on_disk import OnDisk, StreamError
from optlens.weights import effective_bias, effective_weight

VALUES = torch.arange(6.0).view(2, 3)


@pytest.fixture
def weight() -> OnDisk:
    return OnDisk.make(
        "fc1.weight of block 3", VALUES.shape, torch.float32, VALUES.clone, VALUES.clone
    )


def test_it_has_the_shape_of_the_weight(weight):
    assert weight.shape == (2, 3) and weight.ndim == 2 and weight.numel() == 6 and len(weight) == 2
    assert weight.dtype == torch.float32 and weight.nbytes == 24 and weight.element_size() == 4
    assert weight.is_meta and not weight.requires_grad and weight.is_floating_point()
    assert len({weight, weight}) == 1


def test_its_values_are_read(weight):
    linear = nn.Linear(3, 2, device="meta")
    linear.weight, linear.bias = (
        weight,
        OnDisk.make("b", (2,), torch.float32, VALUES[:, 0].clone, None),
    )
    assert torch.equal(effective_weight(linear), VALUES)
    assert torch.equal(effective_bias(linear), VALUES[:, 0])
    assert torch.equal(weight.sample(), VALUES)


@pytest.mark.parametrize(
    "use",
    [
        lambda w: w + 1,
        lambda w: 1 - w,
        lambda w: torch.randn(4, 2) @ w,
        lambda w: torch.stack([torch.zeros(2, 3), w]),
        lambda w: nn.functional.linear(torch.zeros(1, 3), w),
        lambda w: w.zero_(),
        lambda w: w.data.zero_(),
        lambda w: w.T,
        lambda w: w[0],
        lambda w: w.__setitem__(0, 1.0),
        lambda w: setattr(w, "data", torch.zeros(2, 3)),
        lambda w: w.requires_grad_(),
        lambda w: w.detach(),
        lambda w: w.to("cpu"),
        lambda w: w.tolist(),
        lambda w: torch.equal(w, w),
        copy.copy,
        copy.deepcopy,
        pickle.dumps,
    ],
)
def test_computing_with_it_raises_and_names_it(weight, use):
    with pytest.raises(StreamError, match="fc1.weight of block 3 is on the disk and cannot be"):
        use(weight)


def test_freezing_it_changes_nothing(weight):
    assert weight.requires_grad_(False) is weight
