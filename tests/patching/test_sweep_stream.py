"""Sweeps carried out bit by bit: the same numbers, whatever the portions and whatever goes wrong between."""

import warnings

import pytest
import torch

from optlens import Ablate, Scale
from optlens.checks import InputError
from optlens.patching import (
    PatchResult,
    SweepStream,
    ablate_sweep,
    causal_trace,
    knockout_sweep,
    patch_sweep,
)
from optlens.patching.stream import _next_goal
from optlens.patching.wave import Wave
from optlens.widgets import PatchingView
from tests.patching.test_sweep import METRIC, make_model, make_prompts

SHAPE = ("layer", "head", "pos")


def sweep(model, **options):
    clean, corrupt, _, _ = make_prompts()
    options = {"progress": False} | options
    return patch_sweep(model, clean, corrupt, "z", SHAPE, METRIC, **options)


def others(model):
    clean = make_prompts()[0]
    return {
        "ablation": lambda **more: ablate_sweep(model, clean, mode="zero", metric=METRIC, **more),
        "knockout": lambda **more: knockout_sweep(model, clean[:1], METRIC, keys=None, **more),
        "tracing": lambda **more: causal_trace(model, clean[:1], [1], METRIC, samples=2, **more),
    }


def finish(stream, seconds=1e-9):
    steps = 0
    while not stream.finished:
        stream.advance(seconds)
        steps += 1
    return steps


def test_small_portions_give_what_one_run_gives():
    model = make_model()
    whole, stream = sweep(model), sweep(model, stream=True)
    assert isinstance(stream, SweepStream) and stream.filled == []
    shares = [stream.share]
    while not stream.finished:
        stream.advance(1e-9)  # one patch at a time
        shares.append(stream.share)
    assert len(shares) > 40
    assert shares == sorted(set(shares)) and (shares[0], shares[-1]) == (0, 1)
    torch.testing.assert_close(stream.result.per_prompt, whole.per_prompt, rtol=1e-12, atol=1e-12)


def test_the_portions_of_memory_give_the_same_bits():
    model = make_model(torch.float32)
    whole, stream = sweep(model), sweep(model, stream=True)
    for result in stream:
        assert result is stream.result
    assert torch.equal(stream.result.per_prompt, whole.per_prompt)
    assert stream.finished and stream.share == 1 and stream.result.complete


@pytest.mark.parametrize("kind", ["ablation", "knockout", "tracing"])
def test_every_sweep_can_be_carried_out_bit_by_bit(kind):
    run = others(make_model())[kind]
    whole, stream = run(progress=False), run(stream=True)
    assert finish(stream) > 3
    torch.testing.assert_close(stream.result.per_prompt, whole.per_prompt, rtol=1e-12, atol=1e-12)


def test_what_was_filled_is_listed_in_its_order_and_has_numbers():
    stream = sweep(make_model(), stream=True)
    flat = stream.result.per_prompt.flatten(0, -2)
    at_once = set((~flat.isnan().any(-1)).nonzero().flatten().tolist())
    while not stream.finished:
        stream.advance(1e-9)
        known = set((~flat.isnan().any(-1)).nonzero().flatten().tolist())
        assert known == at_once | set(stream.filled)
    assert len(stream.filled) == len(set(stream.filled)) == len(flat) - len(at_once)


def test_a_portion_never_takes_more_than_memory_allows(monkeypatch):
    monkeypatch.setattr("optlens.patching.plan.MOST_TOKENS", 8)
    sizes, run = [], Wave.run
    monkeypatch.setattr(Wave, "run", lambda self, rows: sizes.append(len(rows)) or run(self, rows))
    stream = sweep(make_model(), stream=True)
    stream.advance(60.0)
    assert stream.finished
    assert max(sizes) <= 8


def test_portions_grow_until_they_last_as_long_as_asked_for(monkeypatch):
    clock = iter(range(10_000))  # each look at the clock takes a second
    monkeypatch.setattr("optlens.patching.stream.time.perf_counter", lambda: float(next(clock)))
    sizes, run = [], Wave.run
    monkeypatch.setattr(Wave, "run", lambda self, rows: sizes.append(len(rows)) or run(self, rows))
    stream = sweep(make_model(), stream=True)
    stream.advance(1000.0)
    assert sizes[0] <= 2  # one patch, of the prompts in which it changes something
    assert sizes[1] <= 3 * sizes[0] and max(sizes) > 10 * sizes[0]


