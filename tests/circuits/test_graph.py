"""Weights into every node add up to one, and are what the residual stream loses with each term."""

from __future__ import annotations

import pytest
import torch
from conftest import TOL, VARIANTS, random_model, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

import optlens
from optlens import Knockout, circuits, metrics, prompts
from optlens.checks import InputError
from optlens.circuits import graph as module
from optlens.recording import NotRecordedError

ADDITIVE = [name for name, options in VARIANTS.items() if options.get("do_layer_norm_before", True)]
TOKENS = torch.tensor([2, 10, 20, 30, 10, 50, 60])
WHAT = ("attention", "v", "resid_pre", "resid_mid", "mlp_out", "resid_post")
MEASURES = ("l1", "l2", "projection")
CLOSE = TOL[torch.float64]


@pytest.fixture(scope="module")
def demo():
    return optlens.load()


def loss_without(measure: str, whole: torch.Tensor, without: torch.Tensor) -> torch.Tensor:
    """Return what `whole` loses by becoming `without`, `[...]`, by definition."""
    if measure == "projection":
        return ((whole - without) * whole).sum(-1).clamp_min(0)
    order = int(measure[1])
    return (whole.norm(order, dim=-1) - without.norm(order, dim=-1)).clamp_min(0)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("name", ADDITIVE)
def test_weights_are_what_the_stream_loses_when_a_term_is_erased(name, measure):
    """Each value, each output is erased in a run of its own, all else of the block held."""
    model = random_model(tiny_config(**VARIANTS[name]), torch.float64)
    layer, at = 1, "blocks.1."
    mid, post = at + "hook_resid_mid", at + "hook_resid_post"
    mlp, out = at + "hook_mlp_out", at + "hook_attn_out"
    _, cache = model.run_with_cache(TOKENS, [mid, post, mlp, out, at + "hook_resid_pre"])

    def stream_when(hook_name: str, edit, keep: str, held: tuple[str, ...] = ()) -> torch.Tensor:
        hooks = [
            (hook_name, edit),
            *((each, lambda value, hook: cache[hook.name]) for each in held),
        ]
        with model.hooks(hooks):
            return model.run_with_cache(TOKENS, keep)[1][keep][0]

    gains = torch.zeros(4, 7, 7, dtype=torch.float64)  # [head, query, key]
    for head in range(4):
        for key in range(7):

            def erase(v, hook, head=head, key=key):
                v[:, key, head] = 0.0

            without = stream_when(at + "attn.hook_v", erase, mid)
            gains[head, :, key] = loss_without(measure, cache[mid][0], without)
    nothing = stream_when(at + "hook_resid_pre", lambda v, hook: 0 * v, mid, held=(out,))
    carried = loss_without(measure, cache[mid][0], nothing)
    b_o = model.decoder.layers[layer].self_attn.out_proj.bias
    bias = torch.zeros(7, dtype=torch.float64)
    if b_o is not None:
        bias = loss_without(measure, cache[mid][0], stream_when(out, lambda v, hook: v - b_o, mid))
    total = gains.sum((0, 2)) + carried + bias
    graph = circuits.contribution_graph(model, TOKENS, measure)
    torch.testing.assert_close(graph.attention[layer], gains / total[None, :, None], **CLOSE)
    torch.testing.assert_close(graph.residual[layer], carried / total, **CLOSE)
    torch.testing.assert_close(graph.bias[layer], bias / total, **CLOSE)

    whole = cache[post][0]
    added = loss_without(measure, whole, stream_when(mlp, lambda v, hook: 0 * v, post))
    past = loss_without(measure, whole, stream_when(mid, lambda v, hook: 0 * v, post, held=(mlp,)))
    torch.testing.assert_close(graph.mlp[layer], added / (added + past), **CLOSE)
    torch.testing.assert_close(graph.past_mlp[layer], past / (added + past), **CLOSE)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(ADDITIVE),
    st.sampled_from(MEASURES),
    st.sampled_from([torch.float32, torch.float64]),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.booleans(),
    st.integers(0, 10_000),
)
def test_weights_add_up_to_one_and_padding_changes_nothing(
    name, measure, dtype, lengths, left, seed
):
    model = random_model(tiny_config(**VARIANTS[name]), dtype, seed)
    longest = max(lengths)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 101, (len(lengths), longest), generator=generator)
    place = torch.arange(longest)
    mask = torch.stack([place >= longest - n if left else place < n for n in lengths]).long()
    rec = model.record(tokens, what=WHAT, attention_mask=mask)
    graph = circuits.contribution_graph(None, rec, measure)
    tables = ("attention", "residual", "bias", "mlp", "past_mlp")
    assert all((getattr(graph, table) >= 0).all() for table in tables)
    mid = graph.attention.sum((2, 4)) + graph.residual + graph.bias
    post = graph.mlp + graph.past_mlp
    real = mask[:, None].expand_as(mid).to(dtype)
    torch.testing.assert_close(mid, real, **TOL[dtype])
    torch.testing.assert_close(post, real, **TOL[dtype])
    for number in range(len(lengths)):
        here = mask[number].bool()
        alone = circuits.contribution_graph(model, tokens[number][here], measure)
        for table in tables:
            found = getattr(graph, table)[number][..., here]
            if table == "attention":
                found = found[:, :, here]
            # a difference of two nearly equal norms in float32
            close = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else CLOSE
            torch.testing.assert_close(found, getattr(alone, table), **close)


