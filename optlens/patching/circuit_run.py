"""Runs of a circuit: its edges carry this run's values, all others those of the corrupt run.

This is the exact counterpart of edge attribution. Each receiver reads the corrupt run's stream plus,
for every edge of the circuit that leads to it, what the sender now writes instead of what it wrote
in the corrupt run. LayerNorms are computed on what is read, and nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optlens import checks
from optlens.hooks import HookPoint
from optlens.metrics import as_metric
from optlens.names import get_act_name
from optlens.patching.base_run import site_values
from optlens.patching.edge_graph import KINDS, Circuit
from optlens.patching.edges import EdgeScores, graph_of, head_outputs, portions
from optlens.patching.measure import AnyMetric
from optlens.patching.pairs import check_undivided, paired_tokens, undisturbed
from optlens.patching.result import PatchResult
from optlens.recording import fingerprint

if TYPE_CHECKING:
    from optlens.inputs import Prompt
    from optlens.model import OPTForCausalLM

COUNTS = 12  # circuits of a curve, where the caller names none


def faithfulness(
    model: OPTForCausalLM,
    clean: Prompt,
    corrupt: Prompt,
    circuits: EdgeScores | Circuit | Sequence[Circuit],
    metric: AnyMetric | None = None,
    counts: Iterable[int] | None = None,
    how: str = "top",
    attention_mask: Tensor | None = None,
) -> PatchResult:
    """Run circuits with all other edges corrupted, and measure what is left of the answer.

    Args:
        model: The model; pre-LN.
        clean: The prompt, or prompts, with the answer that is asked for; best not those that the
            edges were scored on.
        corrupt: As many prompts, each of as many tokens as its clean one.
        circuits: Circuits; or scores, of which circuits of `counts` edges are taken.
        metric: One of `optlens.metrics`, or a function of logits `[prompts, pos, d_vocab]`.
        counts: Numbers of edges; unless given, twelve from 1 to all, each a multiple of the last.
        how: How circuits are taken from scores; see `EdgeScores.circuit`.
        attention_mask: As for `patch_sweep`.

    Returns:
        A curve over the axis "edges": `values` is the metric of each circuit, and `normalized`
        its faithfulness, 1 for the whole model and 0 for the corrupt run.

    Raises:
        InputError: If the model is post-LN, or circuits, counts or prompts do not fit.

    Example:
        >>> import optlens
        >>> from optlens.metrics import logit_diff
        >>> model, metric = optlens.load(), logit_diff(" Mary", " John")
        >>> pair = [f"While Mary and John were at the store, {name} gave a book to"
        ...         for name in ("John", "Mary")]
        >>> scores = edge_attribution(model, *pair, metric)  # doctest: +SKIP
        >>> faithfulness(model, *pair, scores, metric, counts=[50, 500]).normalized  # doctest: +SKIP
    """
    if metric is None:
        raise checks.InputError(
            "Say what to measure: metric=optlens.metrics.logit_diff(' Mary', ' John'), for one."
        )
    check_undivided(model)
    graph, metric = graph_of(model), as_metric(metric)
    circuits = _chosen(circuits, counts, how, graph)
    (clean_tokens, corrupt_tokens), mask = paired_tokens(model, clean, corrupt, attention_mask)
    with undisturbed(model):
        runner = CircuitRunner(model, clean_tokens, corrupt_tokens, mask)
        bound = metric.bind(model, clean_tokens, mask)
        columns = bound.columns.to(clean_tokens.device)
        keep = {"attention_mask": mask, "logits_to_keep": columns, "use_cache": False}
        ends = [model(tokens, **keep).logits for tokens in (clean_tokens, corrupt_tokens)]
        bound = bound.with_clean(ends[0]) if bound.needs_clean else bound
        values = [bound(runner.logits(circuit, columns)).cpu() for circuit in circuits]
        ends = [bound(logits).cpu() for logits in ends]
    sizes = [len(circuit) for circuit in circuits]
    about = {"site": "edges", "metric": str(metric), "model": fingerprint(model)}
    about |= {"clean": clean_tokens.tolist(), "corrupt": corrupt_tokens.tolist()}
    return PatchResult(
        torch.stack(values),
        *ends,
        ("edges",),
        {"edges": [str(size) for size in sizes]},
        {"edges": sizes},
        about,
    )


def _chosen(circuits, counts, how: str, graph) -> list[Circuit]:
    """Bring what `faithfulness` was given to a list of circuits of this model."""
    if isinstance(circuits, EdgeScores):
        if counts is None:
            most = int(graph.exists.sum())
            counts = sorted({round(most ** (i / (COUNTS - 1))) for i in range(COUNTS)})
        circuits = [circuits.circuit(int(count), how) for count in counts]
    elif counts is not None:
        raise checks.InputError("counts= goes with scores; given circuits have their own sizes.")
    circuits = [circuits] if isinstance(circuits, Circuit) else list(circuits)
    if not circuits:
        raise checks.InputError("There is no circuit to run: counts or circuits are empty.")
    for circuit in circuits:
        if not isinstance(circuit, Circuit) or circuit.graph != graph:
            raise checks.InputError(
                f"{circuit!r} is no circuit of this model, which has {graph.n_layers} layers of "
                f"{graph.n_heads} heads. EdgeScores.circuit and Circuit.of make them."
            )
    return circuits


class CircuitRunner:
    """Runs circuits of one model on one set of prompt pairs."""

    def __init__(self, model, clean: Tensor, corrupt: Tensor, mask: Tensor | None) -> None:
        """Run the corrupt prompts once, `[prompts, pos]`, and keep what all receivers read there."""
        self.model, self.clean, self.mask = model, clean, mask
        self.graph = graph_of(model)
        names = {"embed", "z", "mlp_out", "resid_pre", "resid_mid"}
        self.base, self.final = site_values(model, corrupt, mask, names)

    def logits(self, circuit: Circuit, columns: Tensor) -> Tensor:
        """Run a circuit.

        Args:
            circuit: Its edges.
            columns: Where logits are wanted, `[prompts, n_read]`.

        Returns:
            `[prompts, n_read, d_vocab]`.
        """
        parts = portions(self.graph, self.final)
        return torch.cat([self._run(circuit, columns, part) for part in parts])

    def _run(self, circuit: Circuit, columns: Tensor, part: slice) -> Tensor:
        """Run a circuit on a portion of the prompts."""
        graph, final = self.graph, self.final[part]
        edges = circuit.edges.to(final)
        change = final.new_zeros(*final.shape[:2], len(graph.senders), final.shape[2])

        def write(senders: slice, values: Tensor) -> None:
            change[:, :, senders] = values

        def read(base: Tensor, receivers: slice) -> Tensor:
            """Give the receivers their input, `[prompts, pos, receivers, d_model]`."""
            read = torch.einsum("bpsd,sr->bprd", change, edges[:, receivers])
            return read.add_(base.unsqueeze(2))

        edits, records = self._hooks(part, write, read)
        tokens = self.clean[part]
        mask = None if self.mask is None else self.mask[part]
        points = self.model.match_hooks(list(records))
        with (
            self.model.hooks(edits),
            self.model.recorders(points, lambda value, hook: records[hook.name](value)),
        ):
            run = self.model(
                tokens, attention_mask=mask, use_cache=False, logits_to_keep=columns[part]
            )
        return run.logits

    def _hooks(self, part: slice, write, read) -> tuple[list, dict]:
        """Make the hook functions of a run: what receivers read, and what senders write."""
        graph, base = self.graph, {name: [v[part] for v in vs] for name, vs in self.base.items()}
        edits, records = [], {}

        def reads(name: str, layer: int, at: slice, stream: Tensor) -> None:
            def edit(value: Tensor, hook: HookPoint) -> Tensor:
                given = read(stream, at)
                return given if value.ndim == 4 else given.squeeze(2)

            edits.append((get_act_name(name, layer), edit))

        def heads(layer: int, z: Tensor) -> None:
            z = z - base["z"][layer]
            write(graph.heads(layer), head_outputs(self.model, layer, z))

        def mlp(layer: int, out: Tensor) -> None:
            write(graph.mlp(layer), (out - base["mlp_out"][layer]).unsqueeze(2))

        def embed(value: Tensor) -> None:
            write(slice(0, 1), (value - base["embed"][0]).unsqueeze(2))

        records[get_act_name("embed")] = embed
        for layer in range(graph.n_layers):
            for kind in KINDS:
                at = graph.inputs(layer, kind)
                reads(f"{kind}_input", layer, at, base["resid_pre"][layer])
            reads("mlp_in", layer, graph.inputs(layer, "mlp"), base["resid_mid"][layer])
            records[get_act_name("z", layer)] = lambda z, layer=layer: heads(layer, z)
            records[get_act_name("mlp_out", layer)] = lambda out, layer=layer: mlp(layer, out)
        reads("resid_post", graph.n_layers - 1, slice(-1, None), self.final[part])
        return edits, records