def test_a_portion_that_lasts_too_long_is_followed_by_a_smaller_one():
    assert _next_goal(100.0, took=0.01, seconds=0.1) == 200.0
    assert _next_goal(100.0, took=0.12, seconds=0.1) == 100.0
    assert _next_goal(100.0, took=0.4, seconds=0.1) == 25.0


def test_an_error_loses_nothing_and_the_sweep_goes_on(monkeypatch):
    model = make_model()
    whole, stream = sweep(model), sweep(model, stream=True)
    stream.advance(1e-9)
    done, run = list(stream.filled), Wave.run

    def fail(self, rows):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Wave, "run", fail)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            stream.advance(1e-9)
    assert stream.filled == done
    monkeypatch.setattr(Wave, "run", run)
    finish(stream)
    torch.testing.assert_close(stream.result.per_prompt, whole.per_prompt)


@pytest.mark.parametrize("way", ["advance", "next"])
@pytest.mark.parametrize("change", ["in place", "one number", "behind torch's back", "dtype"])
def test_another_model_halfway_is_refused(change, way):
    model = make_model()
    stream = sweep(model, stream=True)
    stream.advance(1e-9)
    before = stream.result.per_prompt.clone()
    weight = model.decoder.layers[1].fc1.weight
    match change:
        case "in place":
            with torch.no_grad():
                weight.mul_(1.01)
        case "one number":
            with torch.no_grad():
                weight[3, 5] += 1e-9
        case "behind torch's back":
            weight.data.mul_(1.01)
        case "dtype":
            model.half()
    with pytest.raises(InputError, match="altered"):
        stream.advance(60.0) if way == "advance" else next(stream)
    assert torch.equal(stream.result.per_prompt.nan_to_num(), before.nan_to_num())


def test_hooks_halfway_are_refused_and_may_be_taken_off():
    model = make_model()
    whole, stream = sweep(model), sweep(model, stream=True)
    stream.advance(1e-9)
    with (
        model.intervene(Scale("z", layer=0, factor=0.0)),
        pytest.raises(InputError, match="Hook functions are attached"),
    ):
        stream.advance(60.0)
    finish(stream)
    torch.testing.assert_close(stream.result.per_prompt, whole.per_prompt)


def test_a_stream_goes_on_where_a_result_was_cut_short(tmp_path):
    model = make_model()
    whole, first = sweep(model), sweep(model, stream=True)
    for _ in range(10):
        first.advance(1e-9)
    first.result.save(tmp_path / "part.safetensors")
    part = type(whole).load(tmp_path / "part.safetensors")
    stream = sweep(model, stream=True, resume=part)
    assert stream.runs_done > first.runs_done - first.sweep.plan.runs  # they are not made again
    finish(stream)
    assert not set(stream.filled) & set(first.filled)
    torch.testing.assert_close(stream.result.per_prompt, whole.per_prompt)


@pytest.mark.parametrize("way", ["advance", "next", "whole", "view"])
def test_a_metric_that_gives_nan_has_been_computed(way, tmp_path, monkeypatch):
    """What is NaN by the metric is known: it is said once, counts as done and is not run again."""
    model, (clean, corrupt, _, _) = make_model(), make_prompts()

    def where_above(logits):
        found = logits[:, -1, 5] - logits[:, -1, 6]
        return torch.where(found > threshold, found, torch.nan)

    arguments = (model, clean, corrupt, "z", ("layer", "head"))
    truth = patch_sweep(*arguments, METRIC, progress=False)
    first, second = truth.per_prompt.flatten(0, -2).sort(0).values.T
    threshold = torch.stack([first[4:6].mean(), second[0] - 1.0])  # of each prompt, between values
    low = (truth.per_prompt <= threshold).any(-1)
    assert 0 < low.sum() < 12
    with pytest.warns(UserWarning, match=f"where_above.* for {int(low.sum())} of 12") as caught:
        if way == "whole":
            result = patch_sweep(*arguments, where_above, progress=False)
        else:
            stream = patch_sweep(*arguments, where_above, stream=True)
            result = stream.result
            match way:
                case "advance":
                    finish(stream)
                    stream.advance(1.0)
                case "next":
                    assert len(list(stream)) == 1
                case "view":
                    PatchingView(stream).run(progress=False)
            assert stream.finished
    assert [each.filename for each in caught] == [__file__]
    assert result.complete and not result.missing.any()
    assert torch.equal(result.undefined, low)
    assert torch.equal(result.per_prompt.isnan().any(-1), low)
    assert f"{int(low.sum())} NaN" in repr(result) and "not computed" not in repr(result)
    result.save(tmp_path / "r.safetensors")
    loaded = PatchResult.load(tmp_path / "r.safetensors")
    assert loaded.complete and torch.equal(loaded.undefined, low)
    page = result.show()._repr_html_()
    assert "Not complete" not in page
    monkeypatch.setattr(Wave, "run", lambda self, rows: pytest.fail("nothing is left to run"))
    with pytest.warns(UserWarning, match="where_above"):
        again = patch_sweep(*arguments, where_above, progress=False, resume=loaded)
    assert again.complete