@pytest.mark.parametrize("measure", MEASURES)
def test_terms_that_cancel_share_by_their_lengths(tiny_model, measure):
    """The MLP takes all of the stream away again: nothing cannot lose any length."""
    opposite = {}

    def remember(value, hook):
        opposite["mid"] = value.clone()

    hooks = [
        ("blocks.0.hook_resid_mid", remember),
        ("blocks.0.hook_mlp_out", lambda value, hook: -opposite["mid"]),
    ]
    with tiny_model.hooks(hooks):
        graph = circuits.contribution_graph(tiny_model, TOKENS, measure)
    torch.testing.assert_close(graph.mlp[0], torch.full((7,), 0.5))
    torch.testing.assert_close(graph.past_mlp[0], torch.full((7,), 0.5))
    # and what follows starts from nothing, where heads and bias are all there is
    assert (graph.residual[1] == 0).all()
    total = graph.attention.sum((1, 3)) + graph.residual + graph.bias
    torch.testing.assert_close(total, torch.ones(2, 7))


def test_heads_that_cancel_share_by_their_lengths(tiny_model):
    def opposed(value, hook):
        return value.zero_()

    hooks = [("blocks.1.hook_resid_mid", opposed), ("blocks.1.hook_resid_pre", opposed)]
    with tiny_model.hooks(hooks):
        rec = tiny_model.record(TOKENS, what=(*WHAT, "attention", "v"))
    graph = circuits.contribution_graph(tiny_model, rec)
    moved = circuits.value_weighted_attention(tiny_model, rec)[1]
    bias = tiny_model.b_O[1].norm().detach()
    total = moved.sum((0, 2)) + bias
    torch.testing.assert_close(graph.attention[1], moved / total[None, :, None])
    torch.testing.assert_close(graph.bias[1], bias / total)


def test_chunks_change_nothing(tiny_model, monkeypatch):
    whole = circuits.contribution_graph(tiny_model, TOKENS)
    monkeypatch.setattr(module, "CHUNK_BYTES", 3 * 7 * 32 * 4)  # three queries
    chunked = circuits.contribution_graph(tiny_model, TOKENS)
    torch.testing.assert_close(chunked.attention, whole.attention)


# --- edges and routes --------------------------------------------------------------------------


def test_edges_are_the_weights_from_the_threshold_on(tiny_model):
    graph = circuits.contribution_graph(tiny_model, TOKENS)
    assert graph.row_labels == ["embed", "0 mid", "0 post", "1 mid", "1 post"]
    edges = graph.edges(0.1)
    weights = [edge.weight for edge in edges]
    assert weights == sorted(weights, reverse=True) and min(weights) >= 0.1
    tables = (graph.attention, graph.residual, graph.mlp, graph.past_mlp)
    assert len(edges) == sum(int((table >= 0.1).sum()) for table in tables)
    for weight, part, (source_row, source), (row, target) in edges:
        layer, after = divmod(row - 1, 2)
        assert source_row == row - 1
        if part.startswith("L"):
            head = int(part.split("H")[1])
            assert part == f"L{layer}H{head}" and not after
            expected = graph.attention[layer, head, target, source]
        elif part.startswith("mlp"):
            assert part == f"mlp{layer}" and after and source == target
            expected = graph.mlp[layer, target]
        else:
            assert part == "residual" and source == target
            expected = (graph.past_mlp if after else graph.residual)[layer, target]
        assert weight == pytest.approx(float(expected))
    assert all(edge.weight > 0 for edge in graph.edges(0.0))


