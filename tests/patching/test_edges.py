"""Edge attribution and circuits: against hand-written hooks, attribution patching and true runs."""

import pytest
import torch

import optlens
from optlens import metrics
from optlens.checks import InputError
from optlens.names import get_act_name
from optlens.patching import (
    Circuit,
    EdgeGraph,
    EdgeScores,
    PatchResult,
    attribution_patch,
    edge_attribution,
    faithfulness,
    patch_sweep,
)
from optlens.patching.edges import graph_of
from optlens.prompts import ioi
from tests.patching.test_attribution import make_close_pair
from tests.patching.test_sweep import (
    METRIC,
    VARIANTS,
    last_difference,
    make_model,
    make_prompts,
    padded_as_text,
)


def written(model, tokens, mask=None):
    """Return what each sender writes, by name, by way of the hooks that show it."""
    _, cache = model.run_with_cache(tokens, lambda name: True, attention_mask=mask)
    wanted = [name for name in model.hook_dict if "hook_result" in name]
    results = model.run_with_cache(tokens, wanted, attention_mask=mask)[1]
    found = {"embed": cache["hook_embed"]}
    for layer in range(model.config.n_layers):
        for head in range(model.config.n_heads):
            found[f"L{layer}H{head}"] = results[wanted[layer]][:, :, head]
        found[f"mlp{layer}"] = cache[get_act_name("mlp_out", layer)]
    return found


def receiver_hook(model, receiver):
    """Return the hook at which a receiver's input can be edited, and its head if it has one."""
    if receiver == "final":
        return get_act_name("resid_post", model.config.n_layers - 1), None
    if receiver.startswith("mlp"):
        return get_act_name("mlp_in", int(receiver[3:])), None
    layer, head, kind = receiver[1:].replace("H", " ").replace(".", " ").split()
    return get_act_name(f"{kind}_input", int(layer)), int(head)


def corrupt_one_edge(model, clean, corrupt, sender, receiver, mask=None):
    """Run the clean prompts with one term of one receiver's input replaced, by a hook function.

    The sender comes before the receiver, so in this run it still writes what it does in the clean one.
    """
    change = written(model, corrupt, mask)[sender] - written(model, clean, mask)[sender]
    name, head = receiver_hook(model, receiver)

    def edit(value, hook):
        if head is None:
            value += change
        else:
            value[:, :, head] += change

    with torch.no_grad():
        logits = model.run_with_hooks(clean, fwd_hooks=[(name, edit)], attention_mask=mask)
    return last_difference(logits)


def all_edges(graph):
    return Circuit(graph.exists.clone(), graph)


def without(graph, sender, receiver):
    circuit = all_edges(graph)
    circuit.edges[graph.senders.index(sender), graph.receivers.index(receiver)] = False
    return circuit


# one of each kind, near and far
EDGES = [
    ("embed", "L0H1.q"),
    ("embed", "L2H0.k"),
    ("embed", "mlp1"),
    ("L0H2", "mlp0"),
    ("L0H2", "L1H3.v"),
    ("L1H0", "L2H1.k"),
    ("mlp0", "L1H1.q"),
    ("mlp0", "mlp2"),
    ("L2H3", "mlp2"),
    ("L2H3", "final"),
    ("mlp2", "final"),
]


# ------------------------------------------------------------------------------ running circuits


@pytest.mark.parametrize("variant", ["pre-LN", "no final norm, gelu", "no bias"])
def test_all_edges_are_the_clean_run_and_none_the_corrupt_one(variant):
    model = make_model(**VARIANTS[variant])
    clean, corrupt, _, _ = make_prompts()
    graph = graph_of(model)
    circuits = [all_edges(graph), Circuit.of(graph, [])]
    result = faithfulness(model, clean, corrupt, circuits, METRIC)
    with torch.no_grad():
        ends = [last_difference(model(tokens).logits) for tokens in (clean, corrupt)]
    torch.testing.assert_close(result.per_prompt, torch.stack(ends), atol=1e-11, rtol=1e-9)
    torch.testing.assert_close(result.normalized, torch.tensor([1.0, 0.0]).double())
    assert result.choices == {"edges": [int(graph.exists.sum()), 0]}


