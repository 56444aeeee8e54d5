"""Sweeps against one whole forward pass per patch, in every site, axis, direction and variant."""

from dataclasses import replace

import pytest
import torch

import optlens
from optlens import OPTConfig, OPTForCausalLM, metrics
from optlens.checks import InputError, NonFiniteError
from optlens.patching import PatchResult, SweepPlan, ablate_sweep, patch_sweep
from optlens.patching.ablation import other_prompts
from optlens.patching.budget import portion_budget
from optlens.patching.plan import rounded_up
from optlens.patching.wave import Wave
from tests.patching.naive import SQUARE, naive_sweep

STREAM = [("layer", "pos"), ("layer",), ("pos",)]
HEADS = [("layer", "head"), ("layer", "head", "pos"), ("head",), ("pos", "layer")]
SQUARES = [
    ("layer", "head"),
    ("layer", "head", "pos"),
    ("layer", "head", "pos", "key"),
    ("layer", "key"),
    ("layer",),
]
NEURONS = [("layer", "pos"), ("layer", "neuron"), ("pos", "neuron"), ("layer",)]
CASES = [
    ("embed", ("pos",)),
    *((s, a) for s in ("resid_pre", "resid_mid", "resid_post") for a in STREAM),
    *((s, a) for s in ("attn_out", "mlp_out") for a in STREAM),
    *((s, a) for s in ("q", "k", "v", "z") for a in HEADS),
    *((s, a) for s in SQUARE for a in SQUARES),
    *((s, a) for s in ("mlp_pre", "mlp_post") for a in NEURONS),
]
VARIANTS = {
    "pre-LN": {},
    "350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 8},
    "no final norm, gelu": {"_remove_final_layer_norm": True, "activation_function": "gelu"},
    "no bias": {"enable_bias": False, "layer_norm_elementwise_affine": False},
}
METRIC = metrics.logit_diff(5, 6)


