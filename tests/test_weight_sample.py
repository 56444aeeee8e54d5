import pytest
import torch

from optlens.weight_sample import weight_sample


@pytest.mark.parametrize("shape", [(4, 4), (3, 12), (12, 3), (5, 7), (7, 5), (1, 6)])
def test_every_row_and_every_column_is_met(shape: tuple[int, int]):
    rows = torch.arange(shape[0]).unsqueeze(1).expand(shape)
    columns = torch.arange(shape[1]).expand(shape)
    assert set(weight_sample(rows).tolist()) == set(range(shape[0]))
    assert set(weight_sample(columns).tolist()) == set(range(shape[1]))
    assert len(weight_sample(rows)) == max(shape)


def test_places_depend_on_the_shape_alone():
    """A quantised weight takes row numbers and codes from two calls."""
    weight = torch.randn(6, 18)
    rows = weight_sample(torch.arange(6).unsqueeze(1).expand(6, 18))
    columns = weight_sample(torch.arange(18).expand(6, 18))
    assert torch.equal(weight_sample(weight), weight[rows, columns])


def test_a_vector_is_returned_whole():
    vector = torch.arange(5)
    assert torch.equal(weight_sample(vector), vector)
