"""Sweeps under interventions, against one whole forward pass per patch under the same ones."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import optlens
from optlens import Ablate, Freeze, Knockout, Patch, Scale, Steer
from optlens.checks import InputError
from optlens.interventions.address import EDGES, SITES
from optlens.patching import PatchResult, ablate_sweep, knockout_sweep, patch_sweep
from optlens.patching.ablation import other_prompts
from optlens.patching.rows import rows_of
from optlens.patching.standing import StandingWave
from tests.patching.naive import naive_sweep
from tests.patching.test_sweep import (
    CASES,
    METRIC,
    VARIANTS,
    last_difference,
    make_model,
    make_prompts,
    padded_as_text,
)

OTHERS = torch.randint(7, 40, (4, 6), generator=torch.Generator().manual_seed(9))
SHORTER = torch.randint(7, 40, (4, 4), generator=torch.Generator().manual_seed(10))
KINDS = ("scale", "patch", "freeze", "zero", "mean", "resample")
SIZES = {"d_model": 16, "head": 4, "d_head": 4, "neuron": 12}


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def make(kind, site, where, others=OTHERS):
    """Make one intervention of a kind at a site, with fields that say where."""
    match kind:
        case "scale":
            return Scale(site, **where, factor=-1.5)
        case "patch":
            axes = [axis for axis in SITES[site] if axis in SIZES and axis not in where]
            return Patch(site, **where, value=numbers(*(SIZES[axis] for axis in axes[-1:])))
        case "freeze":
            return Freeze(site, **where, source=others[:1])
        case "mean":
            edges = SITES[site] == EDGES
            return Ablate(site, **where, mode="mean", reference=others, per_position=edges)
        case "resample":
            return Ablate(site, **where, mode="resample", reference=others)
    return Ablate(site, **where)


def everything(n_real=6):
    """Return a stack with all kinds at once; it does nothing that makes patches vain."""
    others = OTHERS if n_real == 6 else SHORTER
    return [
        Scale("embed", pos=1, factor=1.5),
        Steer(layer=0, vector=numbers(16), scale=0.3, start=2),
        Knockout(layers=[1], query=-1, key=2, heads=[1, 2]),
        Knockout(layers=2, query=1, key=[0, 1]),
        Ablate("z", layer=1, head=1, mode="mean", reference=others),
        Freeze("q", layer=2, head=3, pos=[1, -1], source=others[:1]),
        Patch("v", layer=0, pos=-2, head=[0, 2], value=numbers(2, 4)),
        Scale("pattern", layer=2, head=0, query=slice(2, None), factor=0.5),
        Ablate("mlp_post", layer=1, neuron=range(4), pos=-1, mode="resample", reference=OTHERS)
        if n_real == 6
        else Ablate("mlp_post", layer=1, neuron=range(4), pos=-1),
        Scale("result", layer=1, head=2, pos=slice(1, 4), factor=2.0),
        Scale("k", layer=1, pos=[0, -2], factor=1.3),
        Steer(layer=1, vector=numbers(16), scale=-0.2, site="resid_pre"),
        Scale("resid_mid", layer=2, pos=slice(1, None), factor=0.9),
    ]


def check(model, prompts, site, over, given, direction="denoise", window=1, spans=None, names=None):
    """Compare a sweep with the naive loop, in which interventions are attached before each patch."""
    clean, corrupt, mask, columns = prompts
    base, source = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
    with model.intervene(given, spans):
        naive = naive_sweep(
            model, base, source, mask, site, over, last_difference, columns, window=window
        )
        with torch.no_grad():
            ends = [
                last_difference(model(each, attention_mask=mask, use_cache=False).logits)
                for each in (clean, corrupt)
            ]
    result = patch_sweep(
        model,
        *(names or (clean, corrupt)),
        site,
        over,
        METRIC,
        direction,
        window=window,
        interventions=given,
        spans=spans,
        progress=False,
    )
    # float64; logits are of the order of ten
    torch.testing.assert_close(result.per_prompt, naive, atol=1e-10, rtol=1e-9)
    torch.testing.assert_close(result.clean_per_prompt, ends[0], atol=1e-10, rtol=1e-9)
    torch.testing.assert_close(result.corrupt_per_prompt, ends[1], atol=1e-10, rtol=1e-9)
    return result


@pytest.mark.parametrize(("variant", "direction"), [("pre-LN", "denoise"), ("350m", "noise")])
@pytest.mark.parametrize(("site", "over"), CASES)
def test_all_kinds_at_once_equal_a_whole_forward_pass(site, over, variant, direction):
    model = make_model(**VARIANTS[variant])
    result = check(model, make_prompts(), site, over, everything(), direction)
    assert result.per_prompt.std() > 1e-3  # patches do something


@pytest.mark.parametrize(("site", "over"), CASES[::2])
def test_left_padded_prompts(site, over, monkeypatch):
    model = make_model()
    clean, corrupt, mask, columns = make_prompts(padded=True)
    names = padded_as_text(model, monkeypatch, clean, corrupt, mask)
    given = [each for each in everything(4) if not isinstance(each, Freeze)]
    check(model, (clean, corrupt, mask, columns), site, over, given, names=names)


@pytest.mark.parametrize("variant", ["pre-LN", "350m"])
@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("site", ["resid_pre", "q", "k", "attn_scores", "pattern", "z", "mlp_out"])
def test_windows_of_blocks(site, window, variant):
    model = make_model(**VARIANTS[variant])
    check(model, make_prompts(), site, ("layer",), everything(), window=window)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", list(SITES))
def test_each_kind_at_each_site(at, kind):
    model = make_model()
    places = {"query": 3, "key": 1} if SITES[at] == EDGES else {"pos": [1, 4]}
    given = make(kind, at, places if at == "embed" else places | {"layer": [0, 2]})
    for site in ("resid_pre", "v", "attn_out"):
        check(model, make_prompts(), site, ("layer", "pos"), given)


@pytest.mark.parametrize("over", [("pos",), ("layer", "pos")])
def test_patched_embeddings_meet_interventions_on_what_the_first_block_reads(over):
    given = [Scale("resid_pre", layer=0, factor=0.5), Scale("embed", pos=[0, 4], factor=2)]
    site = "embed" if over == ("pos",) else "resid_pre"
    check(make_model(), make_prompts(), site, over, given)


def test_resampling_may_draw_another_prompt_for_each_of_a_pair():
    """No prompt is given its own values, so the draw depends on its tokens, at all positions."""
    model, (clean, corrupt, *rest) = make_model(), make_prompts()
    reference = torch.cat([clean, corrupt])
    given = [Ablate("resid_mid", layer=0, pos=0, mode="resample", reference=reference, seed=1)]
    with model.intervene(given):
        one, other = (
            model.run_with_cache(ids)[1]["resid_mid", 0][:, 0] for ids in (clean, corrupt)
        )
    assert not torch.equal(one, other)  # before the first token that differs
    check(model, (clean, corrupt, *rest), "resid_mid", ("layer", "pos"), given)


@st.composite
def somewhere(draw, site):
    """Draw a part of a site that is swept or edited."""
    places = st.sampled_from([None, 1, -1, [0, 3], slice(2, None), [-2, 2]])
    where = {} if site == "embed" else {"layer": draw(st.sampled_from([None, 0, 1, [0, 2], -1]))}
    for axis in ("query", "key") if SITES[site] == EDGES else ("pos",):
        where[axis] = draw(places)
    if "head" in SITES[site]:
        where["head"] = draw(st.sampled_from([None, 2, [0, 3]]))
    if "neuron" in SITES[site]:
        where["neuron"] = draw(st.sampled_from([None, 5, [0, 11]]))
    return where


@st.composite
def several(draw, padded):
    """Draw a list of interventions; of padded prompts none that needs others of equal lengths."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        kinds = ("scale", "patch", "zero") if padded else KINDS
        kind = draw(st.sampled_from([*kinds, "knockout", "steer"]))
        site = draw(st.sampled_from(list(SITES)))
        where = draw(somewhere(site))
        if kind == "knockout":
            where = draw(somewhere("pattern"))
            layers, heads = where.pop("layer"), where.pop("head")
            where["query"] = -1 if where["query"] is None else where["query"]
            found.append(Knockout(layers, **where, heads=heads))
        elif kind == "steer":
            vector, start = numbers(16), draw(st.sampled_from([0, 2, -2]))
            layer = draw(st.sampled_from([0, 2, None]))
            site = draw(st.sampled_from(["resid_pre", "resid_post", "attn_out"]))
            found.append(Steer(layer, vector, 0.5, site, start))
        else:
            found.append(make(kind, site, where))
    return found