def test_what_is_nan_without_being_run_is_known_and_said():
    clean, _, _, _ = make_prompts()

    def nothing(logits):
        return logits[:, -1, 0] * torch.nan

    with pytest.warns(UserWarning, match="for 12 of 12") as caught:
        result = patch_sweep(
            make_model(), clean, clean, "z", ("layer", "head"), nothing, progress=False
        )
    assert result.complete and len(caught) == 1


def test_nan_of_the_metric_and_what_is_missing_are_told_apart(tmp_path):
    clean, corrupt, _, _ = make_prompts()

    def nothing(logits):
        return logits[:, -1, 0] * torch.nan

    arguments = (make_model(), clean, corrupt, "z", SHAPE, nothing)
    stream = patch_sweep(*arguments, stream=True)
    for _ in range(5):
        stream.advance(1e-9)
    missing = stream.result.missing
    assert not stream.result.complete
    assert not missing.flatten()[stream.filled].any()
    assert int(missing.sum()) == sum(len(patches) > 0 for patches, _ in stream.sweep.patches) - 5
    assert f"{int(missing.sum())} not computed" in repr(stream.result)
    stream.result.save(tmp_path / "r.safetensors")
    loaded = PatchResult.load(tmp_path / "r.safetensors")
    assert torch.equal(loaded.missing, missing)
    rest = patch_sweep(*arguments, stream=True, resume=loaded)
    with pytest.warns(UserWarning, match=f"for {missing.numel()} of"):
        finish(rest)
    assert not set(rest.filled) & set(stream.filled) and rest.result.complete


@pytest.mark.parametrize("kind", ["patching", "ablation", "knockout", "tracing"])
def test_an_interrupt_is_said_at_the_callers_line_of_the_callers_patches(kind, monkeypatch):
    model = make_model()
    run = {"patching": lambda **more: sweep(model, **more)} | others(model)
    whole = run[kind](progress=False)
    carry_out, calls = Wave.run, []

    def run_twice(self, rows):
        calls.append(rows)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return carry_out(self, rows)

    monkeypatch.setattr("optlens.patching.plan.MOST_TOKENS", 1)
    monkeypatch.setattr(Wave, "run", run_twice)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        part = run[kind](progress=False)
    (said,) = caught
    assert said.filename == __file__
    assert 0 < int(part.missing.sum()) < whole.values.numel()
    told = f"{int(part.missing.sum())} of {whole.values.numel()} patches are missing"
    assert told in str(said.message)
    again = run[kind](progress=False, resume=part)
    torch.testing.assert_close(again.per_prompt, whole.per_prompt)


@pytest.mark.parametrize("kind", ["patching", "ablation", "knockout", "tracing"])
@pytest.mark.parametrize("given", ["result.safetensors", torch.zeros(2)], ids=["path", "tensor"])
def test_only_a_result_can_be_resumed(kind, given):
    model = make_model()
    run = {"patching": lambda **more: sweep(model, **more)} | others(model)
    for stream in (True, False):
        with pytest.raises(InputError, match="PatchResult.load"):
            run[kind](resume=given, stream=stream, **({} if stream else {"progress": False}))


def test_under_interventions_too():
    model = make_model()
    given = [Ablate("z", layer=0, head=1)]
    whole = sweep(model, interventions=given)
    stream = sweep(model, interventions=given, stream=True)
    finish(stream)
    torch.testing.assert_close(stream.result.per_prompt, whole.per_prompt, rtol=1e-12, atol=1e-12)