def make_model(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    shape = {
        "vocab_size": 40,
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "num_attention_heads": 4,
        "ffn_dim": 12,
        "num_hidden_layers": 3,
        "max_position_embeddings": 32,
        "init_std": 0.5,
    }
    model = OPTForCausalLM(OPTConfig(**(shape | changes))).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def make_prompts(padded=False):
    """Two pairs of prompts; the first differs late in one token, the second in two."""
    clean = torch.randint(7, 40, (2, 6), generator=torch.Generator().manual_seed(1))
    corrupt = clean.clone()
    corrupt[0, 3], corrupt[1, 1], corrupt[1, 4] = 4, 5, 6
    mask = None
    columns = torch.arange(6).expand(2, -1)
    if padded:
        mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
        clean[0, :2] = corrupt[0, :2] = 1
        columns = torch.tensor([[2, 3, 4, 5], [2, 3, 4, 5]])  # the last four of each
    return clean, corrupt, mask, columns


def last_difference(logits):
    return logits[:, -1, 5] - logits[:, -1, 6]


def padded_as_text(model, monkeypatch, clean, corrupt, mask):
    """Let two stand-ins for lists of texts tokenise to padded batches, as texts would."""
    prepared = {"clean": (clean, mask), "corrupt": (corrupt, mask)}
    make = type(model).inputs_on_host
    monkeypatch.setattr(
        model,
        "inputs_on_host",
        lambda given, *a, **k: (
            prepared.get(given) if isinstance(given, str) else make(model, given, *a, **k)
        ),
    )
    return "clean", "corrupt"


@pytest.mark.parametrize(
    ("variant", "direction"),
    [
        ("pre-LN", "denoise"),
        ("pre-LN", "noise"),
        ("350m", "denoise"),
        ("350m", "noise"),
        ("no final norm, gelu", "denoise"),
        ("no bias", "noise"),
    ],
)
@pytest.mark.parametrize(("site", "over"), CASES)
def test_every_patch_equals_a_whole_forward_pass(site, over, direction, variant):
    model = make_model(**VARIANTS[variant])
    clean, corrupt, _, columns = make_prompts()
    base, source = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
    expected = naive_sweep(model, base, source, None, site, over, last_difference, columns)
    result = patch_sweep(model, clean, corrupt, site, over, METRIC, direction, progress=False)
    assert result.axes == over
    assert expected.std() > 1e-3  # patches do something
    # float64; logits are of the order of ten
    torch.testing.assert_close(result.per_prompt, expected, atol=1e-11, rtol=1e-9)
    torch.testing.assert_close(result.values, expected.mean(-1), atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize(("site", "over"), CASES)
def test_left_padded_prompts(site, over, monkeypatch):
    model = make_model()
    clean, corrupt, mask, columns = make_prompts(padded=True)
    expected = naive_sweep(model, corrupt, clean, mask, site, over, last_difference, columns)
    names = padded_as_text(model, monkeypatch, clean, corrupt, mask)
    result = patch_sweep(model, *names, site, over, METRIC, progress=False)
    torch.testing.assert_close(result.per_prompt, expected, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize(("site", "over"), [c for c in CASES if "layer" in c[1]])
def test_windows_of_layers(site, over, window):
    model = make_model(num_hidden_layers=4)
    clean, corrupt, _, columns = make_prompts()
    expected = naive_sweep(
        model, corrupt, clean, None, site, over, last_difference, columns, window
    )
    result = patch_sweep(model, clean, corrupt, site, over, METRIC, window=window, progress=False)
    torch.testing.assert_close(result.per_prompt, expected, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize(("site", "over"), CASES)
def test_a_callable_reads_all_logits_of_all_prompts(site, over):
    model = make_model()
    clean, corrupt, _, columns = make_prompts()

    def measure(logits):
        return logits[:, :, 5].mean(1) - logits[:, -2, 6].square()

    expected = naive_sweep(model, corrupt, clean, None, site, over, measure, columns)
    result = patch_sweep(model, clean, corrupt, site, over, measure, progress=False)
    torch.testing.assert_close(result.per_prompt, expected, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize(
    "metric",
    [
        metrics.kl(),
        metrics.prob(5),
        metrics.rank(5),
        metrics.cross_entropy(),
        metrics.logit(5, pos=-3),
    ],
    ids=str,
)
def test_every_metric_is_that_of_the_logits(metric):
    model = make_model()
    clean, corrupt, _, columns = make_prompts()
    clean_logits = model(clean).logits.detach()

    def measure(logits):
        bound = metric.bind(model, corrupt)
        rows = torch.arange(2)[:, None]
        if bound.needs_clean:
            bound = bound.with_clean(clean_logits[rows, bound.columns])
        return bound(logits[rows, bound.columns])

    over = ("layer", "pos")
    expected = naive_sweep(model, corrupt, clean, None, "resid_mid", over, measure, columns)
    result = patch_sweep(model, clean, corrupt, "resid_mid", over, metric, progress=False)
    torch.testing.assert_close(result.per_prompt, expected, atol=1e-10, rtol=1e-9)
    assert result.clean == pytest.approx(float(measure(clean_logits).double().mean()))


def test_float32_is_within_1e4_of_the_logit_scale():
    model = make_model(torch.float32, num_hidden_layers=6)
    clean, corrupt, _, columns = make_prompts()
    scale = float(model(clean).logits.detach().abs().max())
    for site, over in CASES:
        expected = naive_sweep(model, corrupt, clean, None, site, over, last_difference, columns)
        result = patch_sweep(model, clean, corrupt, site, over, METRIC, progress=False)
        assert result.values.dtype == torch.float32
        assert (result.per_prompt - expected).abs().max() < 1e-4 * scale, site


def test_several_sites_are_an_axis():
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    sites = ["resid_pre", "attn_out", "mlp_out"]
    together = patch_sweep(model, clean, corrupt, sites, ("layer", "pos"), METRIC, progress=False)
    assert together.axes == ("component", "layer", "pos")
    assert together.labels["component"] == sites
    for number, site in enumerate(sites):
        alone = patch_sweep(model, clean, corrupt, site, ("layer", "pos"), METRIC, progress=False)
        torch.testing.assert_close(together.values[number], alone.values)


def test_what_a_head_writes_is_its_z():
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    over = ("layer", "head")
    z, result = (
        patch_sweep(model, clean, corrupt, s, over, METRIC, progress=False) for s in ("z", "result")
    )
    assert torch.equal(z.values, result.values)


def test_chosen_layers_heads_and_positions_are_parts_of_the_whole():
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    over = ("layer", "head", "pos")
    whole = patch_sweep(model, clean, corrupt, "z", over, METRIC, progress=False)
    part = patch_sweep(
        model,
        clean,
        corrupt,
        "z",
        over,
        METRIC,
        layers=[-1, 0],
        heads=[2],
        positions=[-1, 3],
        progress=False,
    )
    torch.testing.assert_close(part.values, whole.values[[2, 0]][:, [2]][:, :, [5, 3]])
    assert part.choices == {"layer": [2, 0], "head": [2], "pos": [5, 3]}


def test_the_ends_are_reached():
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    everything = patch_sweep(model, clean, corrupt, "resid_pre", ("layer",), METRIC, progress=False)
    torch.testing.assert_close(everything.values, torch.full((3,), everything.clean).double())
    torch.testing.assert_close(everything.normalized, torch.ones(3).double())
    last = patch_sweep(
        model, clean, corrupt, "resid_post", ("layer", "pos"), METRIC, progress=False
    )
    assert float(last.normalized[-1, -1]) == pytest.approx(1.0)
    assert float(last.normalized[-1, 0]) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("mode", ["zero", "mean", "resample"])
@pytest.mark.parametrize(("site", "over"), [c for c in CASES if c[0] not in ("attn_scores",)])
def test_ablation_equals_a_whole_forward_pass(site, over, mode):
    model = make_model()
    prompts, others, _, columns = make_prompts()
    reference = torch.cat([others, prompts.flip(1)])
    per_position = site == "pattern"

    def source(name):
        values = model.run_with_cache(reference, [name])[1][name]
        if mode == "zero":
            return torch.zeros_like(values[:2])
        if mode == "resample":
            chosen = [reference.tolist().index(row) for row in used]
            return values[chosen]
        axes = (0,) if per_position else (0, 1)
        mean = values.mean(axes, keepdim=True)
        return mean.expand(2, *values.shape[1:])

    result = ablate_sweep(
        model,
        prompts,
        site,
        over,
        mode,
        None if mode == "zero" else reference,
        per_position and mode == "mean",
        METRIC,
        progress=False,
    )
    used = reference[other_prompts(prompts, reference, 0)].tolist()
    expected = naive_sweep(model, prompts, source, None, site, over, last_difference, columns)
    torch.testing.assert_close(result.per_prompt, expected, atol=1e-11, rtol=1e-9)
    assert result.clean == pytest.approx(float(last_difference(model(prompts).logits).mean()))


@pytest.mark.parametrize("site", ["resid_pre", "k", "z", "mlp_post"])
def test_ablation_of_left_padded_prompts(site, monkeypatch):
    model = make_model()
    clean, corrupt, mask, columns = make_prompts(padded=True)
    expected = naive_sweep(
        model,
        clean,
        lambda name: torch.zeros_like(model.run_with_cache(clean, [name])[1][name]),
        mask,
        site,
        ("layer",),
        last_difference,
        columns,
    )
    name, _ = padded_as_text(model, monkeypatch, clean, corrupt, mask)
    result = ablate_sweep(model, name, site, ("layer",), "zero", metric=METRIC, progress=False)
    torch.testing.assert_close(result.per_prompt, expected, atol=1e-11, rtol=1e-9)
    runs = ablate_sweep(
        model, name, site, ("layer", "pos"), "zero", metric=METRIC, positions=[-4], dry_run=True
    )
    assert runs.runs <= 3 * 2


# --------------------------------------------------------------------- what is not computed


def test_patches_before_the_first_difference_need_no_run():
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    plan = patch_sweep(model, clean[:1], corrupt[:1], metric=METRIC, dry_run=True)
    assert isinstance(plan, SweepPlan)
    assert plan.patches == 18
    # positions 3, 4, 5 in three layers; but what block 0 reads at 4 and 5 is the same token
    assert plan.runs == 3 * 3 - 2
    # started in block 0, 1 and 2: all tokens from the patch on, in the last block only one
    assert plan.block_tokens == (3 + 3 + 1) + (3 + 2 + 1 + 3) + 3
    assert plan.naive_block_tokens == 18 * 6 * 3
    assert plan.flops < plan.naive_flops / 10


def test_equal_prompts_need_no_run_at_all():
    model = make_model()
    clean, _, _, _ = make_prompts()
    plan = patch_sweep(model, clean, clean, metric=METRIC, dry_run=True)
    assert plan.runs == 0
    assert "18" in str(plan) or "36" in str(plan)
    assert "\n0 portions, " in str(plan) and "\n1 portion, " in str(replace(plan, chunks=1))
    assert len(str(plan).splitlines()) == 4


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("padded", [False, True])
def test_short_prompts_are_recorded_in_one_pass_and_long_ones_in_two(
    direction, padded, monkeypatch
):
    model = make_model()
    clean, corrupt, mask, _ = make_prompts(padded)
    names = (clean, corrupt)
    if padded:
        names = padded_as_text(model, monkeypatch, clean, corrupt, mask)
    passes, found, run = [], {}, type(model).run_with_cache
    monkeypatch.setattr(
        model, "run_with_cache", lambda *a, **k: (passes.append(len(a[0])), run(model, *a, **k))[1]
    )
    for few in (12, 11):
        monkeypatch.setattr("optlens.patching.base_run.FEW_TOKENS", few)
        found[few] = patch_sweep(
            model, *names, ["resid_pre", "z"], ("component", "layer"), METRIC, direction, progress=False
        )  # fmt: skip
    assert passes == [4, 2, 2]
    for kind in ("per_prompt", "clean", "corrupt"):
        short, long = (getattr(result, kind) for result in found.values())
        torch.testing.assert_close(short, long, rtol=1e-11, atol=1e-11)
    assert abs(found[12].clean - found[12].corrupt) > 1e-3


# ------------------------------------------------------------------- results as they come


def test_small_portions_give_the_same_numbers(monkeypatch):
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    whole = patch_sweep(model, clean, corrupt, "z", ("layer", "head"), METRIC, progress=False)
    monkeypatch.setattr("optlens.patching.plan.MOST_TOKENS", 1)
    plan = patch_sweep(model, clean, corrupt, "z", ("layer", "head"), METRIC, dry_run=True)
    assert plan.chunks == 12
    growing = patch_sweep(model, clean, corrupt, "z", ("layer", "head"), METRIC, stream=True)
    missing = [int(result.per_prompt.isnan().sum()) for result in growing]
    assert missing == sorted(missing, reverse=True)
    assert missing[0] > 0
    assert missing[-1] == 0
    last = patch_sweep(model, clean, corrupt, "z", ("layer", "head"), METRIC, progress=False)
    torch.testing.assert_close(last.per_prompt, whole.per_prompt)


def test_an_interrupted_sweep_returns_what_it_has_and_can_go_on(monkeypatch):
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    arguments = (model, clean, corrupt, "z", ("layer", "head"), METRIC)
    whole = patch_sweep(*arguments, progress=False)
    monkeypatch.setattr("optlens.patching.plan.MOST_TOKENS", 1)
    run, calls = Wave.run, []

    def run_thrice(self, rows):
        calls.append(rows)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return run(self, rows)

    monkeypatch.setattr(Wave, "run", run_thrice)
    with pytest.warns(UserWarning, match="resume="):
        part = patch_sweep(*arguments, progress=False)
    assert not part.complete
    assert int(part.per_prompt.isnan().sum()) == whole.per_prompt.numel() - 3 * 2
    calls.clear()
    monkeypatch.setattr(Wave, "run", lambda self, rows: calls.append(rows) or run(self, rows))
    again = patch_sweep(*arguments, progress=False, resume=part)
    assert len(calls) == 12 - 3
    torch.testing.assert_close(again.per_prompt, whole.per_prompt)
    with pytest.raises(InputError, match="another sweep"):
        patch_sweep(model, clean, corrupt, "q", ("layer", "head"), METRIC, resume=part)


def test_a_memory_budget_that_is_too_small_says_so_before_running():
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    with pytest.raises(MemoryError, match="recorded runs take"):
        patch_sweep(model, clean, corrupt, metric=METRIC, memory_budget=1000)


def test_under_a_budget_numbers_of_tokens_are_rounded_to_few(monkeypatch):
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    seen = []

    def note(tokens: int, sparing: bool) -> int:
        seen.append(sparing)
        return rounded_up(tokens, sparing)

    monkeypatch.setattr("optlens.patching.wave.rounded_up", note)
    free = patch_sweep(model, clean, corrupt, metric=METRIC, progress=False)
    assert seen and not any(seen)
    seen.clear()
    tight = patch_sweep(model, clean, corrupt, metric=METRIC, memory_budget=10**9, progress=False)
    assert seen and all(seen)
    torch.testing.assert_close(free.per_prompt, tight.per_prompt)


@pytest.mark.parametrize(("sparing", "in_an_octave"), [(False, 32), (True, 4)])
def test_numbers_of_tokens_are_rounded_up(sparing: bool, in_an_octave: int):
    rounded = {n: rounded_up(n, sparing) for n in range(1, 4097)}
    assert all(n <= to <= n * (1 + 1 / in_an_octave) for n, to in rounded.items())
    assert len({to for to in rounded.values() if 1024 < to <= 2048}) == in_an_octave


def test_a_memory_budget_holds_one_patch_of_all_prompts(monkeypatch):
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    arguments = (model, clean, corrupt, "z", ("layer", "head"), METRIC)
    needs = []

    def note(given, recorded, compiled, largest, *rest):
        needs.append((recorded, largest))
        return portion_budget(given, recorded, compiled, largest, *rest)

    monkeypatch.setattr("optlens.patching.sweep.portion_budget", note)
    free = patch_sweep(*arguments, dry_run=True)
    alone = patch_sweep(model, clean[:1], corrupt[:1], *arguments[3:], dry_run=True)
    (recorded, largest), (_, of_one) = needs
    assert of_one < largest
    assert alone.runs < free.runs
    tight = patch_sweep(*arguments, memory_budget=recorded + largest, dry_run=True)
    assert tight.bytes <= recorded + largest
    assert tight.chunks > free.chunks
    with pytest.raises(MemoryError, match="one patch"):
        patch_sweep(*arguments, memory_budget=recorded + largest - 1, progress=False)


# ----------------------------------------------------------------------------- the result


def test_a_result_is_saved_and_loaded(tmp_path):
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    result = patch_sweep(model, clean, corrupt, metric=METRIC, progress=False)
    result.save(tmp_path / "r.safetensors")
    loaded = PatchResult.load(tmp_path / "r.safetensors")
    assert torch.equal(loaded.per_prompt, result.per_prompt)
    assert (loaded.axes, loaded.labels, loaded.choices) == (
        result.axes,
        result.labels,
        result.choices,
    )
    assert loaded.metadata == result.metadata
    assert repr(loaded) == repr(result)


def test_the_interval_covers_the_mean_and_narrows_with_its_level():
    values = (
        torch.randn(3, 40, generator=torch.Generator().manual_seed(0)) + torch.arange(3)[:, None]
    )
    result = PatchResult(values, values[0], values[0], ("layer",), {"layer": list("012")}, {})
    low, high = result.interval()
    assert ((low < result.values) & (result.values < high)).all()
    # the normal approximation of a mean of forty values
    assert (high - low).mean() == pytest.approx(2 * 1.96 / 40**0.5, rel=0.25)
    narrow_low, narrow_high = result.interval(0.5)
    assert ((narrow_high - narrow_low) < (high - low)).all()
    alone = PatchResult(values[:, :1], values[0], values[0], ("layer",), {"layer": list("012")}, {})
    with pytest.raises(InputError, match="several"):
        alone.interval()


# ------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"site": "resid"}, "there are embed"),
        ({"over": ("layer", "head")}, "axes pos, d_model.*have it: q, k, v"),
        ({"memory_budget": "1GB"}, "a number of bytes"),
        ({"over": ("layer", "layer")}, "each once"),
        ({"over": ()}, "at least one"),
        ({"over": ("blocks",)}, "the axes are"),
        ({"layers": [3]}, "0 to 2"),
        ({"layers": []}, "selects nothing"),
        ({"positions": [6]}, "0 to 5"),
        ({"heads": [0]}, "add it"),
        ({"direction": "forward"}, "'denoise' or 'noise'"),
        ({"window": 0}, "at least one layer"),
        ({"metric": None}, "what to measure"),
        ({"site": "embed"}, "not in every layer"),
    ],
)
def test_bad_arguments_say_what_would_be_right(changes, message):
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    with pytest.raises(InputError, match=message):
        patch_sweep(model, clean, corrupt, **({"metric": METRIC, "progress": False} | changes))


def test_prompts_of_unequal_length_are_shown_as_tokens():
    model = optlens.load()
    with pytest.raises(InputError, match=r"(?s)4 and 5 tokens.* Mary.* gave"):
        patch_sweep(model, "Then Mary left", "Then Mary gave it", metric=METRIC)
    with pytest.raises(InputError, match="2 clean and 1 corrupt"):
        patch_sweep(model, ["a", "a"], ["a"], metric=METRIC)


def test_hooks_that_edit_are_refused_and_recorders_left_alone():
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    with (
        model.hooks([("blocks.0.attn.hook_z", lambda value, hook: value * 2)]),
        pytest.raises(InputError, match=r"blocks\.0\.attn\.hook_z.*reset_hooks"),
    ):
        patch_sweep(model, clean, corrupt, metric=METRIC, progress=False)


def test_a_model_in_training_mode_is_swept_without_dropout_and_stays_in_it():
    model = make_model(dropout=0.5)
    clean, corrupt, _, _ = make_prompts()
    calm = patch_sweep(model, clean, corrupt, metric=METRIC, progress=False)
    model.train()
    result = patch_sweep(model, clean, corrupt, metric=METRIC, progress=False)
    assert model.training
    assert torch.equal(result.values, calm.values)
    frozen = model.decoder.layers[0].eval()  # a part that its user has switched by itself
    patch_sweep(model, clean, corrupt, metric=METRIC, progress=False)
    assert model.training
    assert not frozen.training


def test_values_that_are_not_finite_are_named():
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    with torch.no_grad():
        model.decoder.layers[1].fc1.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="block 1"):
        patch_sweep(model, clean, corrupt, metric=METRIC, progress=False)


def test_ablation_needs_a_reference_and_equal_lengths():
    model = make_model()
    prompts, others, _, _ = make_prompts()
    with pytest.raises(InputError, match="reference"):
        ablate_sweep(model, prompts, mode="mean", metric=METRIC)
    with pytest.raises(InputError, match="equally long"):
        ablate_sweep(model, prompts, mode="resample", reference=others[:, :4], metric=METRIC)
    with pytest.raises(InputError, match="there are zero"):
        ablate_sweep(model, prompts, mode="off", metric=METRIC)
    with pytest.raises(InputError, match="prompt 0 itself"):
        ablate_sweep(model, prompts, mode="resample", reference=prompts[:1], metric=METRIC)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "zero", "reference": "given"}, "no use for a reference"),
        ({"mode": "zero", "per_position": True}, "goes with mode='mean'"),
        ({"mode": "resample", "reference": "given", "per_position": True}, "goes with mode='mean'"),
    ],
)
def test_what_an_ablation_would_ignore_is_refused(options, message):
    model = make_model()
    prompts, reference, _, _ = make_prompts()
    options = options | ({"reference": reference} if "reference" in options else {})
    with pytest.raises(InputError, match=message):
        ablate_sweep(model, prompts, metric=METRIC, progress=False, **options)
