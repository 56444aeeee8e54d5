"""Which tokens an intervention means: by number, slice, text and name, padded, and token by token with a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import TOL, random_model, tiny_config
from tiny_tokenizer import OPT_SETTINGS, tiny_backend

from optlens import Ablate, Freeze, Knockout, OPTTokenizer, Patch, Scale, Steer
from optlens.checks import InputError
from optlens.interventions.address import SITES

CLOSE = TOL[torch.float64]
IDS = torch.randint(3, 101, (2, 8), generator=torch.manual_seed(5))
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]])
VECTOR = torch.randn(32, dtype=torch.float64, generator=torch.manual_seed(6))
TEXT = "the cat he the ca cat"


@pytest.fixture(scope="module", params=["pre_ln", "post_ln"])
def model(request: pytest.FixtureRequest) -> Any:
    pre_ln = request.param == "pre_ln"
    overrides = {} if pre_ln else {"do_layer_norm_before": False, "word_embed_proj_dim": 16}
    built = random_model(tiny_config(vocab_size=300, **overrides), torch.float64)
    settings = {name: OPT_SETTINGS[name] for name in ("bos_token", "add_bos_token")}
    built.tokenizer = OPTTokenizer.from_tokenizers(tiny_backend(), **settings)
    return built


def changed(model: Any, prompt: Any, place: Any, mask: Any = None, **options: Any) -> list:
    """The positions that a choice means, seen at the last layer, where a change stays where it is."""
    with torch.no_grad():
        clean = model(prompt, attention_mask=mask, stop_at_layer=2)
        with model.intervene(Scale("resid_post", layer=-1, pos=place, factor=3), **options):
            edited = model(prompt, attention_mask=mask, stop_at_layer=2)
    rows = (clean != edited).any(-1)
    return [row.nonzero().flatten().tolist() for row in rows]


# --------------------------------------------------------------------------- which are meant


@pytest.mark.parametrize(
    ("place", "meant"),
    [
        (0, [0]),
        (-1, [7]),
        ([1, -2], [1, 6]),
        (range(2, 5), [2, 3, 4]),
        (torch.tensor([3, 4]), [3, 4]),
        (slice(5, None), [5, 6, 7]),
        (slice(-2, None), [6, 7]),
        (slice(None, None, 3), [0, 3, 6]),
        (slice(5, 99), [5, 6, 7]),
        (None, list(range(8))),
    ],
    ids=str,
)
def test_numbers_and_slices(model, place, meant):
    assert changed(model, IDS, place) == [meant, meant]


@pytest.mark.parametrize(
    ("place", "meant"),
    [
        (0, [[2], [0]]),
        (-1, [[7], [7]]),
        (slice(4, None), [[6, 7], [4, 5, 6, 7]]),
        (None, [[2, 3, 4, 5, 6, 7], list(range(8))]),
    ],
    ids=str,
)
def test_positions_count_real_tokens(model, place, meant):
    assert changed(model, IDS, place, LEFT) == meant


def test_tokens_by_text(model):
    tokens = model.to_str_tokens(TEXT)
    assert tokens == ["</s>", "t", "he", " cat", " ", "he", " the", " ", "ca", " cat"]
    assert changed(model, TEXT, " the") == [[6]]
    assert changed(model, TEXT, (" cat", 1)) == [[9]]
    assert changed(model, TEXT, (" cat", 0)) == [[3]]
    assert changed(model, TEXT, ["t", (" cat", -1), 0]) == [[0, 1, 9]]
    # each prompt has its own place: " cat he" is 4 tokens, padded on the left to 10
    assert changed(model, [TEXT, "he the cat"], " the") == [[6], [8]]


def test_padding_that_spells_the_text_is_not_meant(model):
    """A batch may be padded with any token; only the mask says what is real."""
    token = model.to_single_token(" cat")
    ids = IDS.clone()
    ids[0, 0] = ids[0, 4] = ids[1, 5] = token
    assert changed(model, ids, " cat", LEFT) == [[4], [5]]


def test_tokens_that_are_not_there_once_are_refused(model):
    with pytest.raises(InputError, match=r"occurs 2 times in prompt 0, at positions \[3, 9\]; say"):
        changed(model, TEXT, " cat")
    with pytest.raises(InputError, match="occurs 2 times in prompt 0.*count from 0"):
        changed(model, TEXT, (" cat", 2))
    with pytest.raises(
        InputError, match="does not occur in prompt 1: its tokens are .*'he', ' cat'"
    ):
        changed(model, [TEXT, "he cat"], " the")
    with pytest.raises(InputError, match="does not occur in prompt 0: ' cat' does"):
        changed(model, "he cat", "cat")
    with pytest.raises(InputError, match="'dog' is 3 tokens, expected one"):
        changed(model, TEXT, "dog")
    with pytest.raises(InputError, match="needs token ids"):
        with model.intervene(Scale("z", pos=" cat", factor=0)):
            model(inputs_embeds=torch.ones(1, 3, model.config.word_embed_proj_dim).double())


def test_named_spans(model):
    spans = {"S": [1, -1], "both": range(2, 4), "IO": [[1, 2], [3]], "end": -1}
    assert changed(model, IDS, "S", LEFT, spans=spans) == [[3], [7]]
    assert changed(model, IDS, "both", LEFT, spans=spans) == [[4, 5], [2, 3]]
    assert changed(model, IDS, "IO", LEFT, spans=spans) == [[3, 4], [3]]
    assert changed(model, IDS, ["end", 0], LEFT, spans=spans) == [[2, 7], [0, 7]]
    assert changed(model, IDS, "S", spans={"S": torch.tensor([1, 2])}) == [[1], [2]]
    with pytest.raises(InputError, match="3 entries for 2 prompts; give one entry for each"):
        changed(model, IDS, "S", spans={"S": [3, 4, 5]})
    with pytest.raises(InputError, match=r"\[6\] in prompt 0, which has 6 tokens"):
        changed(model, IDS, "S", LEFT, spans={"S": [6, 6]})


def test_a_span_of_one_position_takes_values_without_a_pos_axis(model):
    values = torch.stack([VECTOR, -VECTOR])
    spans = {"S": [1, 4]}
    with model.intervene(Patch("resid_post", layer=-1, pos="S", value=values), spans=spans):
        resid = model(IDS, stop_at_layer=2)
    torch.testing.assert_close(resid[[0, 1], [1, 4]], values)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (8, r"position 8, but prompt 0 has 6 tokens: 0 to 5, .*slice\(8, 9\)"),
        (-8, "position -8, but prompt 0 has 6 tokens"),
        ([0, 7], "position 7, but prompt 0"),
    ],
)
def test_positions_beyond_the_prompt_are_refused(model, place, message):
    with pytest.raises(InputError, match=message):
        changed(model, IDS, place, LEFT)


def test_a_slice_beyond_the_prompt_is_refused_where_no_token_can_follow(model):
    with pytest.raises(InputError, match=r"pos=slice\(9, None\) chooses none of the prompt's 8"):
        model.record(IDS, interventions=Scale("z", pos=slice(9, None), factor=0))
    with model.intervene(Scale("z", pos=slice(9, None), factor=0)):
        model(IDS, use_cache=True)


# ------------------------------------------------------------------------------ token by token


def stack_of(site: str) -> list:
    """Interventions that act on the prompt and on tokens to come."""
    if SITES[site][0] == "head":
        cut = [Scale(site, query=slice(3, None), key=1, head=[1, 3], factor=0.3)]
        return [*cut, Patch(site, layer=0, query=slice(2, None), key=[0, 2], value=0.4)]
    return [Scale(site, pos=slice(3, None), factor=-0.5), Patch(site, pos=[1, 2], value=0.7)]


def whole_and_stepwise(
    model: Any, stack: Any, mask: torch.Tensor | None, steps: list[int], **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of all tokens run at once, and of the same tokens run in steps with a cache."""
    with torch.no_grad():
        with model.intervene(stack, **options):
            whole = model(IDS, attention_mask=mask, use_cache=False).logits
        with model.intervene(stack, **options):
            cache, seen, parts = None, 0, []
            for n in steps:
                part = None if mask is None else mask[:, : seen + n]
                out = model(
                    IDS[:, seen : seen + n],
                    attention_mask=part,
                    past_key_values=cache,
                    use_cache=True,
                )
                cache, seen = out.past_key_values, seen + n
                parts.append(out.logits)
    stepwise = torch.cat(parts, dim=1)
    real = torch.ones_like(IDS).bool() if mask is None else mask.bool()
    return whole[real], stepwise[real]


