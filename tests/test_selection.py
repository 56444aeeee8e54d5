"""Selections mean the same in every prompt and spelling, and what cannot be meant is refused."""

import numpy as np
import pytest
import torch
from conftest import TOL, random_model, tiny_config

import optlens
from optlens.checks import InputError
from optlens.names import UnknownHookError

PROMPTS = [[2, 10, 20, 30, 40, 50, 60], [2, 11, 21], [2, 12, 22, 32, 42]]
TOKENS = torch.tensor(PROMPTS[0])
CLOSE = TOL[torch.float32]


@pytest.fixture
def padded() -> dict[str, torch.Tensor]:
    """PROMPTS as one batch, the middle one padded on the right and the last on the left."""
    tokens, mask = torch.ones(3, 7, dtype=torch.long), torch.zeros(3, 7, dtype=torch.long)
    for row, columns in enumerate([slice(0, 7), slice(0, 3), slice(2, 7)]):
        tokens[row, columns] = torch.tensor(PROMPTS[row])
        mask[row, columns] = 1
    return {"prompt": tokens, "attention_mask": mask}


@pytest.mark.parametrize(
    ("pos", "positions"),
    [
        (slice(-2, None), [-2, -1]),
        (slice(None, -4, -1), [-1, -2, -3]),
        (slice(0, 2), [0, 1]),
        (slice(None, None, 10), [0]),
    ],
    ids=str,
)
def test_a_slice_means_the_same_tokens_of_every_prompt(tiny_model, padded, pos, positions):
    rec = tiny_model.record(**padded, what="residual", pos=pos)
    assert rec.positions == positions
    for row, prompt in enumerate(PROMPTS):
        alone = tiny_model.record(torch.tensor(prompt), what="residual")
        torch.testing.assert_close(
            rec.residual[row], alone.residual[:, range(len(prompt))[pos]], **CLOSE
        )


@pytest.mark.parametrize("pos", [slice(None), slice(1, None), slice(-4, None)], ids=str)
def test_a_slice_that_differs_between_prompts_is_refused(tiny_model, padded, pos):
    with pytest.raises(InputError, match="in prompts of 7, 3, 5 tokens, not the same ones.*None"):
        tiny_model.record(**padded, what="residual", pos=pos)


def test_an_empty_slice_of_positions_is_refused(tiny_model, padded):
    with pytest.raises(InputError, match=r"pos=slice\(9, None\) selects nothing"):
        tiny_model.record(**padded, pos=slice(9, None))


def test_columns_say_where_positions_lie(tiny_model, padded):
    rec = tiny_model.record(**padded, what="attention", pos=[-1, 0])
    assert rec.positions == [-1, 0]
    assert rec.columns == [[6, 0], [2, 0], [6, 2]]
    full = tiny_model.record(**padded, what="attention")
    assert full.columns == [list(range(7))] * 3
    for row, columns in enumerate(rec.columns):
        torch.testing.assert_close(rec.attention[row], full.attention[row][:, :, columns])
    assert tiny_model.record(TOKENS, pos=[-1, 3]).columns == [6, 3]


def test_heads_that_repeat_are_recorded_as_asked():
    model = random_model(tiny_config(num_attention_heads=2))
    full = model.record(TOKENS, what="attention")
    for heads in ([1, 1], [0, 0], [1, 0], [0, 1]):
        rec = model.record(TOKENS, what="attention", heads=heads)
        assert rec.heads == heads
        torch.testing.assert_close(rec.attention, full.attention[:, heads])


@pytest.mark.parametrize(
    "layers",
    [np.int64(1), torch.tensor(1), [np.int32(1)], np.array([1]), torch.tensor([-1]), range(1, 2)],
    ids=repr,
)
def test_numbers_of_every_kind_select(tiny_model, layers):
    assert tiny_model.record(TOKENS, layers=layers).layers == [1]


@pytest.mark.parametrize(
    "layers", [1.5, [1.5], "all", [True, False], torch.tensor([1.0])], ids=repr
)
def test_what_is_no_whole_number_is_refused(tiny_model, layers):
    with pytest.raises(InputError, match=r"layers=.* must be a whole number, several"):
        tiny_model.record(TOKENS, layers=layers)


@pytest.mark.parametrize(
    ("what", "nearest"),
    [
        ("attentoin", "'attention'"),
        ("patern", "'pattern'"),
        ("resid_pst", "'resid_post'"),
        ("blocks.1.attn.hook_patern", r"'blocks\.1\.attn\.hook_pattern'"),
        ("blocks.9.hook_resid_post", r"'blocks\.[01]\.hook_resid_post'"),
        ("k9", "Did you mean"),
    ],
)
def test_a_misspelt_name_is_given_back_with_its_nearest(tiny_model, what, nearest):
    with pytest.raises(UnknownHookError, match=rf"^what='{what}' is none of .*{nearest}"):
        tiny_model.record(TOKENS, what=("residual", what))
    with pytest.raises(UnknownHookError, match=rf"^what='{what}'"):
        optlens.estimate_bytes(tiny_model.config, 7, what=what)


@pytest.mark.parametrize(
    ("what", "full"),
    [
        ("embed", "hook_embed"),
        ("pos_embed", "hook_pos_embed"),
        ("k1", "blocks.1.attn.hook_k"),
        ("scale1ln2", "blocks.1.ln2.hook_scale"),
        ("scale", "ln_final.hook_scale"),
    ],
)
def test_short_names_of_one_hook_are_recorded(tiny_model, what, full):
    rec = tiny_model.record(TOKENS, what=what)
    _, cache = tiny_model.run_with_cache(TOKENS, full, remove_batch_dim=True)
    assert rec.what == [full]
    torch.testing.assert_close(rec[what], cache[full], rtol=0, atol=0)
    torch.testing.assert_close(rec[full], cache[full], rtol=0, atol=0)