@pytest.mark.parametrize("padded", [False, True])
def test_leaving_out_one_edge_equals_a_hand_written_path_patch(padded, monkeypatch):
    model = make_model()
    clean, corrupt, mask, _ = make_prompts(padded)
    given = padded_as_text(model, monkeypatch, clean, corrupt, mask) if padded else (clean, corrupt)
    circuits = [without(graph_of(model), *edge) for edge in EDGES]
    result = faithfulness(model, *given, circuits, METRIC)
    expected = [corrupt_one_edge(model, clean, corrupt, *edge, mask) for edge in EDGES]
    torch.testing.assert_close(result.per_prompt, torch.stack(expected), atol=1e-11, rtol=1e-9)
    assert (result.per_prompt - result.clean_per_prompt).abs().max(-1).values.min() > 1e-4


@pytest.mark.parametrize(
    ("sender", "site"), [("L1H2", "z"), ("mlp1", "mlp_out"), ("embed", "embed")]
)
def test_leaving_out_all_edges_of_a_sender_equals_patching_it(sender, site):
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    graph = graph_of(model)
    circuit = all_edges(graph)
    circuit.edges[graph.senders.index(sender)] = False
    found = faithfulness(model, clean, corrupt, circuit, METRIC).per_prompt[0]
    over = {"z": ("layer", "head"), "mlp_out": ("layer",), "embed": ("pos",)}[site]
    if site == "embed":  # at all positions at once: the corrupt run
        with torch.no_grad():
            expected = last_difference(model(corrupt).logits)
    else:
        # patched whole: the sender writes its corrupt value, and all others what follows from it
        swept = patch_sweep(
            model, clean, corrupt, site, over, METRIC, "noise", layers=[1], progress=False
        )
        expected = swept.per_prompt[0, 2] if site == "z" else swept.per_prompt[0]
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-9)


