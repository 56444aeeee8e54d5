"""Head scores: by hand, against TransformerLens, and by what ablating the heads they name does."""

from __future__ import annotations

import pytest
import torch
from conftest import TOL, random_model, tiny_config
from fixtures import tiny_opt
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_tl218 import STORED, build_model, equal
from transformer_lens import head_detector

import optlens
from optlens import Ablate, circuits, prompts
from optlens.checks import InputError
from optlens.circuits.heads import KINDS, MATCHES
from optlens.recording import NotRecordedError

CLOSE = TOL[torch.float64]
THEIRS = {kind: f"{kind}_head" for kind in MATCHES}


@pytest.fixture(scope="module")
def demo():
    return optlens.load()


def scores_by_hand(attention: torch.Tensor, tokens: list[int]) -> dict[str, float]:
    """Return the six scores of one head `[query, key]`, one query after the other."""
    per_query: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for query, row in enumerate(attention.tolist()):
        earlier = [key for key in range(query) if tokens[key] == tokens[query]]
        if query:
            per_query["previous_token"].append(row[query - 1])
            per_query["first_token"].append(row[0])
            weights = torch.tensor([w for w in row if w > 0], dtype=torch.float64)
            per_query["entropy"].append(float(-(weights * weights.log()).sum()))
            per_query["distance"].append(sum(w * (query - key) for key, w in enumerate(row)))
        if earlier:
            per_query["duplicate_token"].append(sum(row[key] for key in earlier))
            per_query["induction"].append(sum(row[key + 1] for key in earlier))
    return {
        kind: sum(found) / len(found) if found else float("nan")
        for kind, found in per_query.items()
    }


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.integers(3, 6), min_size=1, max_size=9), min_size=1, max_size=3),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 10_000),
)
def test_scores_of_padded_prompts_equal_those_by_hand(texts, left, dtype, seed):
    model = random_model(tiny_config(), dtype, seed)
    longest = max(map(len, texts))
    fill = [[1] * (longest - len(text)) for text in texts]
    rows = [pad + text if left else text + pad for text, pad in zip(texts, fill, strict=True)]
    mask = torch.tensor([[int(token != 1) for token in row] for row in rows])
    rec = model.record(torch.tensor(rows), what="attention", attention_mask=mask)
    scores = circuits.head_scores(None, rec)
    for number, text in enumerate(texts):
        attention = model.record(torch.tensor(text), what="attention").attention
        for layer in range(2):
            for head in range(4):
                expected = scores_by_hand(attention[layer, head], text)
                found = {kind: scores[kind][number, layer, head] for kind in KINDS}
                torch.testing.assert_close(
                    torch.stack(list(found.values())),
                    torch.tensor([expected[kind] for kind in found], dtype=dtype),
                    equal_nan=True,
                    **TOL[dtype],
                )


def test_some_positions_give_the_mean_over_those_queries(tiny_model):
    tokens = torch.tensor([2, 10, 20, 10, 20, 10])
    attention = tiny_model.record(tokens, what="attention").attention
    rec = tiny_model.record(tokens, what="attention", pos=[3, -1], layers=[1], heads=[0, 2])
    scores = circuits.head_scores(None, rec)
    assert (scores.layers, scores.heads) == ([1], [0, 2])
    assert scores.counts["induction"] == 2
    rows = attention[1, [0, 2]]
    expected = (rows[:, 3, 2] + rows[:, 5, 2] + rows[:, 5, 4]) / 2
    torch.testing.assert_close(scores.induction, expected[None])
    expected = (rows[:, 3, 2] + rows[:, 5, 4]) / 2
    torch.testing.assert_close(scores.previous_token, expected[None])


def test_attention_that_is_left_out_makes_no_query_eligible(tiny_model):
    """With the first token left out, the second has no previous one."""
    tokens = torch.tensor([2, 10, 20, 10])
    rec = tiny_model.record(tokens, what="attention")
    scores = circuits.head_scores(None, rec, exclude="first")
    assert scores.counts["previous_token"] == 2
    rows = rec.attention[:, :, 2:]
    expected = rows[:, :, [0, 1], [1, 2]].sum(-1) / rows[..., 1:].sum((-2, -1))
    torch.testing.assert_close(scores.previous_token, expected)


