"""Path patching against the NumPy reference, which runs the protocol step by step."""

import pytest
import torch

import optlens
from optlens import metrics
from optlens.checks import InputError
from optlens.patching import patch_sweep, path_patch
from optlens.patching.path_wave import PathWave
from tests.patching.test_sweep import (
    METRIC,
    VARIANTS,
    last_difference,
    make_model,
    make_prompts,
    padded_as_text,
)
from tests.reference_opt import reference_forward

# float64; logits are of the order of ten
EXACT = {"atol": 1e-11, "rtol": 1e-9}
ALL_HEADS = [[(layer, head)] for layer in range(3) for head in range(4)]
ALL_MLPS = [[(layer, "mlp")] for layer in range(3)]


class Oracle:
    """Runs the protocol in NumPy, one path at a time."""

    def __init__(self, model, base, source, mask=None):
        self.weights = {name: value.numpy() for name, value in model.state_dict().items()}
        self.config, self.tokens = model.config.to_dict(), base.numpy()
        self.mask = None if mask is None else mask.numpy()
        self.n_layers = model.config.n_layers
        self.base, self.source = self.run(self.tokens)[1], self.run(source.numpy())[1]

    def run(self, tokens, edits=None):
        return reference_forward(
            self.weights, self.config, tokens, attention_mask=self.mask, edits=edits
        )

    def path(self, senders, receivers, columns=None, freeze_mlps=True):
        """Return the last logits' difference, `[prompts]`; `columns` are (prompt, column) pairs."""

        def sent(name, heads=None):
            """Freeze a value, but for what is sent."""
            value = self.base[name].copy()
            for row, at in [(slice(None), slice(None))] if columns is None else columns:
                for head in [None] if heads is None else heads:
                    where = (row, at) if head is None else (row, at, head)
                    value[where] = self.source[name][where]
            return value

        edits = {}
        for layer in range(self.n_layers):
            z, mlp = f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.hook_mlp_out"
            heads = [what for at, what in senders if at == layer and what != "mlp"]
            edits[z] = lambda _, z=z, heads=heads: sent(z, heads)
            if (layer, "mlp") in senders:
                edits[mlp] = lambda _, mlp=mlp: sent(mlp)
            elif freeze_mlps:
                edits[mlp] = lambda _, mlp=mlp: self.base[mlp]
        if (None, "embed") in senders:
            edits["hook_embed"] = lambda _: sent("hook_embed")
        logits, direct = self.run(self.tokens, edits)
        if receivers == "final":
            return last_difference(torch.tensor(logits))
        logits, _ = self.run(self.tokens, self._receiving(receivers, direct))
        return last_difference(torch.tensor(logits))

    def _receiving(self, receivers, direct):
        edits = {}
        for layer, *what in receivers:
            if what == ["mlp"]:
                name = f"blocks.{layer}.mlp.hook_pre"
                edits[name] = lambda _, name=name: direct[name]
                continue
            head, part = what
            name = f"blocks.{layer}.attn.hook_{part}"
            before = edits.get(name, lambda value: value)

            def receive(value, name=name, head=head, before=before):
                value = before(value)
                value[:, :, head] = direct[name][:, :, head]
                return value

            edits[name] = receive
        return edits


def sides(direction):
    clean, corrupt, _, _ = make_prompts()
    return (clean, corrupt) if direction == "noise" else (corrupt, clean)


RECEIVERS = [
    "final",
    [(2, 1, "q")],
    [(2, 0, "k"), (2, 3, "v")],
    [(1, 2, "v"), (2, 2, "q"), (2, 2, "k")],
    [(1, "mlp")],
    [(0, "mlp"), (2, "mlp"), (2, 0, "v")],
]


@pytest.mark.parametrize("freeze_mlps", [True, False])
@pytest.mark.parametrize(
    ("variant", "direction"),
    [("pre-LN", "noise"), ("pre-LN", "denoise"), ("350m", "noise"), ("no bias", "noise")],
)
@pytest.mark.parametrize("receivers", RECEIVERS, ids=str)
def test_every_path_equals_the_protocol_run_step_by_step(
    receivers, variant, direction, freeze_mlps
):
    model = make_model(**VARIANTS[variant])
    clean, corrupt, _, _ = make_prompts()
    oracle = Oracle(model, *sides(direction))
    options = {"direction": direction, "freeze_mlps": freeze_mlps, "progress": False}
    for senders, each in (("heads", ALL_HEADS), ("mlps", ALL_MLPS)):
        expected = [oracle.path(group, receivers, None, freeze_mlps) for group in each]
        result = path_patch(model, clean, corrupt, senders, receivers, METRIC, **options)
        torch.testing.assert_close(result.per_prompt.flatten(0, -2), torch.stack(expected), **EXACT)
    assert result.clean == pytest.approx(
        float(last_difference(oracle.run(clean.numpy())[0]).mean())
    )
    assert result.corrupt == pytest.approx(
        float(last_difference(oracle.run(corrupt.numpy())[0]).mean())
    )


