"""What a sweep says that it will cost, against operations counted by hand."""

import itertools

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from optlens import Scale
from optlens.patching import patch_sweep
from optlens.patching.plan import chunks_of
from optlens.patching.wave import Wave
from tests.patching.test_sweep import METRIC, make_model, make_prompts

CLEAN, CORRUPT = torch.tensor([[7, 8, 9, 10, 11, 12]]), torch.tensor([[13, 14, 15, 16, 17, 18]])
# of one token in one block: multiply-adds count two; 16 wide, 12 neurons, 6 keys
KEYS_VALUES, QUERY_AND_OUT = 2 * 2 * 16 * 16, 2 * 2 * 16 * 16
LOOKING, MLP = 2 * 2 * 16 * 6, 2 * 2 * 16 * 12
ATTENDING = QUERY_AND_OUT + LOOKING


def flops_of(site, layer, pos):
    model = make_model()
    chosen = {"layers": [layer], "positions": [pos]}
    plan = patch_sweep(
        model, CLEAN, CORRUPT, site, ("layer", "pos"), METRIC, dry_run=True, **chosen
    )
    assert plan.runs == 1
    return plan.flops


@pytest.mark.parametrize(
    ("site", "expected"),
    [
        ("resid_pre", KEYS_VALUES + ATTENDING + MLP),
        ("z", ATTENDING / 2 + MLP),
        ("attn_out", MLP),
        ("resid_mid", MLP),
        ("mlp_post", MLP / 2),
        ("mlp_out", 0),
        ("resid_post", 0),
    ],
)
def test_in_a_block_only_what_follows_the_site_is_computed(site, expected):
    assert flops_of(site, 2, -1) == expected
    # Three tokens are after the patch. In the first block that reads it, two of them have the queries,
    # keys and values they had; in the last block only one token goes past keys and values.
    before, here, new = flops_of(site, 1, 3), expected, 1
    if site == "resid_pre":
        here, new = KEYS_VALUES + 3 * (ATTENDING + MLP) - 2 * QUERY_AND_OUT / 2, 3
    assert before == here + new * KEYS_VALUES + ATTENDING + MLP


def test_later_blocks_compute_all_columns_from_the_patch_on():
    patched = ATTENDING / 2 + MLP
    following = KEYS_VALUES + 3 * (ATTENDING + MLP) - 2 * QUERY_AND_OUT / 2
    last = 3 * KEYS_VALUES + ATTENDING + MLP
    assert flops_of("z", 0, 3) == patched + following + last


def test_the_naive_count_is_of_whole_forward_passes():
    clean, corrupt, _, _ = make_prompts()
    plan = patch_sweep(make_model(), clean, corrupt, metric=METRIC, dry_run=True)
    assert plan.naive_flops == plan.naive_block_tokens * (KEYS_VALUES + ATTENDING + MLP)


def test_patches_that_start_in_one_block_run_together(monkeypatch):
    model, layers, run = make_model(), [], Wave.run
    monkeypatch.setattr("optlens.patching.plan.MOST_TOKENS", 12)
    monkeypatch.setattr(
        Wave, "run", lambda self, rows: layers.extend(row.layer for row in rows) or run(self, rows)
    )
    patch_sweep(model, CLEAN, CORRUPT, "z", ("pos", "layer"), METRIC, progress=False)
    assert len(set(layers)) == 3
    assert layers == sorted(layers)


def peak_bytes(function):
    """Return the most memory that tensors which a function makes take at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    events = recorded.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in changes))


@pytest.mark.parametrize(
    ("site", "over", "given"),
    [
        ("resid_pre", ("layer", "pos"), ()),
        ("mlp_post", ("layer", "pos"), ()),
        ("z", ("layer", "head"), ()),
        ("pattern", ("layer", "head"), ()),
        ("attn_scores", ("layer", "head"), ()),
        ("z", ("layer", "head"), [Scale("attn_scores", layer=1, factor=2)]),
        ("z", ("layer", "head"), [Scale("result", layer=1, factor=2)]),
    ],
)
@pytest.mark.parametrize("wide", [False, True])
def test_a_portion_takes_no_more_memory_than_was_estimated(site, over, given, wide, monkeypatch):
    """Tensors alone; of the rest that is planned for, the heap's gaps and oneDNN, this sees nothing."""
    shape = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 64} if wide else {}
    model = make_model(max_position_embeddings=64, **shape)
    prompts = [torch.randint(7, 40, (2, 48), generator=torch.manual_seed(n)) for n in (1, 2)]
    run, peaks, estimates = Wave.run, [], []

    def watched(self, rows):
        found = []
        peaks.append(peak_bytes(lambda: found.append(run(self, rows))))
        return found[0]

    def noted(*arguments):
        portions = list(chunks_of(*arguments))
        estimates.extend(size for _, size in portions)
        return portions

    monkeypatch.setattr(Wave, "run", watched)
    monkeypatch.setattr("optlens.patching.sweep.chunks_of", noted)
    patch_sweep(model, *prompts, site, over, METRIC, interventions=given, progress=False)
    assert len(peaks) == len(estimates) > 0
    for peak, estimate in zip(peaks, estimates, strict=True):
        assert 0.1 < peak / estimate < 1
    assert max(p / e for p, e in zip(peaks, estimates, strict=True)) > 0.2