@pytest.mark.parametrize("mask", [None, LEFT], ids=["whole", "padded"])
@pytest.mark.parametrize("site", SITES)
def test_token_by_token_equals_all_at_once(model, site, mask):
    whole, stepwise = whole_and_stepwise(model, stack_of(site), mask, [5, 1, 2])
    torch.testing.assert_close(stepwise, whole, **CLOSE)


@pytest.mark.parametrize("mask", [None, LEFT], ids=["whole", "padded"])
def test_the_other_kinds_token_by_token(model, mask):
    stack = [
        Steer(layer=0, vector=VECTOR, start=2),
        Knockout(layers=1, query=slice(4, None), key=[0, 2]),
        Ablate("z", layer=1, head=2, mode="mean", reference=IDS[:, :4]),
        Ablate("mlp_out", layer=0, pos=1, mode="mean", reference=IDS[:, :4], per_position=True),
    ]
    for each in [*stack, stack]:
        whole, stepwise = whole_and_stepwise(model, each, mask, [5, 1, 2])
        torch.testing.assert_close(stepwise, whole, **CLOSE)


@pytest.mark.parametrize("mask", [None, LEFT], ids=["whole", "padded"])
def test_minus_one_is_the_newest_token(model, mask):
    """The last token of the prompt, then each one that follows."""

    def stack(query: Any) -> list:
        return [Knockout(query=query, key=0), Steer(layer=0, vector=VECTOR, pos=query)]

    _, stepwise = whole_and_stepwise(model, stack(-1), mask, [5, 1, 1, 1])
    first = 4 if mask is None else 2  # where the newest tokens begin, in the padded prompt
    if mask is None:
        whole, _ = whole_and_stepwise(model, stack(slice(first, None)), mask, [8])
    else:
        spans = {"new": [[2, 3, 4, 5], [4, 5, 6, 7]]}
        whole, _ = whole_and_stepwise(model, stack("new"), mask, [8], spans=spans)
    torch.testing.assert_close(stepwise, whole, **CLOSE)