@pytest.mark.parametrize("receivers", ["final", [(1, 2, "v"), (2, 2, "q")], [(1, "mlp")]], ids=str)
def test_senders_of_a_list_may_send_together_and_from_single_positions(receivers):
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    oracle = Oracle(model, clean, corrupt)
    senders = ["embed", (0, torch.tensor(1)), [(0, "mlp"), (0, 2), "embed"], (-3, 3)]
    groups = [[(None, "embed")], [(0, 1)], [(0, "mlp"), (0, 2), (None, "embed")], [(0, 3)]]
    whole = path_patch(model, clean, corrupt, senders, receivers, METRIC, progress=False)
    assert whole.axes == ("sender",)
    assert whole.labels["sender"] == ["embed", "0.1", "0.mlp + 0.2 + embed", "0.3"]
    expected = torch.stack([oracle.path(group, receivers) for group in groups])
    assert expected.std() > 1e-3
    torch.testing.assert_close(whole.per_prompt, expected, **EXACT)
    single = path_patch(
        model,
        clean,
        corrupt,
        senders,
        receivers,
        METRIC,
        over=("sender", "pos"),
        positions=[3, -1],
        progress=False,
    )
    for number, column in enumerate([3, 5]):
        columns = [(0, column), (1, column)]
        expected = torch.stack([oracle.path(group, receivers, columns) for group in groups])
        torch.testing.assert_close(single.per_prompt[:, number], expected, **EXACT)


def test_components_that_no_axis_tells_apart_send_together():
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    oracle = Oracle(model, clean, corrupt)
    receivers = (2, 1)
    parts = [(2, 1, part) for part in "qkv"]
    result = path_patch(
        model, clean, corrupt, "heads", receivers, METRIC, over="layer", progress=False
    )
    expected = [oracle.path([(layer, h) for h in range(4)], parts) for layer in range(3)]
    torch.testing.assert_close(result.per_prompt, torch.stack(expected), **EXACT)
    some = path_patch(
        model, clean, corrupt, "heads", receivers, METRIC, layers=1, heads=[3, 0], progress=False
    )
    expected = [oracle.path([(1, head)], parts) for head in (3, 0)]
    torch.testing.assert_close(some.per_prompt[0], torch.stack(expected), **EXACT)


@pytest.mark.parametrize("receivers", ["final", [(2, 1, "q"), (2, 1, "k")]], ids=str)
def test_left_padded_prompts(receivers, monkeypatch):
    model = make_model()
    clean, corrupt, mask, _ = make_prompts(padded=True)
    oracle = Oracle(model, clean, corrupt, mask)
    names = padded_as_text(model, monkeypatch, clean, corrupt, mask)
    result = path_patch(model, *names, "heads", receivers, METRIC, progress=False)
    expected = torch.stack([oracle.path(group, receivers) for group in ALL_HEADS])
    torch.testing.assert_close(result.per_prompt.flatten(0, -2), expected, **EXACT)
    # from the end, and counted over each prompt's own tokens
    single = path_patch(
        model,
        *names,
        "heads",
        receivers,
        METRIC,
        over=("layer", "head", "pos"),
        positions=[-3, 1],
        progress=False,
    )
    for number, columns in enumerate([[(0, 3), (1, 3)], [(0, 3), (1, 1)]]):
        expected = torch.stack([oracle.path(group, receivers, columns) for group in ALL_HEADS])
        found = single.per_prompt[:, :, number].flatten(0, -2)
        torch.testing.assert_close(found, expected, **EXACT)


def test_direct_effects_add_up_where_the_rest_is_linear():
    model = make_model(_remove_final_layer_norm=True)
    clean, corrupt, _, _ = make_prompts()
    senders = [group[0] for group in ALL_HEADS + ALL_MLPS] + ["embed"]
    result = path_patch(model, clean, corrupt, senders, "final", METRIC, progress=False)
    changes = result.per_prompt - result.clean_per_prompt
    total = result.corrupt_per_prompt - result.clean_per_prompt
    torch.testing.assert_close(changes.sum(0), total, **EXACT)


def test_the_last_mlp_has_no_path_but_the_direct_one():
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    path = path_patch(model, clean, corrupt, "mlps", "final", METRIC, progress=False)
    sweep = patch_sweep(
        model, clean, corrupt, "mlp_out", "layer", METRIC, direction="noise", progress=False
    )
    torch.testing.assert_close(path.values[-1], sweep.values[-1])
    assert not torch.isclose(path.values[0], sweep.values[0])


def test_senders_behind_the_receivers_and_equal_prompts_need_no_run(monkeypatch):
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    run, rows = PathWave.run, []
    monkeypatch.setattr(PathWave, "run", lambda self, some: rows.extend(some) or run(self, some))
    result = path_patch(model, clean, corrupt, "heads", (1, 0, "q"), METRIC, progress=False)
    assert len(rows) == 4 * 2  # the heads of block 0, for two prompts
    assert torch.equal(result.per_prompt[1:], result.clean_per_prompt.expand(2, 4, 2))
    path_patch(model, clean, clean, "heads", "final", METRIC, progress=False)
    assert len(rows) == 8


