"""Edge attribution: estimates of what it does to the metric to corrupt each edge of the model.

EAP (Syed et al. 2023, arXiv 2310.10348): what the sender writes in the corrupt run minus what it
writes in the clean one, times the metric's gradient at the receiver's input in the clean run.
EAP-IG (Hanna et al. 2024, arXiv 2403.17806) averages the gradient over runs between the two, which
finds edges whose gradient happens to vanish at the clean run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optlens import checks
from optlens.files import read_tensors, write_tensors
from optlens.names import get_act_name
from optlens.patching.base_run import site_values
from optlens.patching.edge_graph import KINDS, Circuit, EdgeGraph, grown_from_end, strongest
from optlens.patching.gradients import GraphRun, differentiable_metric, graph_run
from optlens.patching.measure import AnyMetric
from optlens.patching.pairs import check_undivided, paired_tokens, undisturbed
from optlens.recording import fingerprint
from optlens.weights import effective_weight

if TYPE_CHECKING:
    from optlens.inputs import Prompt
    from optlens.model import OPTForCausalLM

METHODS = ("eap", "eap-ig")
KIND = "edge scores"
PORTION_BYTES = 2**27  # of what senders write, computed at once


@dataclass(eq=False)
class EdgeScores:
    """The score of every edge: how much corrupting it alone changes the metric, as estimated.

    A negative score belongs to an edge that supports the metric in the clean run.

    Attributes:
        scores: The mean over prompts, `[senders, receivers]` on the CPU; 0 where there is no edge.
        graph: What the rows and columns are.
        metadata: What was done: method, metric, prompts, model fingerprint.
    """

    scores: Tensor
    graph: EdgeGraph
    metadata: dict[str, Any] = field(default_factory=dict)

    def top(self, count: int = 10) -> list[tuple[str, str, float]]:
        """Return the edges with the largest scores in size: sender, receiver, score."""
        chosen = strongest(self.scores, self.graph, self._counted(count)).nonzero().tolist()
        named = [
            (self.graph.senders[s], self.graph.receivers[r], float(self.scores[s, r]))
            for s, r in chosen
        ]
        return sorted(named, key=lambda edge: -abs(edge[2]))

    def circuit(self, count: int, how: str = "top") -> Circuit:
        """Choose edges to keep.

        Args:
            count: How many.
            how: "top" takes the largest scores in size. "greedy" starts at the end and adds, one
                by one, the largest that leads into what is there; the circuit hangs together.

        Raises:
            InputError: If there are not so many edges.
        """
        if how not in ("top", "greedy"):
            raise checks.InputError(f"how={how!r}: give 'top' or 'greedy'.")
        choose = strongest if how == "top" else grown_from_end
        return Circuit(choose(self.scores, self.graph, self._counted(count)), self.graph)

    def of_senders(self) -> Tensor:
        """Sum over the edges that leave a sender, `[senders]`: what it does to corrupt it."""
        return self.scores.sum(1)

    def _counted(self, count: int) -> int:
        most = int(self.graph.exists.sum())
        if not 0 <= count <= most:
            raise checks.InputError(f"{count} edges were asked for; this model has 0 to {most:,}.")
        return count

    def save(self, path: str | os.PathLike) -> None:
        """Write the scores to one safetensors file, by way of a temporary name."""
        about = {"n_layers": self.graph.n_layers, "n_heads": self.graph.n_heads}
        about |= {"kind": KIND, "metadata": self.metadata}
        write_tensors(path, {"scores": self.scores.contiguous()}, about)

    @classmethod
    def load(cls, path: str | os.PathLike) -> EdgeScores:
        """Read what `save` wrote."""
        tensors, about = read_tensors(path, KIND)
        graph = EdgeGraph(about["n_layers"], about["n_heads"])
        return cls(tensors["scores"], graph, about["metadata"])

    def __repr__(self) -> str:
        """Say what was scored, and the three largest."""
        best = ", ".join(f"{s} -> {r} {score:.3g}" for s, r, score in self.top(3))
        return (
            f"EdgeScores({self.metadata.get('method')}, {int(self.graph.exists.sum()):,} edges; "
            f"{self.metadata.get('metric')}; {best})"
        )


def edge_attribution(
    model: OPTForCausalLM,
    clean: Prompt,
    corrupt: Prompt,
    metric: AnyMetric | None = None,
    method: str = "eap",
    steps: int = 5,
    attention_mask: Tensor | None = None,
) -> EdgeScores:
    """Estimate for every edge how the metric of the clean run changes if that edge is corrupted.

    The score of an edge is the sum over positions, and the mean over prompts, of (sender's output
    in the corrupt run - in the clean run) * gradient of the metric at the receiver's input. The
    sign is the metric's own: papers that differentiate a loss have the opposite one.

    Args:
        model: The model; pre-LN.
        clean: The prompt, or prompts, with the answer that is asked for.
        corrupt: As many prompts, each of as many tokens as its clean one.
        metric: One of `optlens.metrics` that has a gradient, or a function of logits.
        method: "eap" takes the gradient at the clean run. "eap-ig" takes the mean of those at
            token embeddings `corrupt + k / steps * (clean - corrupt)` for k from 1 to `steps`; with
            one step it is "eap".
        steps: Runs of "eap-ig".
        attention_mask: As for `patch_sweep`.

    Returns:
        The scores, in units of the metric.

    Raises:
        InputError: If the model is post-LN, the prompts do not fit together, or the metric has no
            gradient that says something.

    Example:
        >>> import optlens
        >>> from optlens.metrics import logit_diff
        >>> model = optlens.load()
        >>> clean = "While Mary and John were at the store, John gave a book to"
        >>> corrupt = "While Mary and John were at the store, Mary gave a book to"
        >>> scores = edge_attribution(model, clean, corrupt, logit_diff(" Mary", " John"))
        >>> len(scores.circuit(100))
        100
    """
    if method not in METHODS:
        raise checks.InputError(f"method={method!r}: the methods are {', '.join(METHODS)}.")
    if steps < 1:
        raise checks.InputError(f"steps={steps}: the gradient is the mean of at least one run's.")
    check_undivided(model)
    graph = graph_of(model)
    metric = differentiable_metric(metric, at_clean=method == "eap" or steps == 1)
    (clean_tokens, corrupt_tokens), mask = paired_tokens(model, clean, corrupt, attention_mask)
    steps = steps if method == "eap-ig" else 1
    with undisturbed(model):
        outputs = [sender_values(model, t, mask) for t in (clean_tokens, corrupt_tokens)]
        bound = metric.bind(model, clean_tokens, mask)
        if bound.needs_clean:
            keep = {"logits_to_keep": bound.columns, "use_cache": False}
            bound = bound.with_clean(model(clean_tokens, attention_mask=mask, **keep).logits)
        scores = torch.zeros(graph.exists.shape, dtype=torch.float64)
        ends = [values["embed"][0] for values in outputs]
        for step in range(1, steps + 1):
            embed = torch.lerp(ends[1], ends[0], step / steps)
            run = graph_run(model, clean_tokens, mask, bound, reader_names(model), embed)
            scores += _scores(model, graph, run, outputs) / steps
    about = {"method": method, "steps": steps, "metric": str(metric)}
    about |= {"clean": clean_tokens.tolist(), "corrupt": corrupt_tokens.tolist()}
    return EdgeScores(scores, graph, about | {"model": fingerprint(model)})


def graph_of(model: OPTForCausalLM) -> EdgeGraph:
    """Return the edges of a model.

    Raises:
        InputError: If it is post-LN.
    """
    if not model.config.do_layer_norm_before:
        raise checks.InputError(
            "This model normalises the residual stream after every sub-layer (post-LN), so what a "
            "reader gets is no sum of what the parts wrote, and there are no edges to score. "
            "attribution_patch and patch_sweep work on it."
        )
    return EdgeGraph(model.config.n_layers, model.config.n_heads)


def sender_values(model, tokens: Tensor, mask: Tensor | None) -> dict[str, list[Tensor]]:
    """Run once and keep what senders write: embed, z of each head, mlp_out, as `site_values`."""
    values, _ = site_values(model, tokens, mask, {"embed", "z", "mlp_out"})
    return values


def reader_names(model) -> list[str]:
    """Return the hooks from whose gradients all receivers' gradients follow."""
    layers, names = range(model.config.n_layers), ("resid_pre", "q", "k", "v", "mlp_in")
    return [get_act_name(name, layer) for layer in layers for name in names] + [
        get_act_name("resid_post", layers[-1])
    ]