def test_routes_are_the_edges_that_lead_to_the_end(tiny_model):
    graph = circuits.contribution_graph(tiny_model, TOKENS)
    threshold = 0.03
    for pos in (-1, 3):
        leads, expected = {(4, pos % 7)}, set()
        for row in (4, 3, 2, 1):
            edges = graph.edges(threshold)
            here = {e for e in edges if e.target in leads and e.target[0] == row}
            expected |= here
            leads |= {edge.source for edge in here}
        assert len({node for node in leads if node[0] == 0}) > 1  # more than straight up
        routes = graph.routes(pos, threshold)
        assert set(routes) == expected and len(routes) == len(expected)
        order = [(-edge.target[0], -edge.weight) for edge in routes]
        assert order == sorted(order)


def test_edges_of_a_batch_are_those_of_one_prompt(demo):
    texts = ["Rain fell", "The cat sat on the mat"]
    graph = circuits.contribution_graph(demo, texts)
    alone = circuits.contribution_graph(demo, texts[0])
    shift = graph.mlp.shape[-1] - alone.mlp.shape[-1]
    found, expected = graph.routes(threshold=0.05, prompt=0), alone.routes(threshold=0.05)
    assert len(found) == len(expected) > 10
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.weight == pytest.approx(theirs.weight, rel=1e-3)
        assert ours.target == (theirs.target[0], theirs.target[1] + shift)
    with pytest.raises(InputError, match="2 prompts; say which"):
        graph.edges()
    with pytest.raises(InputError, match="prompt=2"):
        graph.edges(prompt=2)
    assert "2 prompts" in repr(graph) and "2 prompts" not in repr(alone)


def test_cutting_the_strongest_attention_edges_costs_the_answer(demo):
    """Edges into the last token of the demo's name prompts: the strongest against the next ones."""
    pairs = prompts.ioi(demo, 6, seed=1)
    lost = {"strongest": 0.0, "weakest": 0.0}
    for pair in pairs:
        metric = metrics.logit_diff(pair.answer, pair.wrong)
        routes = circuits.contribution_graph(demo, pair.clean).edges(0.0)
        end = len(demo.to_tokens(pair.clean)[0]) - 1
        into = [e for e in routes if e.part.startswith("L") and e.target[1] == end]
        plain = metric.of(demo, pair.clean)
        for name, edges in (("strongest", into[:8]), ("weakest", into[-8:])):
            cuts = [
                Knockout(
                    layers=int(edge.part[1]), query=end, key=edge.source[1], heads=int(edge.part[3])
                )
                for edge in edges
            ]
            with demo.intervene(cuts):
                lost[name] += float((plain - metric.of(demo, pair.clean)).abs()) / len(pairs)
    assert lost["strongest"] > 1.0
    assert lost["weakest"] < 0.01


# --- what is refused ---------------------------------------------------------------------------


def test_bad_requests(tiny_model, tmp_path):
    with pytest.raises(InputError, match="post-LN"):
        circuits.contribution_graph(random_model(tiny_config(**VARIANTS["post_ln_350m"])), TOKENS)
    with pytest.raises(InputError, match="measure='l3'"):
        circuits.contribution_graph(tiny_model, TOKENS, "l3")
    for missing in WHAT:
        rec = tiny_model.record(TOKENS, what=[name for name in WHAT if name != missing])
        with pytest.raises(NotRecordedError, match=f"not '{missing}'"):
            circuits.contribution_graph(None, rec)
    for option in ({"layers": [0]}, {"heads": [0]}, {"pos": [0, 1]}):
        with pytest.raises(NotRecordedError, match=f"without {next(iter(option))}="):
            circuits.contribution_graph(None, tiny_model.record(TOKENS, what=WHAT, **option))
    graph = circuits.contribution_graph(tiny_model, TOKENS)
    for threshold in (-0.1, 1.1):
        with pytest.raises(InputError, match="between 0 and 1"):
            graph.edges(threshold)
    with pytest.raises(InputError, match="pos=7"):
        graph.routes(7)
    tiny_model.record(TOKENS, what=WHAT).save(tmp_path / "rec.safetensors")
    loaded = optlens.Recording.load(tmp_path / "rec.safetensors")
    with pytest.raises(NotRecordedError, match="attach"):
        circuits.contribution_graph(None, loaded)
    found = circuits.contribution_graph(tiny_model, loaded)
    torch.testing.assert_close(found.attention, graph.attention)
