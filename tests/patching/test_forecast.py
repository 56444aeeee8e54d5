import pytest
import torch
from conftest import random_model, tiny_config

from optlens import metrics, patch_sweep
from optlens.config import OPTConfig
from optlens.patching.forecast import sweep_bytes

# They differ from the first token after </s> on.
CLEAN = torch.tensor([[2, *range(10, 28)]])
CORRUPT = torch.tensor([[2, *range(40, 58)]])
METRIC = metrics.logit_diff(5, 6)


@pytest.mark.parametrize(
    ("site", "over"),
    [
        ("resid_pre", ("layer", "pos")),
        ("z", ("layer", "head")),
        ("z", ("layer", "head", "pos")),
        ("mlp_post", ("layer", "pos")),
        ("attn_out", ("layer", "pos")),
        ("pattern", ("layer", "head")),
        ("embed", ("pos",)),
        (["attn_out", "mlp_out"], ("component", "layer", "pos")),
    ],
)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_the_dry_run(site, over, batch: int, dtype: torch.dtype):
    model = random_model(tiny_config(num_hidden_layers=3), dtype)
    prompts = CLEAN.expand(batch, -1), CORRUPT.expand(batch, -1)
    made = patch_sweep(model, *prompts, site, over, METRIC, dry_run=True)
    found, _ = sweep_bytes(model.config, 19, batch, dtype.itemsize, site, over)
    assert found == pytest.approx(made.bytes, rel=0.02)


@pytest.mark.parametrize("budget", [300_000, 500_000])
def test_budget_bounds_it_as_it_bounds_the_sweep(budget: int):
    model = random_model(tiny_config(num_hidden_layers=3))
    options = {"site": "resid_pre", "memory_budget": budget}
    made = patch_sweep(model, CLEAN, CORRUPT, metric=METRIC, dry_run=True, **options)
    found, gaps = sweep_bytes(model.config, 19, 1, 4, **options)
    assert found == pytest.approx(made.bytes, rel=0.02)
    assert found + gaps <= budget


def test_layers_that_tell_nothing_new_are_left_out(monkeypatch):
    """The answer for all layers is the answer for as many as fill some portions."""
    config = OPTConfig.from_name("opt-1.3b")
    short, _ = sweep_bytes(config, pos=200)
    monkeypatch.setattr("optlens.patching.forecast._telling_layers", lambda *given: None)
    assert sweep_bytes(config, pos=200)[0] == pytest.approx(short, rel=0.02)