@pytest.mark.parametrize("receivers", ["final", (2, 1, "v")], ids=str)
@pytest.mark.parametrize("metric", [metrics.kl(), metrics.prob(5), "callable"], ids=str)
def test_every_metric_in_small_portions(metric, receivers, monkeypatch):
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    arguments = (model, clean, corrupt, "heads", receivers)
    monkeypatch.setattr("optlens.patching.path_wave.MOST_TOKENS", 1)
    if metric == "callable":
        # one number for all prompts, of which position 2 sends something new in one only
        options = {"over": ("layer", "head", "pos"), "positions": [2, 3], "progress": False}
        found = path_patch(*arguments, lambda logits: last_difference(logits).sum(), **options)
        each = path_patch(*arguments, METRIC, **options)
        expected = each.per_prompt.sum(-1, keepdim=True).expand(-1, -1, -1, 2)
    else:
        found = path_patch(*arguments, metric, progress=False)
        monkeypatch.undo()
        expected = path_patch(*arguments, metric, progress=False).per_prompt
    torch.testing.assert_close(found.per_prompt, expected, **EXACT)
    assert found.complete


def test_an_interrupted_run_returns_what_it_has(monkeypatch):
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    run, calls = PathWave.run, []

    def run_thrice(self, rows):
        calls.append(rows)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return run(self, rows)

    monkeypatch.setattr("optlens.patching.path_wave.MOST_TOKENS", 1)
    monkeypatch.setattr(PathWave, "run", run_thrice)
    with pytest.warns(UserWarning, match="Interrupted: 9 of 12 paths") as caught:
        result = path_patch(model, clean, corrupt, "heads", "final", METRIC, progress=False)
    assert [each.filename for each in caught] == [__file__]
    assert not result.complete and int(result.missing.sum()) == 9


def test_a_metric_that_gives_nan_has_been_computed():
    clean, corrupt, _, _ = make_prompts()

    def nothing(logits):
        return last_difference(logits) * torch.nan

    # from the last block on, a head at an early position has no path: nothing is run for it
    with pytest.warns(UserWarning, match=r"nothing.* NaN.* 72 of 72") as caught:
        result = path_patch(
            make_model(),
            clean,
            corrupt,
            metric=nothing,
            over=("layer", "head", "pos"),
            progress=False,
        )
    assert [each.filename for each in caught] == [__file__]
    assert result.complete and result.undefined.all()


def test_a_result_of_words_has_labels_and_can_be_printed():
    model = optlens.load()
    clean, corrupt = "Then John and Mary met, and John", "Then John and Mary met, and Mary"
    result = path_patch(
        model,
        clean,
        corrupt,
        [(0, 1), (1, "mlp")],
        [(2, 3, "q"), (3, "mlp")],
        metrics.logit_diff(" gave", " took"),
        over=("sender", "pos"),
        progress=False,
    )
    assert result.labels["pos"][2] == "2:  John"
    assert result.metadata["site"] == "paths to 2.3.q, 3.mlp"
    assert "paths to 2.3.q" in repr(result)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"direction": "both"}, "'denoise' or 'noise'"),
        ({"senders": "neurons"}, "is no sender"),
        ({"senders": []}, "at least one"),
        ({"senders": [[]]}, "is empty"),
        ({"senders": [(0, "attn")]}, "is no sender"),
        ({"senders": [(5, 0)]}, "0 to 2"),
        ({"senders": [(0, 7)]}, "0 to 3"),
        ({"senders": [(2, 0)], "receivers": (2, 1, "q")}, "no path"),
        ({"senders": [(2, "mlp")], "receivers": (2, "mlp")}, "no path"),
        ({"receivers": "q"}, "is no receiver"),
        ({"receivers": (1, 2, "z")}, "is no receiver"),
        ({"receivers": [(1, 4)]}, "0 to 3"),
        ({"receivers": ["final", (1, 2)]}, "would undo them"),
        ({"receivers": 3}, "no list"),
        ({"over": ("layer", "neuron")}, "axes layer, head, pos"),
        ({"over": ()}, "at least one"),
        ({"senders": "mlps", "heads": 1}, "no meaning"),
        ({"senders": ["embed"], "layers": 1}, "no meaning"),
        ({"positions": [1]}, "add it"),
        ({"metric": None}, "what to measure"),
    ],
)
def test_bad_arguments_say_what_would_be_right(changes, message):
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    arguments = {"senders": "heads", "receivers": "final", "metric": METRIC, "progress": False}
    with pytest.raises(InputError, match=message):
        path_patch(model, clean, corrupt, **(arguments | changes))


def test_a_memory_budget_that_is_too_small_says_so_before_running():
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    with pytest.raises(MemoryError, match="one path"):
        path_patch(model, clean, corrupt, metric=METRIC, memory_budget=1000, progress=False)