@pytest.mark.parametrize("padded", [False, True])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_interventions_in_any_sweep(data, padded):
    variant = data.draw(st.sampled_from(["pre-LN", "350m", "no bias"]))
    site, over = data.draw(st.sampled_from(CASES))
    window = data.draw(st.sampled_from([1, 1, 2])) if "layer" in over else 1
    direction = data.draw(st.sampled_from(["denoise", "noise"]))
    given = data.draw(several(padded))
    model, prompts = make_model(**VARIANTS[variant]), make_prompts(padded)
    with pytest.MonkeyPatch.context() as patch:
        names = padded_as_text(model, patch, *prompts[:3]) if padded else None
        check(model, prompts, site, over, given, direction, window, names=names)


# ------------------------------------------------------------------------- the other sweeps


@pytest.mark.parametrize("mode", ["zero", "mean", "resample"])
@pytest.mark.parametrize(("site", "over"), [c for c in CASES[1::2] if c[0] != "attn_scores"])
def test_an_ablation_is_one_at_the_end_of_the_list(site, over, mode):
    model = make_model()
    prompts, others, _, columns = make_prompts()
    reference = torch.cat([others, prompts.flip(1)])
    by_position = site == "pattern"
    values = dict(model.run_with_cache(reference)[1])  # without the interventions
    drawn = other_prompts(prompts, reference, 0)

    def source(name):
        value = values[name]
        if mode == "resample":
            return value[drawn]
        mean = value.mean(0 if by_position else (0, 1), keepdim=True)
        return (mean if mode == "mean" else torch.zeros_like(mean)).expand(2, *value.shape[1:])

    with model.intervene(everything()):
        naive = naive_sweep(model, prompts, source, None, site, over, last_difference, columns)
    result = ablate_sweep(
        model,
        prompts,
        site,
        over,
        mode,
        None if mode == "zero" else reference,
        by_position and mode == "mean",
        METRIC,
        interventions=everything(),
        progress=False,
    )
    torch.testing.assert_close(result.per_prompt, naive, atol=1e-10, rtol=1e-9)