def test_top_passes_over_heads_without_a_score():
    row = torch.tensor([[0.2, torch.nan, 0.9, torch.nan]])
    scores = circuits.HeadScores(*[row] * 6, layers=[3], heads=[0, 1, 4, 5])
    found = [(layer, head) for layer, head, _ in scores.top("induction", 2)]
    assert found == [(3, 4), (3, 0)]
    assert len(scores.top("induction", 4)) == 2


# --- TransformerLens -----------------------------------------------------------------------------


@pytest.fixture
def in_float64():
    """TransformerLens allots its tables in torch's default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("label", "exclude"),
    [("default", ()), ("exclude_bos", "first"), ("exclude_current_token", ("current",))],
)
@pytest.mark.parametrize("kind", MATCHES)
def test_scores_over_all_queries_are_those_of_transformerlens(kind, label, exclude):
    """The stored numbers of 2.18."""
    scores = circuits.head_scores(build_model(), tiny_opt.TEXT, queries="all", exclude=exclude)
    equal(scores[kind], STORED[f"detect/{THEIRS[kind]}/{label}"])


@pytest.mark.parametrize("kind", MATCHES)
def test_mean_over_prompts_is_that_of_the_installed_transformerlens(in_float64, kind):
    model = build_model()
    texts = [tiny_opt.TEXT, tiny_opt.CLEAN, " the cat saw the cat"]
    options = {"exclude_bos": True, "exclude_current_token": True}
    theirs = head_detector.detect_head(model, texts, THEIRS[kind], **options)
    ours = circuits.head_scores(model, texts, queries="all", exclude=("first", "current"))
    torch.testing.assert_close(ours.mean()[kind], theirs, **CLOSE)


# --- what the scores mean ------------------------------------------------------------------------


def test_perfect_heads_have_a_score_of_one():
    """Attention that is put in place of the model's: each kind by itself, and uniform attention."""
    model = random_model(tiny_config(), torch.float64)
    tokens = torch.tensor([2, 10, 20, 10, 20, 10])
    wanted = torch.zeros(4, 6, 6, dtype=torch.float64)
    for query in range(6):
        earlier = [key for key in range(query) if tokens[key] == tokens[query]] or [0]
        wanted[0, query, max(query - 1, 0)] = 1
        wanted[1, query, earlier] = 1 / len(earlier)
        wanted[2, query, [key + 1 if key else 0 for key in earlier]] = 1 / len(earlier)
        wanted[3, query, : query + 1] = 1 / (query + 1)
    with model.hooks([("blocks.1.attn.hook_pattern", lambda pattern, hook: wanted[None])]):
        scores = circuits.head_scores(model, tokens)
    one = torch.ones(4, dtype=torch.float64)
    for head, kind in enumerate(MATCHES):
        torch.testing.assert_close(scores[kind][1, head], one[head], **CLOSE)
    lengths = torch.arange(2, 7, dtype=torch.float64)
    torch.testing.assert_close(scores.entropy[1, 3], lengths.log().mean(), **CLOSE)
    torch.testing.assert_close(scores.distance[1, 3], ((lengths - 1) / 2).mean(), **CLOSE)
    torch.testing.assert_close(scores.first_token[1, 3], (1 / lengths).mean(), **CLOSE)
    torch.testing.assert_close(scores.distance[1, 0], one[0], **CLOSE)
    assert scores.entropy[1, 0] == 0


def repeated_loss(model, tokens: torch.Tensor, length: int) -> float:
    """Return the mean loss over the second half of blocks that were written twice."""
    loss = model.loss(tokens, per_token=True).detach()
    return float(loss[:, length + 1 :].mean())


def test_ablating_induction_heads_of_the_demo_ends_its_copying(demo):
    """The heads with the best scores; as many heads of the same layer with the worst do nothing."""
    length = 20
    pairs = prompts.induction(demo, 16, length=length)
    scores = circuits.head_scores(demo, pairs.clean).mean()
    layer, _, best = scores.top("induction", 1)[0]
    assert best > 0.9
    order = scores.induction[layer].argsort(descending=True).tolist()
    tokens = demo.to_tokens(pairs.clean)
    plain = repeated_loss(demo, tokens, length)
    losses = []
    for heads in (order[:5], order[5:]):
        with demo.intervene([Ablate("z", layer=layer, head=heads, mode="zero")]):
            losses.append(repeated_loss(demo, tokens, length))
    assert losses[0] - plain > 3.0  # nats: of some 8, which is not knowing
    assert losses[1] - plain < 0.2


