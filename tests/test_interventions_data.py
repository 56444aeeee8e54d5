"""Interventions as data: printed, compared, saved and replayed, recorded as provenance; and what is refused."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TOL, random_model, tiny_config

import optlens
from optlens import Ablate, Freeze, Knockout, Patch, Scale, Steer
from optlens.checks import InputError
from optlens.interventions.address import SITES
from optlens.interventions.held import HeldRun

CLOSE = TOL[torch.float32]
IDS = torch.randint(3, 101, (2, 7), generator=torch.manual_seed(5))
NUMBERS = torch.randn(32, generator=torch.manual_seed(6))
MODEL = random_model(tiny_config())
# one of every kind, and every way to address
EVERY = [
    Patch("resid_post", layer=-1, pos=-1, value=NUMBERS),
    Patch("pattern", layer=0, head=range(2), query=slice(2, None, 2), key=[0, 1], value=0.25),
    Ablate("z", layer=1, head=2),
    Ablate("mlp_post", neuron=[1, 5], pos=range(1, 4), mode="mean", reference=IDS),
    Ablate("attn_scores", mode="mean", reference=IDS, per_position=True, key=0),
    Ablate("k", mode="resample", reference=IDS.flip(0), seed=3),
    Steer(layer=0, vector=NUMBERS, scale=-2.5, start=2),
    Steer(layer=0, vector=NUMBERS.double(), site="resid_mid", pos=[1, 2]),
    Scale("result", layer=slice(0, 1), head=-1, factor=0.5),
    Knockout(layers=range(2), query=-1, key=3, heads=[0, 3]),
    Freeze("attn_out", layer=1, source=IDS.flip(0)),
    Freeze("z", layer=0, source=MODEL.record(IDS.flip(0), what="z")),
]
# these need texts, so they are compared, not run
WORDS = [
    Scale("z", pos=" John", factor=2),
    Scale("z", pos=(" John", 1), factor=2),
    Scale("z", pos=[" John", 1], factor=2),
    Knockout(query="end", key=[(" John", 0), 2]),
    Ablate("z", mode="mean", reference=["A b", "C d e"]),
]


@pytest.mark.parametrize("each", [*EVERY, *WORDS], ids=repr)
def test_a_description_reads_as_the_intervention_itself(each: Any):
    kept = json.loads(json.dumps(optlens.interventions.describe(each)))
    assert optlens.interventions.in_words(kept) == repr(each)


def test_a_description_of_a_later_version_reads_as_its_name():
    assert optlens.interventions.in_words({"kind": "Rotate", "tensors": {}}) == "Rotate()"


def logits(each: Any) -> torch.Tensor:
    with torch.no_grad(), MODEL.intervene(each):
        return MODEL(IDS).logits


def exactly(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


# -------------------------------------------------------------------- printing and comparing


@pytest.mark.parametrize(
    ("each", "text"),
    [
        (EVERY[0], "Patch('resid_post', layer=-1, pos=-1, value=tensor[32] float32)"),
        (EVERY[1], "Patch('pattern', layer=0, head=[0, 1], value=0.25, query=slice(2, None, 2), key=[0, 1])"),
        (EVERY[3], "Ablate('mlp_post', neuron=[1, 5], pos=range(1, 4), mode='mean', reference=<2 prompts>)"),
        (EVERY[6], "Steer(layer=0, vector=tensor[32] float32, scale=-2.5, start=2)"),
        (EVERY[9], "Knockout(layers=[0, 1], query=-1, key=3, heads=[0, 3])"),
        (EVERY[10], "Freeze('attn_out', layer=1, source=<2 prompts>)"),
        (EVERY[11], "Freeze('z', layer=0, source=<blocks.0.attn.hook_z>)"),
        (WORDS[1], "Scale('z', pos=(' John', 1), factor=2)"),
        (Scale("post", layer=np.int64(2), factor=np.float64(0.5)), "Scale('mlp_post', layer=2, factor=0.5)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_they_print_as_the_call_that_makes_them(each, text):
    assert repr(each) == text


def test_equal_if_and_only_if_they_do_the_same():
    everything = EVERY + WORDS
    for i, one in enumerate(everything):
        for j, other in enumerate(everything):
            assert (one == other) == (i == j), (one, other)
    assert Scale("z", layer=range(3), factor=2) == Scale("z", layer=[0, 1, 2], factor=2.0)
    assert Scale("z", layer=torch.tensor([0, 1]), factor=2) == Scale("z", layer=(0, 1), factor=2)
    assert Patch("z", value=NUMBERS) == Patch("z", value=NUMBERS.clone())
    assert Patch("z", value=NUMBERS) != Patch("z", value=NUMBERS + 1)
    assert Patch("z", value=NUMBERS) != Patch("z", value=NUMBERS.double())
    assert Patch("z", value=NUMBERS) != Patch("z", value=1.0)
    assert Scale("z", factor=2) != Knockout(key=0) != "z"
    assert hash(Scale("z", factor=2)) == hash(Scale("z", factor=2.0))
    assert len(set(everything)) == len(everything)


def test_sites_have_the_short_names_of_hooks_too():
    others = {"pre": "mlp_pre", "post": "mlp_post", "scores": "attn_scores"}
    for other, site in others.items():
        assert Scale(other, factor=2) == Scale(site, factor=2)


def test_frozen_runs_are_equal_by_numbers_and_padding():
    name = "blocks.0.attn.hook_z"
    values, real = torch.ones(1, 7, 4, 8), torch.ones(1, 7, dtype=torch.bool)
    values[0, 0] = torch.nan
    other = real.clone()
    other[0, 0] = False

    def frozen(real, values=values):
        return Freeze("z", source=HeldRun({name: values.clone()}, real))

    assert frozen(real) == frozen(real.clone())  # NaN is what is there, and equal to itself
    assert frozen(real) != frozen(other)
    assert frozen(real) != frozen(None)
    assert frozen(real) != frozen(real, values.nan_to_num())


def test_they_cannot_be_changed():
    with pytest.raises(AttributeError):
        EVERY[0].layer = 3


# ---------------------------------------------------------------------- saving and replaying


def test_saved_and_loaded_they_are_equal_and_act_alike(tmp_path):
    path = tmp_path / "stack.safetensors"
    optlens.save_interventions(path, EVERY + WORDS)
    loaded = optlens.load_interventions(path)
    assert loaded == EVERY + WORDS
    assert list(map(repr, loaded)) == list(map(repr, EVERY + WORDS))
    exactly(logits(loaded[: len(EVERY)]), logits(EVERY))
    for one, other in zip(loaded, EVERY, strict=False):
        exactly(logits(one), logits(other))
    assert [p.name for p in tmp_path.iterdir()] == ["stack.safetensors"]


def test_a_single_one_and_none_are_saved_too(tmp_path):
    optlens.save_interventions(tmp_path / "one", Scale("z", factor=0))
    optlens.save_interventions(tmp_path / "none", [])
    assert optlens.load_interventions(tmp_path / "one") == [Scale("z", factor=0)]
    assert optlens.load_interventions(tmp_path / "none") == []


def test_files_that_hold_something_else_are_refused(tmp_path):
    MODEL.record(IDS, what="residual").save(tmp_path / "rec")
    with pytest.raises(ValueError, match="holds Recording, not a list of interventions"):
        optlens.load_interventions(tmp_path / "rec")
    with pytest.raises(FileNotFoundError, match="There is no file"):
        optlens.load_interventions(tmp_path / "missing")
    with pytest.raises(TypeError, match=r"Expected interventions .* got str"):
        optlens.save_interventions(tmp_path / "wrong", ["z"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rec"]


@pytest.mark.parametrize("facts", [{"format": 9, "interventions": []}, {"format": 1, "interventions": [{"kind": "Warp"}]}])  # fmt: skip
def test_a_file_of_a_later_version_is_refused(tmp_path, facts):
    optlens.files.write_tensors(tmp_path / "later", {}, {"kind": "list of interventions", **facts})
    with pytest.raises(ValueError, match="does not know; update it"):
        optlens.load_interventions(tmp_path / "later")


# --------------------------------------------------------------------------------- recording


def test_a_recording_is_of_the_edited_run_and_says_so(tmp_path):
    stack = [Steer(layer=0, vector=NUMBERS, pos="end"), Ablate("z", layer=1, head=2)]
    rec = MODEL.record(IDS, what=("residual", "z"), interventions=stack, spans={"end": -1})
    clean = MODEL.record(IDS, what=("residual", "z"))
    torch.testing.assert_close(rec.residual[:, 1, -1], clean.residual[:, 1, -1] + NUMBERS, **CLOSE)
    exactly(rec.residual[:, 1, :-1], clean.residual[:, 1, :-1])
    assert rec["z", 1][:, :, 2].abs().max() == 0
    assert clean.metadata["interventions"] == []
    rec.save(tmp_path / "rec")
    steer, ablate = optlens.Recording.load(tmp_path / "rec").metadata["interventions"]
    assert (steer["kind"], steer["pos"], ablate["head"]) == ("Steer", "end", 2)
    assert steer["spans"] == {"end": -1}
    assert "spans" not in ablate
    assert steer["tensors"]["vector"]["shape"] == [32]
    assert "blocks.1.attn.hook_z" in rec.metadata["edited_hooks"]
    torch.testing.assert_close(rec.logits, rec.model.unembed(rec.residual[:, -1]), **CLOSE)


def test_provenance_knows_outer_interventions_and_tells_tensors_apart():
    with MODEL.intervene(EVERY[0]), MODEL.intervene([EVERY[8], EVERY[2]]):
        rec = MODEL.record(IDS, what="residual", interventions=EVERY[11])
    told = rec.metadata["interventions"]
    assert [each["kind"] for each in told] == ["Patch", "Scale", "Ablate", "Freeze"]
    json.dumps(told)
    other = Patch("resid_post", layer=-1, pos=-1, value=NUMBERS + 1)
    again = MODEL.record(IDS, what="residual", interventions=[EVERY[0], other]).metadata
    same, different = again["interventions"]
    assert same == told[0] != different
    for dtype in (torch.bfloat16, torch.int64):
        Patch("z", value=torch.ones(3, dtype=dtype))
        optlens.interventions.describe(Patch("z", value=torch.ones(3, dtype=dtype)))


# ----------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Patch("resid", value=1), "There is no site 'resid'; there are embed, resid_pre"),
        (lambda: Patch("resid_post"), "needs value="),
        (lambda: Patch("resid_post", head=6, value=1), "'resid_post' has no axis 'head', got head=6.* q, k"),
        (lambda: Patch("z", neuron=6, value=1), "no axis 'neuron'.*have it: mlp_pre, mlp_post"),
        (lambda: Patch("pattern", pos=3, value=1), r"no axis 'pos'.*query= \(who looks\) and key="),
        (lambda: Patch("z", query=3, value=1), "no axis 'query'.*Its positions are pos="),
        (lambda: Patch("embed", layer=0, value=1), "no layer, got layer=0.*'resid_pre'"),
        (lambda: Patch("z", layer="3", value=1), "layer='3' is not one of: a whole number"),
        (lambda: Patch("z", layer=1.5, value=1), "layer=1.5 is not one of"),
        (lambda: Patch("z", pos=[True, False], value=1), "is not one of"),
        (lambda: Patch("z", pos=torch.tensor([0.5]), value=1), "is not one of"),
        (lambda: Patch("z", pos=[], value=1), r"pos=\(\) chooses nothing|pos=\[\] chooses nothing"),
        (lambda: Patch("z", pos=slice(0, 3, 0), value=1), "step of 0"),
        (lambda: Patch("z", value="x"), "value of Patch must be a number or a tensor, got str"),
        (lambda: Patch("z", value=torch.tensor([1.0, torch.nan])), "NaN or infinity"),
        (lambda: Patch("z", value=-torch.inf), "NaN or infinity"),
        (lambda: Ablate("z", mode="average"), "one of zero, mean, resample, got 'average'"),
        (lambda: Ablate("z", mode="mean"), "mean ablation needs reference="),
        (lambda: Ablate("z", mode="resample"), "resample ablation needs reference="),
        (lambda: Ablate("z", reference="A b"), "no use for a reference"),
        (lambda: Ablate("z", per_position=True), "goes with mode='mean'"),
        (lambda: Ablate("pattern", mode="mean", reference="A"), "no sense at 'pattern'.*per_position"),
        (lambda: Ablate("z", mode="mean", reference=[]), "list of texts.* that is empty"),
        (lambda: Ablate("z", mode="mean", reference=[3, 4]), "takes a text, a list of texts"),
        (lambda: Ablate("z", mode="mean", reference=torch.ones(3)), "whole numbers"),
        (lambda: Steer(layer=1), "needs vector="),
        (lambda: Steer(layer=1, vector=NUMBERS, start=1, pos=2), "start=1 or pos=2, not both"),
        (lambda: Steer(layer=1, vector=NUMBERS, start=slice(2)), "start must be one position"),
        (lambda: Steer(layer=1, vector=NUMBERS, site="pattern"), "has pairs of them"),
        (lambda: Steer(layer=1, vector=NUMBERS, scale=torch.nan), "scale of Steer has NaN"),
        (lambda: Scale("z"), "needs factor="),
        (lambda: Scale("z", factor=torch.inf), "NaN or infinity"),
        (lambda: Knockout(layers=3), "needs query=, key= or both"),
        (lambda: Freeze("z"), "needs source="),
        (lambda: Freeze("z", source=3), "source takes a text"),
    ],
)  # fmt: skip
def test_what_no_model_could_do_is_refused_at_once(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("each", "message"),
    [
        (Scale("z", layer=2, factor=0), "layer=2 asks for 2, but there are 2: 0 to 1, or -1 to -2"),
        (Scale("z", layer=[0, -3], factor=0), r"layer=\[0, -3\] asks for -3"),
        (Scale("z", layer=range(1, 40), factor=0), r"layer=range\(1, 40\) asks for 2"),
        (Scale("z", layer=slice(2, None), factor=0), "selects nothing; there are 2"),
        (Scale("z", head=4, factor=0), "head=4 asks for 4, but there are 4"),
        (Knockout(heads=[4], key=0), "asks for 4, but there are 4"),
        (Scale("mlp_post", neuron=64, factor=0), "neuron=64 asks for 64, but there are 64"),
        (Patch("resid_post", value=torch.ones(31)), r"shape \[31\]; at 'resid_post' it must broadcast to"),
        (Patch("z", value=torch.ones(9)), r"\[layer, batch, pos, head, d_head\] = \[2, batch, pos, 4, 8\]"),
        (Patch("mlp_pre", neuron=[1, 2], value=torch.ones(3)), r"\[2, batch, pos, 2\]"),
    ],
)  # fmt: skip
def test_what_this_model_cannot_do_is_refused_on_entering(each, message):
    with pytest.raises(InputError, match=message), MODEL.intervene(each):
        pytest.fail("entered")


@pytest.mark.parametrize(
    ("each", "message"),
    [
        (Patch("resid_post", pos=[1, 2], value=torch.ones(3, 32)), r"\[2, 2, 2, 32\]"),
        (Patch("resid_post", layer=0, value=torch.ones(3, 1, 32)), r"\[batch, pos, d_model\] = \[2, 7, 32\]"),
        (Patch("resid_post", layer=0, pos=1, value=torch.ones(3, 32)), r"\[batch, d_model\] = \[2, 32\]"),
        (Patch("resid_post", layer=0, pos=1, value=torch.ones(1, 2, 32)), r"\[batch, d_model\]"),
        (Patch("z", layer=0, head=3, value=torch.ones(4, 8)), r"\[batch, pos, d_head\] = \[2, 7, 8\]"),
        (Patch("mlp_pre", layer=0, neuron=3, value=torch.ones(5)), r"\[batch, pos\] = \[2, 7\]"),
        (Patch("pattern", layer=0, key=0, value=torch.ones(5)), r"\[batch, head, query\] = \[2, 4, 7\]"),
        (Steer(layer=0, vector=torch.ones(3, 32)), r"The vector of Steer\(layer=0.* has shape \[3, 32\]"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_prompt_is_refused_before_running(each, message):
    computed = []
    with pytest.raises(InputError, match=message), MODEL.intervene(each):
        MODEL.run_with_hooks(IDS, fwd_hooks=[("hook_embed", lambda x, hook: computed.append(hook))])
    assert computed == []


def test_only_interventions_are_taken():
    with pytest.raises(TypeError, match="Expected interventions .* got tuple"):
        with MODEL.intervene([("z", None)]):
            pytest.fail("entered")


def test_every_site_is_a_hook_of_the_axes_it_says():
    words = {"head": 4, "d_head": 8, "d_model": 32, "neuron": 64, "pos": 7, "query": 7, "key": 7}
    for site, axes in SITES.items():
        hooks = Scale(site, factor=1).address.hooks(MODEL.config)
        _, cache = MODEL.run_with_cache(IDS, names_filter=hooks)
        for hook in hooks:
            assert cache[hook].shape == (2, *(words[axis] for axis in axes)), hook


def test_the_front_names_every_kind():
    kinds = set(optlens.interventions.kinds.KINDS)
    assert kinds <= set(optlens.__all__)
    assert pathlib.Path(optlens.__file__).parent.name == "optlens"