def test_any_circuit_equals_one_computed_receiver_by_receiver():
    model = make_model(num_hidden_layers=2)
    clean, corrupt, _, _ = make_prompts()
    graph = graph_of(model)
    draw = torch.rand(graph.exists.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    circuit = Circuit(graph.exists & draw, graph)
    kept = set(circuit.pairs)
    corrupted = written(model, corrupt)
    _, bases = model.run_with_cache(corrupt)
    outputs = {"embed": written(model, clean)["embed"]}

    def stream(receiver, base):
        terms = [outputs[s] - corrupted[s] for s in graph.senders if (s, receiver) in kept]
        return base + sum(terms)

    # a pass for every sender: earlier senders' values stand, so that its own comes out right
    for sender in (*graph.senders[1:], None):
        edits, seen = [], {}
        for receiver in graph.receivers:
            if not all(s in outputs for s, r in kept if r == receiver):
                continue
            name, head = receiver_hook(model, receiver)
            site = "resid_mid" if "mlp_in" in name else "resid_pre"
            layer = model.hook_dict[name].layer()
            base = bases[name] if receiver == "final" else bases[get_act_name(site, layer)]

            def edit(value, hook, receiver=receiver, head=head, base=base):
                at = (..., slice(None)) if head is None else (slice(None), slice(None), head)
                value[at] = stream(receiver, base)

            edits.append((name, edit))
        with torch.no_grad(), model.hooks(edits):
            logits = model(clean).logits
            seen = written(model, clean)
        if sender is not None:
            outputs[sender] = seen[sender]
    result = faithfulness(model, clean, corrupt, circuit, METRIC)
    torch.testing.assert_close(result.per_prompt[0], last_difference(logits), atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("padded", [False, True])
def test_portions_of_prompts_give_the_same_numbers(padded, monkeypatch):
    model = make_model()
    clean, corrupt, mask, _ = make_prompts(padded)
    given = padded_as_text(model, monkeypatch, clean, corrupt, mask) if padded else (clean, corrupt)
    scores = edge_attribution(model, *given, METRIC)
    whole = faithfulness(model, *given, scores, METRIC, [40])
    monkeypatch.setattr("optlens.patching.edges.PORTION_BYTES", 1)
    again = edge_attribution(model, *given, METRIC)
    torch.testing.assert_close(again.scores, scores.scores)
    parts = faithfulness(model, *given, scores, METRIC, [40])
    torch.testing.assert_close(parts.per_prompt, whole.per_prompt)


# ----------------------------------------------------------------------------------------- scores


def test_scores_equal_what_single_edges_do_where_differences_are_small():
    model = make_model()
    clean, corrupt, _ = make_close_pair(model, 1e-7)
    scores = edge_attribution(model, clean, corrupt, METRIC)
    with torch.no_grad():
        unpatched = last_difference(model(clean).logits)
    changes = [
        (corrupt_one_edge(model, clean, corrupt, *edge) - unpatched).mean() for edge in EDGES
    ]
    graph = scores.graph
    found = [scores.scores[graph.senders.index(s), graph.receivers.index(r)] for s, r in EDGES]
    largest = max(abs(float(change)) for change in changes)
    assert largest > 0
    # the second order is 1e-7 of the first, times curvatures that reach a thousand
    torch.testing.assert_close(
        torch.stack(found), torch.stack(changes), rtol=0, atol=1e-3 * largest
    )


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("variant", ["pre-LN", "no bias"])
def test_scores_of_a_senders_edges_add_up_to_attribution_patching(variant, padded, monkeypatch):
    model = make_model(**VARIANTS[variant])
    clean, corrupt, mask, _ = make_prompts(padded)
    given = padded_as_text(model, monkeypatch, clean, corrupt, mask) if padded else (clean, corrupt)
    scores = edge_attribution(model, *given, METRIC)
    nodes = scores.of_senders()

    def term(site, over):
        result = attribution_patch(model, *given, site, over, METRIC, direction="noise")
        return result.values - result.clean

    graph, heads, mlps = scores.graph, term("z", ("layer", "head")), term("mlp_out", "layer")
    if not padded:  # else a sweep over positions leaves out those that not all prompts have
        torch.testing.assert_close(nodes[0], term("embed", "pos").sum())
    for layer in range(3):
        torch.testing.assert_close(nodes[graph.heads(layer)], heads[layer])
        torch.testing.assert_close(nodes[graph.mlp(layer)], mlps[layer, None])
    assert (scores.scores[~graph.exists] == 0).all()
    # in the last block only the last query is read, which has the same token in both
    assert (scores.scores[graph.exists] != 0).double().mean() > 0.9


def test_integrated_gradients_of_the_embedding_add_up_to_the_whole_difference():
    model = make_model(activation_function="gelu", init_std=0.3)
    clean, corrupt, _, _ = make_prompts()
    with torch.no_grad():
        ends = [last_difference(model(tokens).logits).mean() for tokens in (clean, corrupt)]
    gaps = []
    for steps in (20, 200):
        scores = edge_attribution(model, clean, corrupt, METRIC, "eap-ig", steps)
        gaps.append(abs(float(scores.of_senders()[0] - (ends[1] - ends[0]))))
    size = abs(float(ends[1] - ends[0]))
    assert gaps[1] < 0.02 * size
    assert gaps[1] < 0.2 * gaps[0]  # the error goes with one over steps


def test_one_step_of_integrated_gradients_is_the_plain_gradient():
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    plain = edge_attribution(model, clean, corrupt, METRIC)
    one = edge_attribution(model, clean, corrupt, METRIC, "eap-ig", steps=1)
    five = edge_attribution(model, clean, corrupt, METRIC, "eap-ig", steps=5)
    torch.testing.assert_close(one.scores, plain.scores)
    assert not torch.allclose(five.scores, plain.scores)


def test_the_divergence_from_the_clean_run_needs_integrated_gradients():
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    with pytest.raises(InputError, match="eap-ig"):
        edge_attribution(model, clean, corrupt, metrics.kl())
    with pytest.raises(InputError, match="vanishes there"):
        edge_attribution(model, clean, corrupt, metrics.kl(), "eap-ig", steps=1)
    scores = edge_attribution(model, clean, corrupt, metrics.kl(), "eap-ig")
    assert scores.scores.abs().max() > 1e-3
    with torch.no_grad():
        target = model(clean).logits[:, -1].log_softmax(-1)

    def divergence(logits):
        return (target.exp() * (target - logits[:, -1].log_softmax(-1))).sum(-1)

    by_hand = edge_attribution(model, clean, corrupt, divergence, "eap-ig")
    torch.testing.assert_close(scores.scores, by_hand.scores)
    result = faithfulness(model, clean, corrupt, scores, metrics.kl(), [200])
    assert result.clean == pytest.approx(0, abs=1e-12)


def test_callables_give_the_mean_over_prompts():
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    expected = edge_attribution(model, clean, corrupt, METRIC).scores
    for function in (last_difference, lambda logits: last_difference(logits).mean()):
        found = edge_attribution(model, clean, corrupt, function)
        torch.testing.assert_close(found.scores, expected)


# --------------------------------------------------------------------------------------- circuits


def test_pruning_changes_no_run_and_leaves_only_paths_from_end_to_end():
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    scores = edge_attribution(model, clean, corrupt, METRIC)
    circuits = [scores.circuit(count) for count in (5, 20, 60)]
    pruned = [circuit.pruned() for circuit in circuits]
    assert any(len(small) < len(large) for small, large in zip(pruned, circuits, strict=True))
    before, after = (faithfulness(model, clean, corrupt, c, METRIC) for c in (circuits, pruned))
    torch.testing.assert_close(before.per_prompt, after.per_prompt)
    dead = Circuit.of(scores.graph, [("embed", "L0H0.q"), ("L1H0", "final"), ("embed", "mlp0")])
    assert len(dead.pruned()) == 0
    whole = [("embed", "L0H0.v"), ("L0H0", "mlp1"), ("mlp1", "final")]
    assert Circuit.of(scores.graph, whole).pruned().pairs == whole


def test_greedy_circuits_hang_together_at_the_end():
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    scores = edge_attribution(model, clean, corrupt, METRIC)
    for count in (1, 10, 50):
        circuit = scores.circuit(count, "greedy")
        assert len(circuit) == count
        entered = {name.partition(".")[0] for _, name in circuit.pairs}
        assert entered - {"final"} <= set(circuit.nodes)
    # the first edge is the largest into the end; with all edges both ways agree
    ends = scores.scores[:, -1].abs()
    assert scores.circuit(1, "greedy").pairs == [(scores.graph.senders[ends.argmax()], "final")]
    everything = int(scores.graph.exists.sum())
    assert torch.equal(scores.circuit(everything, "greedy").edges, scores.circuit(everything).edges)


def test_the_best_edges_keep_more_than_the_worst():
    model = make_model(init_std=0.3)
    clean, corrupt, _, _ = make_prompts()
    scores = edge_attribution(model, clean, corrupt, METRIC, "eap-ig", steps=10)
    graph = scores.graph
    best = scores.circuit(150)
    rest = Circuit(graph.exists & ~best.edges, graph)
    result = faithfulness(model, clean, corrupt, [best, rest], METRIC)
    gap = (result.per_prompt - result.clean_per_prompt).abs().mean(-1)
    assert gap[0] < 0.5 * gap[1]


def test_the_demo_model_solves_the_task_with_few_edges():
    """Edges are scored on some prompts and the circuit is run on others."""
    model = optlens.load()
    train, held = (ioi(model, 8, seed=seed) for seed in (0, 1))
    kept = {}
    for method in ("eap", "eap-ig"):
        scores = edge_attribution(
            model, list(train.clean), list(train.corrupt), train.metric(), method
        )
        result = faithfulness(
            model, list(held.clean), list(held.corrupt), scores, held.metric(), [100]
        )
        kept[method] = float(result.normalized[0])
    assert int(scores.graph.exists.sum()) > 2000
    assert min(kept.values()) > 0.9, kept  # 100 of over 2,000 edges; measured: 0.97 and 0.96


def test_a_curve_has_both_ends_and_is_saved(tmp_path):
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    scores = edge_attribution(model, clean, corrupt, METRIC)
    result = faithfulness(model, clean, corrupt, scores, METRIC)
    counts = result.choices["edges"]
    assert counts[0] == 1
    assert counts[-1] == int(scores.graph.exists.sum())
    assert counts == sorted(counts)
    assert result.labels["edges"] == [str(count) for count in counts]
    assert float(result.normalized[-1]) == pytest.approx(1)
    result.save(tmp_path / "curve.safetensors")
    assert torch.equal(PatchResult.load(tmp_path / "curve.safetensors").values, result.values)
    scores.save(tmp_path / "scores.safetensors")
    loaded = EdgeScores.load(tmp_path / "scores.safetensors")
    assert torch.equal(loaded.scores, scores.scores)
    assert (loaded.graph, loaded.metadata, repr(loaded)) == (
        scores.graph,
        scores.metadata,
        repr(scores),
    )


def test_the_largest_edges_come_first():
    graph = EdgeGraph(1, 1)
    scores = torch.zeros(graph.exists.shape)
    scores[0, 0], scores[1, 3], scores[2, 4] = 0.5, -2.0, 1.0
    top = EdgeScores(scores, graph).top(3)
    assert top == [("L0H0", "mlp0", -2.0), ("mlp0", "final", 1.0), ("embed", "L0H0.q", 0.5)]


def test_only_edges_that_exist_are_chosen_though_their_scores_be_zero():
    graph = EdgeGraph(2, 2)
    scores = EdgeScores(torch.zeros(graph.exists.shape), graph)
    for how in ("top", "greedy"):
        chosen = scores.circuit(int(graph.exists.sum()) - 1, how)
        assert not (chosen.edges & ~graph.exists).any()


def test_a_curve_of_greedy_circuits():
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    scores = edge_attribution(model, clean, corrupt, METRIC)
    circuits = [scores.circuit(count, "greedy") for count in (3, 12)]
    assert not any(torch.equal(c.edges, scores.circuit(len(c)).edges) for c in circuits)
    found = faithfulness(model, clean, corrupt, scores, METRIC, [3, 12], how="greedy")
    expected = faithfulness(model, clean, corrupt, circuits, METRIC)
    torch.testing.assert_close(found.per_prompt, expected.per_prompt)


# ------------------------------------------------------------------------------------ bad input


def test_post_ln_models_are_refused_with_the_reason():
    model = make_model(**VARIANTS["350m"])
    clean, corrupt, _, _ = make_prompts()
    for method in (edge_attribution, lambda *a: faithfulness(*a[:3], [], a[3])):
        with pytest.raises(InputError, match="post-LN"):
            method(model, clean, corrupt, METRIC)


def test_bad_arguments_say_what_would_be_right():
    model = make_model()
    clean, corrupt, _, _ = make_prompts()
    graph = graph_of(model)
    scores = EdgeScores(torch.zeros(graph.exists.shape), graph)
    other = Circuit.of(EdgeGraph(1, 1), [])
    for call, message in [
        (lambda: edge_attribution(model, clean, corrupt), "what to measure"),
        (lambda: edge_attribution(model, clean, corrupt, METRIC, "ig"), "eap, eap-ig"),
        (lambda: edge_attribution(model, clean, corrupt, METRIC, "eap-ig", 0), "at least one"),
        (lambda: edge_attribution(model, clean[:1], corrupt, METRIC), "1 clean and 2 corrupt"),
        (lambda: faithfulness(model, clean, corrupt, scores), "what to measure"),
        (lambda: faithfulness(model, clean, corrupt, other, METRIC), "no circuit of this model"),
        (lambda: faithfulness(model, clean, corrupt, [], METRIC), "no circuit to run"),
        (lambda: faithfulness(model, clean, corrupt, [other], METRIC, [3]), "goes with scores"),
        (lambda: scores.circuit(10**6), "this model has 0 to"),
        (lambda: scores.circuit(3, "best"), "'top' or 'greedy'"),
        (lambda: Circuit.of(graph, [("L0H9", "final")]), "no edge 'L0H9' -> 'final'"),
        (lambda: Circuit.of(graph, [("mlp1", "L1H0.q")]), "not computed before"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