def test_an_ablation_sweep_equals_ablate():
    model = make_model()
    prompts, others, _, _ = make_prompts()
    options = {"mode": "mean", "reference": others}
    result = ablate_sweep(
        model, prompts, "z", **options, metric=METRIC, interventions=everything(), progress=False
    )
    with model.intervene([*everything(), Ablate("z", layer=2, head=3, **options)]):
        expected = METRIC.of(model, prompts)
    torch.testing.assert_close(result.per_prompt[2, 3], expected, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("window", [1, 2])
def test_a_knockout_is_one_after_the_interventions(window):
    model = make_model()
    prompts, _, _, _ = make_prompts()
    result = knockout_sweep(
        model,
        prompts,
        METRIC,
        queries=-1,
        keys=[0, 3] if False else None,
        over=("layer", "head", "key"),
        window=window,
        interventions=everything(),
        progress=False,
    )
    for layer, head, key in [(0, 1, 2), (1, 1, 2), (1, 3, 4), (2, 0, 0), (2, 2, 5)]:
        layers = range(max(0, layer - window // 2), min(3, layer - (-window // 2)))
        with model.intervene([*everything(), Knockout(layers, query=-1, key=key, heads=head)]):
            expected = METRIC.of(model, prompts)
        found = result.per_prompt[layer, head, key]
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-9)
    assert result.metadata["interventions"][0]["kind"] == "Scale"


# -------------------------------------------------------------------- where positions are meant


def worded_model():
    """Return the embedded model in float64, in which texts can be positions."""
    return optlens.load(dtype=torch.float64)


CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPT = "When Mary and John went to the store, Mary gave a drink to"


def check_words(given, spans=None, corrupt=CORRUPT):
    """Compare some patches of two prompts that are given as texts."""
    model = worded_model()
    metric = optlens.metrics.logit_diff(" Mary", " John")
    result = patch_sweep(
        model, CLEAN, corrupt, metric=metric, interventions=given, spans=spans, progress=False
    )
    cells = [(layer, pos) for layer in (0, 2, 4) for pos in range(len(result.choices["pos"]))]
    with model.intervene(given, spans):
        cache = model.run_with_cache(CLEAN)[1]
        for layer, pos in cells:

            def write(value, hook, pos=pos):
                value[:, pos] = cache[hook.name][:, pos]

            name = f"blocks.{layer}.hook_resid_pre"
            with torch.no_grad():
                logits = model.run_with_hooks(corrupt, fwd_hooks=[(name, write)])
            naive = logits[0, -1, [model.to_single_token(w) for w in (" Mary", " John")]]
            expected = float(naive[0] - naive[1])
            assert float(result.values[layer, pos]) == pytest.approx(expected, abs=1e-6, rel=1e-5)
    return result


def test_a_place_that_is_another_in_each_prompt_is_looked_up_in_each():
    # the last " Mary" is before the first difference in the clean prompt, and after it in the other
    result = check_words([Scale("resid_mid", layer=1, pos=(" Mary", -1), factor=0.2)])
    assert result.labels["pos"][3] == "3:  Mary"
    assert abs(float(result.values[2, 3]) - result.corrupt) > 1


def test_spans_name_positions():
    result = check_words([Knockout(query=-1, key="people")], {"people": [[2, 4]]})
    assert result.metadata["interventions"][0]["spans"] == {"people": [[2, 4]]}


def test_a_word_that_only_one_prompt_has_is_said_to_be_missing_there():
    model = worded_model()
    metric = optlens.metrics.logit_diff(" Mary", " John")
    given = [Ablate("z", layer=0, pos=(" John", 1))]
    with pytest.raises(InputError, match=r"In the corrupt prompts: .*occurs 1 times"):
        patch_sweep(model, CLEAN, CORRUPT, metric=metric, interventions=given)


# ----------------------------------------------------------------------- shortcuts stay in force


def test_patches_that_change_nothing_need_no_run_under_interventions_either():
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    pair = clean[:1], corrupt[:1]  # they differ in position 3 alone
    plain = patch_sweep(model, *pair, metric=METRIC, dry_run=True)
    given = [Ablate("z", layer=0, pos=1), Knockout(query=-1, key=0), Scale("q", factor=2)]
    plan = patch_sweep(model, *pair, metric=METRIC, interventions=given, dry_run=True)
    assert (plan.runs, plan.block_tokens) == (plain.runs, plain.block_tokens)
    assert plan.interventions == 3
    assert "without what the interventions compute" in str(plan)
    assert len(str(plan).splitlines()) == 4
    assert plain.interventions == 0
    assert "intervention" not in str(plain)
    # where both runs are held at the same values, a patch writes what is already there
    held = [Freeze("resid_mid", layer=1, source=OTHERS[:1])]
    plan = patch_sweep(
        model, *pair, "resid_mid", ("layer", "pos"), METRIC, interventions=held, dry_run=True
    )
    assert plan.runs < plain.runs
    result = check(model, make_prompts(), "resid_mid", ("layer", "pos"), held)
    assert result.per_prompt[1].std(0).max() == 0


def test_the_first_difference_counts_unless_interventions_go_by_tokens(monkeypatch):
    model, seen = make_model(), []
    clean, corrupt, _, _ = make_prompts()

    def noted(grid, base, sources, reads, equal_before):
        seen.append(equal_before)
        return rows_of(grid, base, sources, reads, equal_before)

    monkeypatch.setattr("optlens.patching.sweep.rows_of", noted)
    for these in (
        [Freeze("z", layer=0, source=OTHERS[:1]), Knockout(query=-1, key=0)],
        [Ablate("z", layer=0, mode="resample", reference=OTHERS)],
    ):
        patch_sweep(model, clean, corrupt, metric=METRIC, interventions=these, dry_run=True)
    assert seen[0].tolist() == [3, 1]
    assert seen[1] is None


def test_without_interventions_the_plain_engine_runs(monkeypatch):
    monkeypatch.setattr(StandingWave, "__init__", None)
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    result = patch_sweep(model, clean, corrupt, metric=METRIC, progress=False)
    assert "interventions" not in result.metadata


def test_what_interventions_need_counts_as_memory():
    model = make_model()
    clean, corrupt, _, _ = make_prompts()

    def plan(*given):
        options = {"metric": METRIC, "interventions": given, "dry_run": True}
        return patch_sweep(model, clean, corrupt, "z", ("layer", "head"), **options)

    few = plan(Scale("z", layer=0, head=0, factor=2)).bytes
    tokens = 2 * 12 * 5  # of two prompts in layer x head; the first differs late
    assert plan(Scale("result", layer=0, head=0, factor=2)).bytes > few + 100 * tokens
    assert plan(Scale("pattern", layer=0, head=0, factor=2)).bytes > few + 100 * tokens
    # what is held at takes as much as is recorded of it: in 3 layers 6 tokens of 12 numbers
    held = plan(Freeze("mlp_post", pos=0, source=OTHERS[:1]), Scale("z", layer=0, head=0, factor=2))
    assert held.bytes == few + 3 * 6 * 12 * 8


# --------------------------------------------------------------------- provenance and bad input


def test_the_result_says_what_stood_and_can_be_resumed(tmp_path, monkeypatch):
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    arguments = (model, clean, corrupt, "z", ("layer", "head"), METRIC)
    result = patch_sweep(*arguments, interventions=everything(), progress=False)
    assert [each["kind"] for each in result.metadata["interventions"]] == [
        type(each).__name__ for each in everything()
    ]
    result.save(tmp_path / "r.safetensors")
    loaded = PatchResult.load(tmp_path / "r.safetensors")
    loaded.per_prompt[1:] = torch.nan
    runs, run = [], StandingWave.run
    monkeypatch.setattr(
        StandingWave, "run", lambda self, rows: runs.extend(rows) or run(self, rows)
    )
    again = patch_sweep(*arguments, interventions=everything(), resume=loaded, progress=False)
    assert {row.cell.layers[0] for row in runs} == {1, 2}
    torch.testing.assert_close(again.per_prompt, result.per_prompt)
    with pytest.raises(InputError, match="another sweep"):
        patch_sweep(*arguments, interventions=everything()[1:], resume=loaded, progress=False)
    with pytest.raises(InputError, match="another sweep"):
        patch_sweep(*arguments, resume=loaded, progress=False)


def test_nothing_stays_attached_and_nothing_given_is_changed():
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    value = numbers(2, 6, 16)
    given = [Patch("resid_pre", layer=1, value=value), Patch("q", layer=2, value=numbers(4, 4))]
    for over in (("layer", "pos"), ("layer",)):
        patch_sweep(
            model, clean, corrupt, "resid_pre", over, METRIC, interventions=given, progress=False
        )
    assert torch.equal(value, numbers(2, 6, 16))
    # an ablation after it in a later block of its window writes to a copy
    given = [Patch("mlp_out", layer=1, value=value[0, 0])]
    where = {"site": "mlp_out", "over": ("layer", "pos"), "layers": [1], "positions": [-1]}
    for _ in range(2):
        ablate_sweep(
            model,
            clean[:1],
            **where,
            mode="zero",
            window=2,
            metric=METRIC,
            interventions=given,
            progress=False,
        )
        assert torch.equal(value, numbers(2, 6, 16))
    assert not any(point.listening for point in model.hook_dict.values())
    wrong = [Ablate("z", layer=0, pos=9)]
    with pytest.raises(InputError, match=r"In the clean prompts: .*position 9"):
        patch_sweep(model, clean, corrupt, metric=METRIC, interventions=wrong)
    assert not any(point.listening for point in model.hook_dict.values())


def test_the_results_of_heads_are_swept_at_z_or_not_at_all():
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    given = [Scale("result", layer=0, head=0, factor=2)]
    options = {"metric": METRIC, "interventions": given, "progress": False}
    for sweep in (
        lambda: patch_sweep(model, clean, corrupt, "result", ("layer", "head"), **options),
        lambda: ablate_sweep(model, clean, ["mlp_out", "result"], ("layer",), "zero", **options),
    ):
        with pytest.raises(InputError, match="Sweep 'z'"):
            sweep()
    given[0] = Scale("mlp_out", layer=0, factor=2)
    patch_sweep(model, clean, corrupt, "result", ("layer", "head"), **options)


def test_interventions_attached_from_outside_are_refused_with_the_way_to_give_them():
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    with (
        model.intervene(Ablate("z", layer=0, head=0)),
        pytest.raises(InputError, match=r"interventions=\["),
    ):
        patch_sweep(model, clean, corrupt, metric=METRIC, progress=False)


def test_interventions_in_a_sweep_by_portions(monkeypatch):
    monkeypatch.setattr("optlens.patching.plan.MOST_TOKENS", random.Random(0).randint(1, 9))
    model = make_model()
    check(model, make_prompts(), "k", ("layer", "head", "pos"), everything())
