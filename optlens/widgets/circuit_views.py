"""The views of an analysis rather than of a recording: who wrote the answer, and by which ways."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optlens.circuits import ContributionGraph
from optlens.lens.direct_result import LogitAttribution
from optlens.widgets.attribution_part import AttributionPart
from optlens.widgets.graph_part import GraphPart
from optlens.widgets.selection import Selection, selection_of
from optlens.widgets.view import View

if TYPE_CHECKING:
    from optlens.recording import Recording


class AttributionView(View):
    """Show which parts of the model wrote a logit or a logit difference, adding up to it.

    Args:
        attribution: what `optlens.direct_logit_attribution` found; with `by_source=True` also what
            each head wrote from each token.
        recording: the recording that it was made of, to link this view with the recording's own;
            None for a view that stands alone.
        selection: what is selected, to link views in another way.

    `to_png` and `to_svg` write the steps that add up, with `detail=True` the table of heads.

    Raises:
        ValueError: if the recording has other prompts than the attribution.

    Example:
        >>> import optlens
        >>> prompt = "When Mary and John went to the store, John gave a drink to"
        >>> model = optlens.load()
        >>> found = optlens.direct_logit_attribution(model, prompt, " Mary", " John")
        >>> optlens.widgets.AttributionView(found)
        AttributionView(logit_diff(' Mary', ' John'), parts=53, tokens=16)
    """

    kinds = ("attribution",)

    def __init__(
        self,
        attribution: LogitAttribution,
        recording: Recording | None = None,
        selection: Selection | None = None,
    ) -> None:
        source = _prompts(attribution, recording)
        part = AttributionPart(attribution, source)
        if selection is None and recording is None:
            heads = attribution.heads.mean(0) if attribution.is_batch else attribution.heads
            layer, head = divmod(int(heads.abs().argmax()), attribution.n_heads)
            selection = Selection(value={"layer": layer, "head": head})
        super().__init__(source, [part], selection or selection_of(source))


class GraphView(View):
    """Show what every residual stream is made of, and by which ways it came.

    Drawn is what leads to the last residual stream of one token, by edges of at least a weight that
    is chosen in the view. Selecting a token in the last layer, here or in a linked view, makes it
    that end; a node is selected as its layer and "query", a head's edge as that head and "key".

    Args:
        graph: what `optlens.circuits.contribution_graph` found.
        recording: the recording that it was made of, to link this view with the recording's own;
            None for a view that stands alone.
        selection: what is selected, to link views in another way.

    `to_png` and `to_svg` write the routes to the end, with `detail=True` what leads into the
    selected place alone.

    Raises:
        TypeError: if it is no contribution graph.
        ValueError: if the recording has other prompts than the graph.

    Example:
        >>> import optlens
        >>> prompt = "When Mary and John went to the store, John gave a drink to"
        >>> graph = optlens.circuits.contribution_graph(optlens.load(), prompt)
        >>> optlens.widgets.GraphView(graph)
        GraphView(l1, layers=5, heads=8, tokens=16)
    """

    kinds = ("graph",)

    def __init__(
        self,
        graph: ContributionGraph,
        recording: Recording | None = None,
        selection: Selection | None = None,
    ) -> None:
        if not isinstance(graph, ContributionGraph):
            raise TypeError(
                "GraphView takes what optlens.circuits.contribution_graph returns, not "
                f"{type(graph).__name__}."
            )
        source = _prompts(graph, recording)
        super().__init__(source, [GraphPart(graph, source)], selection or selection_of(source))


def _prompts(result: Any, recording: Recording | None) -> Recording:
    """Return the recording whose prompts a result is about."""
    found = result.prompts if recording is None else recording
    if found is None:
        raise ValueError(
            f"This {type(result).__name__} was made by hand and does not know its prompts; give "
            "recording=, a recording of them."
        )
    return found