def head_outputs(model, layer: int, z: Tensor) -> Tensor:
    """Turn z `[..., head, d_head]` into what each head writes, `[..., head, d_model]`, without b_O."""
    attention = model.decoder.layers[layer].self_attn
    weight = effective_weight(attention.out_proj)
    return torch.einsum("...he,dhe->...hd", z, weight.unflatten(1, (attention.n_heads, -1)))


def portions(graph: EdgeGraph, values: Tensor) -> Iterator[slice]:
    """Divide prompts so that what all senders write in each portion fits `PORTION_BYTES`.

    Args:
        graph: The edges.
        values: What one sender writes, `[prompts, pos, d_model]`.
    """
    each = len(graph.senders) * values[0].numel() * values.element_size()
    size = max(1, PORTION_BYTES // each)
    for first in range(0, len(values), size):
        yield slice(first, first + size)


def _scores(
    model, graph: EdgeGraph, run: GraphRun, outputs: list[dict[str, list[Tensor]]]
) -> Tensor:
    """Multiply differences of senders with gradients of receivers, `[senders, receivers]`.

    Args:
        model: The model.
        graph: Its edges.
        run: The run whose gradients are taken.
        outputs: What senders write in the clean and in the corrupt run.
    """
    names = [name for name in run.values if "resid_pre" not in name]
    gradients = run.gradients(run.total, names)
    n_outputs = 1 if run.shared else len(run.metric)
    scores = torch.zeros(graph.exists.shape, dtype=torch.float64)
    for part in portions(graph, outputs[0]["embed"][0]):
        change = sender_changes(model, graph, outputs[0], outputs[1], part)

        def score(at: slice, gradient: Tensor, before: int, change: Tensor = change) -> None:
            products = torch.einsum("bpsd,bprd->sr", change[:, :, :before], gradient)
            scores[:before, at] += products.double().cpu() / n_outputs

        for layer in range(graph.n_layers):
            resid = run.values[get_act_name("resid_pre", layer)][part].detach()
            for kind in KINDS:
                through = gradients[get_act_name(kind, layer)][part]
                through = _at_input(model, layer, kind, resid, through)
                score(graph.inputs(layer, kind), through, graph.heads(layer).start)
            at_mlp = gradients[get_act_name("mlp_in", layer)][part].unsqueeze(2)
            score(graph.inputs(layer, "mlp"), at_mlp, graph.mlp(layer).start)
        at_end = gradients[get_act_name("resid_post", graph.n_layers - 1)][part].unsqueeze(2)
        score(slice(-1, None), at_end, len(graph.senders))
    return scores


def sender_changes(
    model,
    graph: EdgeGraph,
    before: dict[str, list[Tensor]],
    after: dict[str, list[Tensor]],
    part: slice,
) -> Tensor:
    """Subtract what senders write in two runs, `[prompts, pos, senders, d_model]`, in a portion."""
    first = before["embed"][0][part]
    change = first.new_empty(*first.shape[:2], len(graph.senders), first.shape[2])
    change[:, :, 0] = after["embed"][0][part] - first
    for layer in range(graph.n_layers):
        z = after["z"][layer][part] - before["z"][layer][part]
        change[:, :, graph.heads(layer)] = head_outputs(model, layer, z)
        mlp = after["mlp_out"][layer][part] - before["mlp_out"][layer][part]
        change[:, :, graph.mlp(layer)] = mlp.unsqueeze(2)
    return change


def _at_input(model, layer: int, kind: str, resid: Tensor, gradient: Tensor) -> Tensor:
    """Carry the gradient at queries, keys or values back to each head's own copy of the stream.

    Args:
        model: The model.
        layer: The block.
        kind: "q", "k" or "v".
        resid: What the block reads, `[prompts, pos, d_model]`.
        gradient: At the heads' queries, keys or values, `[prompts, pos, head, d_head]`.

    Returns:
        `[prompts, pos, head, d_model]`.
    """
    block = model.decoder.layers[layer]
    weight = effective_weight(getattr(block.self_attn, f"{kind}_proj"))
    weight = weight.detach().unflatten(0, (block.self_attn.n_heads, -1))
    at_norm = torch.einsum("bphe,hed->bphd", gradient, weight)
    with torch.enable_grad():
        stream = resid.unsqueeze(2).expand_as(at_norm).requires_grad_()
        normalised = block.self_attn_layer_norm(stream, shown=False)
        return torch.autograd.grad(normalised, stream, at_norm)[0]