def test_a_token_is_looked_up_in_the_prompt_only(model):
    """It stays addressed when the same text is generated again."""
    cut = Knockout(query=-1, key=" cat")
    tokens = model.to_tokens("he cat the")
    again = model.to_tokens(" cat", prepend_bos=False)
    both = torch.cat([tokens, again], dim=1)
    where = tokens[0].tolist().index(again.item())
    with torch.no_grad():
        with model.intervene(cut):
            cache = model(tokens, use_cache=True).past_key_values
            after = model(again, past_key_values=cache).logits[:, -1]
        with model.intervene(Knockout(query=[tokens.shape[1] - 1, tokens.shape[1]], key=where)):
            expected = model(both).logits[:, -1]
        # several rows may go on from one prompt, as beams do
        with model.intervene(cut):
            cache = model(tokens, use_cache=True).past_key_values
            for layer, (keys, values) in list(cache._layers.items()):
                cache._layers[layer] = (keys.repeat(3, 1, 1, 1), values.repeat(3, 1, 1, 1))
            beams = model(again.repeat(3, 1), past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(after, expected, **CLOSE)
    torch.testing.assert_close(beams, expected.expand(3, -1), **CLOSE)


def test_rows_that_go_on_from_one_prompt_keep_its_values_and_tokens(model):
    """Two prompts of three beams each: rows 0 to 2 are of the first, 3 to 5 of the second."""
    vectors = torch.stack([VECTOR, -2 * VECTOR])[:, None]  # batch pos d_model
    spans = {"old": [[0, 1], [2, 3]]}
    stack = [Steer(layer=0, vector=vectors), Knockout(query=-1, key="old")]
    prompt, more = IDS[:, :6], torch.tensor([[20], [21], [22], [23], [24], [25]])
    with torch.no_grad():
        with model.intervene(stack, spans=spans):
            cache = model(prompt, use_cache=True).past_key_values
            for layer, (keys, values) in list(cache._layers.items()):
                beams = (each.repeat_interleave(3, dim=0) for each in (keys, values))
                cache._layers[layer] = tuple(beams)
            ours = model(more, past_key_values=cache).logits[:, -1]
        for row in range(6):
            own = row // 3
            alone = [Steer(layer=0, vector=vectors[own]), Knockout(query=-1, key="old")]
            with model.intervene(alone, spans={"old": [spans["old"][own]]}):
                cache = model(prompt[own : own + 1], use_cache=True).past_key_values
                expected = model(more[row : row + 1], past_key_values=cache).logits[0, -1]
            torch.testing.assert_close(ours[row], expected, **CLOSE)


def test_a_prompt_that_was_run_before_cannot_be_searched(model):
    tokens = model.to_tokens("he cat the")
    cache = model(tokens[:, :-1], use_cache=True).past_key_values
    with pytest.raises(InputError, match="run before the intervention began; .*give numbers"):
        with model.intervene(Knockout(query=-1, key=" cat")):
            model(tokens[:, -1:], past_key_values=cache)
    with model.intervene(Knockout(query=-1, key=1)):
        model(tokens[:, -1:], past_key_values=cache)


def test_given_values_and_frozen_runs_leave_later_tokens_alone(model):
    """They have numbers for the prompt only."""
    prompt, more = IDS[:, :6], IDS[:, 6:]
    _, cache = model.run_with_cache(IDS.flip(0)[:, :6], names_filter="blocks.0.hook_mlp_out")
    value = cache["mlp_out", 0]
    by_hand = Patch("mlp_out", layer=0, pos=range(6), value=value)
    expected, _ = whole_and_stepwise(model, by_hand, None, [8])
    for each in (
        Patch("mlp_out", layer=0, value=value),
        Freeze("mlp_out", layer=0, source=IDS.flip(0)[:, :6]),
    ):
        with torch.no_grad(), model.intervene(each):
            out = model(prompt, use_cache=True)
            logits = torch.cat(
                [out.logits, model(more, past_key_values=out.past_key_values).logits], dim=1
            )
        torch.testing.assert_close(logits.flatten(0, 1), expected, **CLOSE)


def test_two_runs_in_one_context_do_not_mix_their_prompts(model):
    cut = Knockout(query=-1, key=" cat")
    first, second = model.to_tokens(" cat he the"), model.to_tokens("he the cat the")
    with torch.no_grad(), model.intervene(cut):
        caches = [model(t[:, :-1], use_cache=True).past_key_values for t in (first, second)]
        ours = [
            model(t[:, -1:], past_key_values=cache).logits[:, -1]
            for t, cache in zip((first, second), caches, strict=True)
        ]
    for tokens, logits in zip((first, second), ours, strict=True):
        key = tokens[0].tolist().index(model.to_single_token(" cat"))
        queries = [tokens.shape[1] - 2, tokens.shape[1] - 1]
        with torch.no_grad(), model.intervene(Knockout(query=queries, key=key)):
            expected = model(tokens).logits[:, -1]
        torch.testing.assert_close(logits, expected, **CLOSE)
