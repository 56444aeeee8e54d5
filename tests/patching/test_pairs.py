"""What sweeps ask of a model and of pairs of prompts before they run."""

import pytest
import torch

import optlens
from optlens.checks import InputError
from optlens.patching import (
    ablate_sweep,
    attribution_patch,
    causal_trace,
    edge_attribution,
    faithfulness,
    knockout_sweep,
    patch_sweep,
    path_patch,
    token_attribution,
)
from tests.patching.test_sweep import METRIC, make_model, make_prompts


def test_recorders_are_no_reason_to_refuse_and_stay():
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    alone = patch_sweep(model, clean, corrupt, metric=METRIC, progress=False)
    heard = []
    point = model.hook_dict["blocks.0.attn.hook_pattern"]
    with model.recorders([point], lambda value, hook: heard.append(value.shape)):
        result = patch_sweep(model, clean, corrupt, metric=METRIC, progress=False)
        assert point.listening
    torch.testing.assert_close(result.per_prompt, alone.per_prompt)


LENGTHS = [4, 6, 3]


def in_a_batch(rows, left):
    """Return rows of ids as one batch with more padding than is needed, and its mask."""
    width = max(map(len, rows)) + 2
    tokens, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        at = slice(width - len(row), None) if left else slice(0, len(row))
        tokens[number, at], mask[number, at] = torch.tensor(row), 1
    return tokens, mask


def rows_of(seed, unlike=None):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(7, 40, (n,), generator=generator).tolist() for n in LENGTHS]
    return rows if unlike is None else [[*row[:unlike], 4, *row[unlike + 1 :]] for row in rows]


PAIRS = {
    "patch_sweep": lambda model, *pair, **more: patch_sweep(
        model, *pair, "z", ("layer", "head"), METRIC, progress=False, **more
    ),
    "path_patch": lambda model, *pair, **more: path_patch(
        model, *pair, metric=METRIC, progress=False, **more
    ),
    "attribution_patch": lambda model, *pair, **more: attribution_patch(
        model, *pair, metric=METRIC, **more
    ),
}
SINGLE = {
    "ablate_sweep": lambda model, prompts, **more: ablate_sweep(
        model, prompts, mode="zero", metric=METRIC, progress=False, **more
    ),
    "knockout_sweep": lambda model, prompts, **more: knockout_sweep(
        model, prompts, METRIC, keys=1, over="layer", progress=False, **more
    ),
    "causal_trace": lambda model, prompts, **more: causal_trace(
        model, prompts, 1, METRIC, over="layer", samples=2, progress=False, **more
    ),
}


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("name", [*PAIRS, *SINGLE])
def test_padded_ids_give_what_each_prompt_gives_alone(name, left):
    model = make_model()
    both = [rows_of(0), rows_of(0, unlike=1)] if name in PAIRS else [rows_of(0)]
    run = (PAIRS | SINGLE)[name]
    mask = in_a_batch(both[0], left)[1]
    batch = run(model, *(in_a_batch(rows, left)[0] for rows in both), attention_mask=mask)
    rows = batch.metadata["prompts" if name in SINGLE else "clean"]
    assert rows[2] == [1, 1, 1, *both[0][2]]  # as texts are padded, and no wider than need be
    for number in range(len(LENGTHS)):
        alone = run(model, *(torch.tensor([each[number]]) for each in both))
        torch.testing.assert_close(
            batch.per_prompt[..., number], alone.per_prompt[..., 0], atol=1e-10, rtol=1e-9
        )
        torch.testing.assert_close(batch.clean_per_prompt[number], alone.clean_per_prompt[0])


def test_circuits_run_on_padded_ids_as_on_each_prompt_alone():
    model = make_model()
    both = [rows_of(0), rows_of(0, unlike=1)]
    (clean, mask), (corrupt, _) = (in_a_batch(rows, left=False) for rows in both)
    scores = edge_attribution(model, clean, corrupt, METRIC, attention_mask=mask)
    alone = [[torch.tensor([rows[number]]) for rows in both] for number in range(len(LENGTHS))]
    expected = sum(edge_attribution(model, *pair, METRIC).scores for pair in alone) / len(LENGTHS)
    torch.testing.assert_close(scores.scores, expected, atol=1e-10, rtol=1e-9)
    circuit = scores.circuit(20)
    found = faithfulness(model, clean, corrupt, circuit, METRIC, attention_mask=mask)
    for number, pair in enumerate(alone):
        wanted = faithfulness(model, *pair, circuit, METRIC).per_prompt[..., 0]
        torch.testing.assert_close(found.per_prompt[..., number], wanted, atol=1e-10, rtol=1e-9)


def test_tokens_are_attributed_in_padded_ids_as_in_each_prompt_alone():
    model = make_model()
    ids, mask = in_a_batch(rows_of(0), left=False)
    found = token_attribution(model, ids, METRIC, steps=3, attention_mask=mask).values
    assert found.shape == (3, 6)
    for number, row in enumerate(rows_of(0)):
        wanted = token_attribution(model, torch.tensor([row]), METRIC, steps=3).values[0]
        torch.testing.assert_close(found[number, -len(row) :], wanted, atol=1e-10, rtol=1e-9)
        assert not found[number, : -len(row)].any()


def test_a_mask_goes_with_token_ids():
    with pytest.raises(InputError, match="goes with token ids"):
        patch_sweep(optlens.load(), "a", "b", metric=METRIC, attention_mask=torch.ones(1, 2))
