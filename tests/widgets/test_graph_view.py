"""The contribution graph's view: its numbers are those of the graph, whatever part of them travels."""

import re

import numpy as np
import pytest
import torch
from conftest import padded, random_model, tiny_config
from page_reader import Page
from twice import has_three_pictures, same_when_made_again

from optlens.circuits import contribution_graph
from optlens.widgets import AttentionView, GraphView, graph_part
from optlens.widgets.graph_part import GraphPart
from optlens.widgets.page import contents
from optlens.widgets.part import QuestionError

IDS = torch.tensor([2, 5, 17, 5, 9, 30, 12])
HOSTILE = {5: "<script>alert(1)</script>", 9: "\u202eevil</script>"}
WHAT = ("attention", "v", "resid_pre", "resid_mid", "mlp_out", "resid_post")


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config(num_hidden_layers=3))


@pytest.fixture
def graph(model):
    return contribution_graph(model, IDS)


def table(state: dict, n_heads: int, n_pos: int) -> np.ndarray:
    """Return the edges of heads that a state holds as `[layer, head, query, key]`, else 0."""
    found = np.zeros((3, n_heads, n_pos, n_pos), np.float32)
    layer, head = np.divmod(state["heads"], n_heads)
    query, key = np.divmod(state["places"], n_pos)
    found[layer, head, query, key] = state["weights"]
    return found


# --- numbers -------------------------------------------------------------------------------------


def test_the_state_holds_every_edge_that_can_be_drawn(graph):
    state = GraphPart(graph, graph.prompts).state(0)
    assert state["size"] == [3, 4, 7] and state["rows"] == graph.row_labels
    weights = graph.attention.numpy()
    expected = np.where(weights >= graph_part.FINEST, weights, 0)
    np.testing.assert_array_equal(table(state, 4, 7), expected)
    assert state["floor"] == graph_part.FINEST
    for name in ("residual", "past_mlp", "mlp", "bias"):
        np.testing.assert_array_equal(state[name], getattr(graph, name))
    # what travels adds up to 1 but for the weakest edges
    into_mid = state["residual"] + state["bias"] + weights.sum((1, 3))
    np.testing.assert_allclose(into_mid, 1, atol=1e-5)


def test_a_large_graph_travels_by_its_strongest_edges_and_the_routes_that_are_asked_for(
    graph, monkeypatch
):
    monkeypatch.setattr(graph_part, "MOST_EDGES", 12)
    part = GraphPart(graph, graph.prompts)
    state = part.state(0)
    strongest = np.sort(graph.attention.numpy(), axis=None)[-12:]
    np.testing.assert_array_equal(np.sort(state["weights"]), strongest)
    assert state["floor"] == strongest[0] > graph_part.FINEST
    [(question, answer)] = part.page_answers(0)
    assert question == {"what": "routes", "query": 6} and answer["floor"] >= graph_part.FINEST
    monkeypatch.setattr(graph_part, "MOST_EDGES", 10_000)
    for end in (2, 6):
        routed = table(part.answer(0, "routes", query=end), 4, 7)
        wanted = {
            (int(edge.part[1]), int(edge.part[3:]), edge.target[1], edge.source[1])
            for edge in graph.routes(end, graph_part.FINEST)
            if edge.part.startswith("L")
        }
        assert set(zip(*(axis.tolist() for axis in routed.nonzero()), strict=True)) == wanted
    with pytest.raises(QuestionError, match="no token 7"):
        part.answer(0, "routes", query=7)


def test_prompts_of_a_padded_batch_are_counted_without_their_padding(model):
    tokens, mask = padded([4, 7], left=True, seed=3)
    recording = model.record(tokens, what=WHAT, attention_mask=mask)
    part = GraphPart(contribution_graph(None, recording), recording)
    alone = contribution_graph(model, tokens[0, 3:])
    state = part.state(0)
    assert state["size"] == [3, 4, 4]
    np.testing.assert_allclose(state["mlp"], alone.mlp, rtol=1e-3, atol=1e-5)
    expected = alone.attention.numpy()
    # an edge at the limit may fall on either side of it
    np.testing.assert_allclose(table(state, 4, 4), expected, atol=graph_part.FINEST + 1e-4)
    places = {edge.source[1] for edge in part._routes(0, -1)}
    assert places <= set(range(4)) and 3 in places


# --- the view ------------------------------------------------------------------------------------


def test_it_is_linked_and_its_end_is_the_token_selected_in_the_last_layer(model):
    recording = model.record(IDS, what=WHAT)
    view, heads = (
        GraphView(contribution_graph(None, recording), recording),
        AttentionView(recording),
    )
    part = view._parts[0]
    assert part.end(view.selected) == 6
    heads.selected = {"layer": 2, "query": 3}
    assert part.end(view.selected) == 3
    heads.selected = {"layer": 1, "query": 4}
    assert part.end(view.selected) == 6  # a place on the way is no end
    view.selected = {"layer": "embed", "query": 1}
    assert heads.selected["layer"] == "embed" and part._place(view.selected) == (0, 1)


def test_other_things_and_other_prompts_are_refused(model, graph):
    with pytest.raises(TypeError, match="contribution_graph returns, not int"):
        GraphView(3)
    with pytest.raises(ValueError, match="recording that the graph was made of"):
        GraphView(graph, model.record(IDS.flip(0)))
    graph.prompts = None
    with pytest.raises(ValueError, match="give recording="):
        GraphView(graph)


def test_a_graph_keeps_its_tokens_and_no_activation(graph):
    assert set(graph.prompts._tensors) == {"tokens", "mask"}
    assert graph.prompts.tokens.tolist() == IDS.tolist()


def test_pages_names_and_pictures_are_the_same_on_every_run(model, tmp_path):
    view = same_when_made_again(lambda: GraphView(contribution_graph(model, IDS, "l2")), tmp_path)
    has_three_pictures(view, tmp_path)
    assert repr(view) == "GraphView(l2, layers=3, heads=4, tokens=7)"
    assert contents(view)["answers"] == []  # such a graph fits whole


def test_hostile_text_is_text_in_page_and_plain_markup(graph, tmp_path):
    graph.prompts.metadata["labels"] = {str(token): text for token, text in HOSTILE.items()}
    graph.prompts.metadata["prompts"] = ["".join(HOSTILE.values())]
    view = GraphView(graph)
    view.to_html(tmp_path / "page.html")
    view.to_png(tmp_path / "page.png")
    source = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<" not in source.split('id="contents">')[1].split("</script>")[0]
    assert not re.search("[\u202a-\u202e\u2066-\u2069]", source)
    plain = Page(view._repr_mimebundle_()[0]["text/html"])
    allowed = set("div p b table caption thead tbody tr th td bdi br small img".split())
    assert {tag for tag, _ in plain.tags} <= allowed and plain.all("table")


def test_the_plain_table_lists_the_strongest_edges_on_the_routes(graph):
    html = GraphView(graph)._repr_mimebundle_()[0]["text/html"]
    rows = re.findall(r"<tr><th>([^<]+)</th><td>.*?([\d.]+) %</td></tr>", html)
    edges = [edge for edge in graph.routes(-1, graph_part.THRESHOLD) if edge.part != "residual"]
    edges = sorted(edges, key=lambda edge: -edge.weight)[:16]
    assert rows == [(edge.part, f"{100 * edge.weight:.1f}") for edge in edges]
