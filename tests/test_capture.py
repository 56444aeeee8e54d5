"""Recording: what is kept equals what the run computed, no more is kept, and bad requests are refused."""

import gc

import pytest
import torch
from conftest import TOL, VARIANTS, random_model, tiny_config

import optlens
from optlens import capture, recorder
from optlens.checks import InputError, NonFiniteError
from optlens.names import UnknownHookError

PROMPTS = [[2, 10, 20, 30, 40, 50, 60], [2, 11, 21], [2, 12, 22, 32, 42]]
CLOSE = TOL[torch.float32]


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return PROMPTS as one batch, padded on the left, on the right, or in turn, with its mask."""
    width = max(map(len, PROMPTS))
    tokens, mask = torch.ones(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    for row, prompt in enumerate(PROMPTS):
        left = side == "left" or (side == "both" and row % 2 == 1)
        columns = slice(width - len(prompt), width) if left else slice(0, len(prompt))
        tokens[row, columns] = torch.tensor(prompt)
        mask[row, columns] = 1
    return tokens, mask


def test_everything_equals_run_with_cache(variant):
    model = random_model(tiny_config(**variant))
    tokens = torch.tensor(PROMPTS[0])
    rec = model.record(tokens, what=("attention", "residual", "z", "blocks.1.mlp.hook_post"))
    _, cache = model.run_with_cache(tokens, remove_batch_dim=True)
    torch.testing.assert_close(rec.attention, cache.stack("pattern"), **CLOSE)
    torch.testing.assert_close(rec.residual[0], cache["resid_pre", 0], **CLOSE)
    torch.testing.assert_close(rec.residual[1:], cache.stack("resid_post"), **CLOSE)
    torch.testing.assert_close(rec["z"], cache.stack("z"), **CLOSE)
    torch.testing.assert_close(rec["z", -1], cache["z", -1], **CLOSE)
    torch.testing.assert_close(rec["blocks.1.mlp.hook_post"], cache["post", 1], **CLOSE)
    torch.testing.assert_close(rec["post", 1], cache["post", 1], **CLOSE)
    torch.testing.assert_close(rec.logits, model(tokens, return_type="logits")[0], **CLOSE)


def test_one_prompt_has_no_batch_axis_and_a_list_has(tiny_model):
    one = tiny_model.record(torch.tensor(PROMPTS[0]))
    several = tiny_model.record(torch.tensor([PROMPTS[0], PROMPTS[0][::-1]]))
    assert one.attention.shape == (2, 4, 7, 7)
    assert one.tokens.shape == one.mask.shape == (7,)
    assert len(one.str_tokens) == 7
    assert several.attention.shape == (2, 2, 4, 7, 7)
    assert several.residual.shape == (2, 3, 7, 32)
    assert several.logits.shape == (2, 7, 101)
    assert several.logit_lens().top_tokens.shape == (2, 3, 7, 5)
    torch.testing.assert_close(several.attention[0], one.attention, **CLOSE)


def test_selection_of_layers_heads_and_positions(tiny_model):
    tokens = torch.tensor(PROMPTS[0])
    full = tiny_model.record(tokens, what=("attention", "residual", "q"))
    part = tiny_model.record(
        tokens, what=("attention", "residual", "q"), layers=-1, heads=[2, 0], pos=[-1, 3]
    )
    assert (part.layers, part.heads, part.positions) == ([1], [2, 0], [6, 3])
    torch.testing.assert_close(part.attention, full.attention[1:][:, [2, 0]][:, :, [6, 3]])
    torch.testing.assert_close(part.residual, full.residual[[0, 2]][:, [6, 3]])
    torch.testing.assert_close(part["q"], full["q"][1:][:, [6, 3]][:, :, [2, 0]])
    torch.testing.assert_close(part.logits, full.logits[[6, 3]], **CLOSE)
    assert part.row_labels == ["embed", "1"]


def test_logits_do_not_need_the_last_layer_to_be_selected(tiny_model):
    tokens = torch.tensor(PROMPTS[0])
    rec = tiny_model.record(tokens, what="residual", layers=0)
    torch.testing.assert_close(rec.logits, tiny_model(tokens).logits[0], **CLOSE)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_changes_nothing_at_real_positions(side):
    model = random_model(tiny_config())
    tokens, mask = padded(side)
    rec = model.record(tokens, attention_mask=mask)
    for row, prompt in enumerate(PROMPTS):
        alone, real = model.record(torch.tensor(prompt)), mask[row].bool()
        torch.testing.assert_close(rec.residual[row][:, real], alone.residual, **CLOSE)
        pattern = rec.attention[row][:, :, real][..., real]
        torch.testing.assert_close(pattern, alone.attention, **CLOSE)
        torch.testing.assert_close(rec.logits[row, real], alone.logits, **CLOSE)
        lens, alone_lens = rec.logit_lens(), alone.logit_lens()
        torch.testing.assert_close(lens.kl[row][:, real], alone_lens.kl, **CLOSE)
    assert rec.mask.equal(mask.bool())


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_positions_count_real_tokens_in_a_padded_batch(side):
    model = random_model(tiny_config())
    tokens, mask = padded(side)
    rec = model.record(tokens, attention_mask=mask, what="residual", pos=[-1, 0])
    assert rec.positions == [-1, 0]
    for row, prompt in enumerate(PROMPTS):
        alone = model.record(torch.tensor(prompt), what="residual", pos=[-1, 0])
        torch.testing.assert_close(rec.residual[row], alone.residual, **CLOSE)


def test_position_beyond_the_shortest_prompt_is_refused(tiny_model):
    tokens, mask = padded("left")
    with pytest.raises(InputError, match="pos=.*asks for 5.*0 to 2"):
        tiny_model.record(tokens, attention_mask=mask, pos=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 2}, "layers=2 asks for 2, but there are 2"),
        ({"heads": [0, 4]}, "asks for 4, but there are 4"),
        ({"heads": []}, "selects nothing"),
        ({"pos": -8}, "asks for -8"),
        ({"what": ()}, "Nothing to record"),
    ],
)
def test_bad_selections_are_refused(tiny_model, options, message):
    with pytest.raises(InputError, match=message):
        tiny_model.record(torch.tensor(PROMPTS[0]), **options)


def test_missing_final_norm_is_refused_by_name():
    model = random_model(tiny_config(_remove_final_layer_norm=True))
    with pytest.raises(UnknownHookError, match=r"ln_final\.hook_scale"):
        model.record(torch.tensor(PROMPTS[0]), what="ln_final.hook_scale")


def test_final_norm_can_be_recorded(tiny_model):
    tokens = torch.tensor(PROMPTS[0])
    rec = tiny_model.record(tokens, what="ln_final.hook_scale")
    _, cache = tiny_model.run_with_cache(tokens, remove_batch_dim=True)
    torch.testing.assert_close(rec["ln_final.hook_scale"], cache["scale"])


def test_values_are_those_after_interventions(tiny_model):
    def erase(z, hook):
        z[:, :, 1] = 0.0

    tokens = torch.tensor(PROMPTS[0])
    with tiny_model.hooks([("blocks.0.attn.hook_z", erase)]):
        rec = tiny_model.record(tokens, what=("z", "residual"))
        logits = tiny_model(tokens).logits[0]
    assert rec["z", 0][:, 1].abs().max() == 0
    assert rec.metadata["edited_hooks"] == ["blocks.0.attn.hook_z"]
    torch.testing.assert_close(rec.logits, logits, **CLOSE)


@pytest.mark.parametrize("hook", ["ln_final.hook_scale", "ln_final.hook_normalized"])
def test_an_intervention_that_logits_would_miss_is_refused(tiny_model, hook):
    tokens = torch.tensor(PROMPTS[0])
    with tiny_model.hooks([(hook, lambda value, hook: 2 * value)]):
        for what in ("residual", "logit_lens"):
            with pytest.raises(InputError, match=rf"{hook}.*run_with_hooks"):
                tiny_model.record(tokens, what=what)
        rec = tiny_model.record(tokens, what=("attention", hook))
    plain = tiny_model.record(tokens, what=hook)
    torch.testing.assert_close(rec[hook], 2 * plain[hook])
    assert rec.metadata["edited_hooks"] == [hook]


def test_training_mode_records_without_dropout_and_is_kept():
    model = random_model(tiny_config(layerdrop=1.0, dropout=0.5, attention_dropout=0.5))
    tokens = torch.tensor(PROMPTS[0])
    expected = model.record(tokens, what=("attention", "residual", "z"))
    model.train()
    model.decoder.layers[0].eval()
    before = [module.training for module in model.modules()]
    rec = model.record(tokens, what=("attention", "residual", "z"))
    for value in ("attention", "residual", "z"):
        torch.testing.assert_close(rec[value], expected[value], rtol=0, atol=0)
    assert [module.training for module in model.modules()] == before
    with torch.no_grad():
        model.decoder.layers[1].fc2.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        model.record(tokens)
    assert [module.training for module in model.modules()] == before


def test_a_hook_that_never_fires_is_named(tiny_model, monkeypatch):
    skip = lambda resid, *args: (resid, None)  # noqa: E731
    monkeypatch.setattr(tiny_model.decoder.layers[1], "forward", skip)
    with pytest.raises(RuntimeError, match=r"Nothing was computed at 'blocks\.1\.attn\.hook_z'"):
        tiny_model.record(torch.tensor(PROMPTS[0]), what="z")


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, "float16"], ids=str)
def test_a_dtype_that_cannot_hold_activations_is_refused(tiny_model, dtype):
    with pytest.raises(InputError, match=r"dtype=.* cannot hold activations.*torch\.float16"):
        tiny_model.record(torch.tensor(PROMPTS[0]), dtype=dtype)


def test_values_that_do_not_fit_the_storage_dtype_are_refused(tiny_model):
    with torch.no_grad():
        tiny_model.decoder.layers[0].fc2.bias[0] = 1e5
    tokens, what = torch.tensor(PROMPTS[0]), ("residual", "attn_scores")
    with pytest.raises(InputError, match=r"hook_resid_post' do not fit in torch\.float16.* 65504"):
        tiny_model.record(tokens, what=what, dtype=torch.float16)
    rec = tiny_model.record(tokens, what=what, dtype=torch.bfloat16)
    assert rec.residual.isfinite().all()
    assert rec["attn_scores"].isneginf().any()  # masked, not lost


def test_masked_scores_fit_every_storage_dtype(tiny_model):
    rec = tiny_model.record(torch.tensor(PROMPTS[0]), what="attn_scores", dtype=torch.float16)
    assert rec["attn_scores", 0].isneginf().any()


def test_storage_dtype(tiny_model):
    tokens = torch.tensor(PROMPTS[0])
    full, half = tiny_model.record(tokens), tiny_model.record(tokens, dtype=torch.float16)
    assert half.attention.dtype == half.residual.dtype == torch.float16
    torch.testing.assert_close(half.attention.float(), full.attention, **TOL[torch.float16])


def test_estimate_equals_what_is_kept(tiny_model):
    what = ("attention", "residual", "z", "blocks.1.mlp.hook_post")
    rec = tiny_model.record(torch.tensor([PROMPTS[0]] * 3), what=what, layers=[1], heads=[0, 2])
    kept = [
        rec.attention,
        rec.residual,
        rec["z"],
        rec["blocks.1.mlp.hook_post"],
        rec.residual[:, -1],
    ]
    estimate = capture.estimate_bytes(
        tiny_model.config, pos=7, batch=3, what=what, layers=[1], heads=[0, 2]
    )
    assert estimate == sum(tensor.nbytes for tensor in kept)


def test_a_recording_that_would_not_fit_is_refused_before_running(tiny_model, monkeypatch):
    monkeypatch.setattr(recorder, "available_bytes", lambda device: 1000)
    monkeypatch.setattr(tiny_model.decoder, "forward", lambda *args: pytest.fail("it ran"))
    with pytest.raises(MemoryError, match=r"1\.0 kB free.*layers=.*dtype=torch\.float16"):
        tiny_model.record(torch.tensor(PROMPTS[0]))


def test_weights_with_nan_are_named(tiny_model):
    with torch.no_grad():
        tiny_model.decoder.layers[1].fc2.weight[3, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"NaN or infinite in block 1\."):
        tiny_model.record(torch.tensor(PROMPTS[0]))


def test_fifty_recordings_leave_memory_flat(tiny_model):
    def alive() -> int:
        gc.collect()
        tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
        return sum(o.nbytes for o in tensors if o.layout == torch.strided)

    tokens = torch.tensor(PROMPTS[0])
    for _ in range(2):
        tiny_model.record(tokens).logit_lens()
    before = alive()
    for _ in range(50):
        tiny_model.record(tokens).logit_lens()
    assert alive() == before
    held = [tiny_model.record(tokens) for _ in range(2)]  # the measure does see recordings
    assert alive() > before
    del held


def test_no_hook_is_left_behind(tiny_model):
    with torch.no_grad():
        tiny_model.decoder.layers[0].fc1.weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError):
        tiny_model.record(torch.tensor(PROMPTS[0]))
    assert not any(point.listening for point in tiny_model.hook_dict.values())


def test_recording_is_neutral(tiny_model):
    tokens = torch.tensor([PROMPTS[0]])
    plain = tiny_model(tokens).logits
    tiny_model.record(tokens, what=optlens.hook_names(tiny_model.config))
    assert tiny_model(tokens).logits.equal(plain)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_hook_can_be_recorded(name):
    model = random_model(tiny_config(**VARIANTS[name]))
    names = optlens.hook_names(model.config)
    rec = model.record(torch.tensor(PROMPTS[0]), what=names)
    _, cache = model.run_with_cache(torch.tensor(PROMPTS[0]), names, remove_batch_dim=True)
    for hook in names:
        torch.testing.assert_close(rec[hook], cache[hook], **CLOSE)