def test_ablating_the_previous_token_head_of_the_demo_takes_induction_with_it(demo):
    """Induction heads look for a token whose *previous* one was this: that head tells them."""
    pairs = prompts.induction(demo, 16, length=20)
    before = circuits.head_scores(demo, pairs.clean).mean()
    heads = [found[:2] for found in before.top("previous_token", 2)]
    assert before.top("previous_token", 2)[1][2] > 0.9
    others = [found[:2] for found in before.top("entropy", 2)]

    def induction_without(heads: list[tuple[int, int]]) -> float:
        with demo.intervene([Ablate("z", layer=i, head=h, mode="zero") for i, h in heads]):
            return float(circuits.head_scores(demo, pairs.clean).mean().induction.max())

    assert induction_without(heads) < 0.5 < 0.9 < induction_without(others)


# --- the result, and what is refused -------------------------------------------------------------


def test_result(demo):
    pytest.importorskip("pandas")
    texts = ["The cat saw the dog and the cat", "Rain"]
    scores = circuits.head_scores(demo, texts)
    assert scores.is_batch and scores.induction.shape == (2, 5, 8)
    assert scores.induction[1].isnan().all() and scores.counts["induction"][1] == 0
    alone = circuits.head_scores(demo, texts[0])
    for kind in KINDS:
        torch.testing.assert_close(scores[kind][0], alone[kind], rtol=1e-4, atol=1e-5)
    mean = scores.mean()
    torch.testing.assert_close(mean.induction, scores.induction[0])
    torch.testing.assert_close(mean.entropy, scores.entropy.mean(0))
    assert mean.counts["previous_token"] == sum(scores.counts["previous_token"])
    assert mean.mean() is mean
    table = scores.to_dataframe()
    assert list(table.columns) == ["prompt", "layer", "head", *KINDS] and len(table) == 80
    row = table[(table.prompt == 0) & (table.layer == 3) & (table["head"] == 2)].iloc[0]
    assert row.distance == pytest.approx(float(scores.distance[0, 3, 2]))
    layer, head, score = scores.top("previous_token", 1)[0]
    assert score == pytest.approx(float(mean.previous_token[layer, head]))
    assert score == pytest.approx(float(mean.previous_token.max()))
    assert circuits.head_scores(demo, "Rain").top("induction") == []
    figure = scores.plot("first_token")
    assert figure.axes[-1].get_ylabel() == "attention to the first token"
    assert len(figure.axes[0].texts) == 40


def test_what_cannot_be_scored_is_refused(tiny_model):
    tokens = torch.tensor([2, 10, 20])
    with pytest.raises(NotRecordedError, match="not 'attention'"):
        circuits.head_scores(None, tiny_model.record(tokens, what="residual"))
    with pytest.raises(InputError, match="model is None"):
        circuits.head_scores(None, tokens)
    with pytest.raises(InputError, match="queries='some'"):
        circuits.head_scores(tiny_model, tokens, queries="some")
    with pytest.raises(InputError, match="exclude='last'"):
        circuits.head_scores(tiny_model, tokens, exclude="last")
    with pytest.raises(InputError, match="no score 'copying'; scores are previous_token"):
        circuits.head_scores(tiny_model, tokens)["copying"]


def test_layers_can_be_scored_alone(demo):
    recording = demo.record("The cat sat on the cat", what="attention", layers=[0, 2, 3])
    whole = circuits.head_scores(None, recording)
    one = circuits.head_scores(None, recording, layers=[3])
    assert one.layers == [3] and whole.layers == [0, 2, 3]
    for kind in KINDS:
        torch.testing.assert_close(one[kind], whole[kind][2:], rtol=0, atol=0)
    fresh = circuits.head_scores(demo, "The cat sat on the cat", layers=-2)
    assert fresh.layers == [3]
    # layers that nobody records take the fused path, which rounds otherwise
    torch.testing.assert_close(fresh.entropy, one.entropy, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="no layer 1; it has"):
        circuits.head_scores(None, recording, layers=[1, 2])


def test_heads_scored_one_at_a_time_have_the_scores_of_all_at_once(demo, monkeypatch):
    whole = circuits.head_scores(demo, "When Mary and John went to the store, John gave a drink to")
    monkeypatch.setattr("optlens.circuits.heads._AT_ONCE", 1)
    alone = circuits.head_scores(demo, "When Mary and John went to the store, John gave a drink to")
    for kind in KINDS:
        torch.testing.assert_close(alone[kind], whole[kind], equal_nan=True, **TOL[torch.float32])
