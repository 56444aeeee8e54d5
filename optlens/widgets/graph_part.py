"""The numbers of the contribution graph's view: the edges that a picture may come to draw.

A graph of a long prompt has more edges than a browser should hold. What goes straight up, a stream
or an MLP, is one number for each layer and token and travels whole; of what heads bring, the
strongest edges travel, and the weight below which they were left out travels with them. The picture
walks back from the end that is looked at; for graphs that were cut, it asks for more of that end.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from optlens.circuits import ContributionGraph, Edge
from optlens.report.markup import Html, el
from optlens.report.one_prompt import as_numpy
from optlens.report.pieces import token
from optlens.widgets.part import Part, QuestionError, check_same_prompts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from optlens.recording import Recording

FINEST = 0.01  # the least weight that a picture can be asked to draw
MOST_EDGES = 40_000  # of heads, in the state and in an answer: half a megabyte
THRESHOLD = 0.05  # of figures and plain tables, and of pictures at first
_MOST_DRAWN = 1500  # edges of a figure
_MOST_LISTED = 16  # edges of the plain table
_STRAIGHT = ("residual", "past_mlp", "mlp", "bias")


class GraphPart(Part):
    """Hold a contribution graph.

    Args:
        graph: as `optlens.circuits.contribution_graph` gives it.
        recording: the prompts that it was made of.

    Raises:
        ValueError: if the recording has other prompts.
    """

    kind = "graph"
    title = "Contribution graph"

    def __init__(self, graph: ContributionGraph, recording: "Recording"):
        super().__init__(recording)
        self.graph = graph
        tokens = graph.tokens if graph.is_batch else graph.tokens[None]
        check_same_prompts(recording, tokens.tolist(), "graph")

    # --------------------------------------------------------------------------- what it gives

    def state(self, prompt: int) -> dict[str, Any]:
        """Return all that goes straight up, and the strongest edges of heads."""
        attention = self._table("attention", prompt)
        n_layers, n_heads, n_pos, _ = attention.shape
        return {
            "measure": self.graph.measure,
            "size": [n_layers, n_heads, n_pos],
            "rows": self.graph.row_labels,
            "threshold": THRESHOLD,
            **{name: self._table(name, prompt) for name in _STRAIGHT},
            **_strongest(*_edges_of_heads(attention, None)),
        }

    def answer_routes(self, prompt: int, query: int) -> dict[str, Any]:
        """Return the edges of heads on the routes to the end of one token."""
        attention = self._table("attention", prompt)
        if query not in range(attention.shape[-1]):
            raise QuestionError(f"There is no token {query} in this prompt.")
        return _strongest(*_edges_of_heads(attention, self._reached(prompt, query)))

    def page_answers(self, prompt: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Give the routes to the last token, where the state could not hold all edges."""
        if self.state(prompt)["floor"] > FINEST:
            query = len(self.prompts[prompt].ids) - 1
            yield {"what": "routes", "query": query}, self.answer_routes(prompt, query)

    def counts(self) -> str:
        """Return the measure, layers, heads and tokens."""
        n_layers, n_heads = self.graph.attention.shape[-4:-2]
        size = f"layers={n_layers}, heads={n_heads}"
        return f"{self.graph.measure}, {size}, {self.token_counts()}"

    def figure(self, selected: dict[str, Any], style: str, detail: bool) -> "Figure":
        """Return the routes to the end; with `detail`, what leads into the selected place alone."""
        from optlens import plots

        prompt, end = selected["prompt"], self.end(selected)
        tokens = self.prompts[prompt].tokens
        edges = self._routes(prompt, end)
        title = f"What the last residual stream at {tokens[end]} is made of"
        if detail:
            row, column = self._place(selected)
            edges = [edge for edge in edges if edge.target == (row, column)]
            title = f"What is in {self.graph.row_labels[row]} at {tokens[column]}"
        return plots.contribution_graph(
            edges[:_MOST_DRAWN],
            tokens,
            rows=self.graph.row_labels,
            title=title,
            note=f"Edges of at least {100 * THRESHOLD:.0f} % ({self.graph.measure}), "
            "back from the end. Downwards: deeper layers.",
            style=style,
        )

    def fallback(self, prompt: int) -> list[Html]:
        """Return the strongest edges of heads and MLPs that lead to the last token."""
        one, rows = self.prompts[prompt], self.graph.row_labels
        edges = [edge for edge in self._routes(prompt, -1) if edge.part != "residual"]
        edges = sorted(edges, key=lambda edge: -edge.weight)[:_MOST_LISTED]
        body = [
            el(
                "tr",
                el("th", edge.part),
                el("td", token(one.tokens[edge.source[1]]), f" {edge.source[1]}"),
                el("td", token(one.tokens[edge.target[1]]), f" {edge.target[1]}"),
                el("td", rows[edge.target[0]]),
                el("td", f"{100 * edge.weight:.1f} %"),
            )
            for edge in edges
        ]
        caption = el(
            "caption",
            "What heads and MLPs bring on the way to the last residual stream after ",
            token(one.tokens[-1]),
            f": the strongest edges of at least {100 * THRESHOLD:.0f} %",
        )
        names = ("part", "from", "to", "stream", "weight")
        head = el("tr", [el("th", name) for name in names])
        return [el("table", caption, el("thead", head), el("tbody", body))]

    # ------------------------------------------------------------------------------- places

    def end(self, selected: dict[str, Any]) -> int:
        """Return the token whose last stream is looked at: the selected one, in the last layer."""
        n_layers, n_pos = self.graph.mlp.shape[-2], len(self.prompts[selected["prompt"]].ids)
        query = selected["query"]
        chosen = selected["layer"] == n_layers - 1 and query is not None and query < n_pos
        return query if chosen else n_pos - 1

    def _place(self, selected: dict[str, Any]) -> tuple[int, int]:
        """Return row and column of the selected place."""
        n_layers, n_pos = self.graph.mlp.shape[-2], len(self.prompts[selected["prompt"]].ids)
        layer, query = selected["layer"], selected["query"]
        row = 0 if layer == "embed" else 2 * min(n_layers, (layer or 0) + 1)
        return row, n_pos - 1 if query is None or query >= n_pos else query

    # ------------------------------------------------------------------------------- pieces

    def _table(self, name: str, prompt: int) -> np.ndarray:
        """Return one prompt's weights of one kind, real tokens only, float32."""
        values = as_numpy(self.prompts[prompt].pick(getattr(self.graph, name)))
        real = self.prompts[prompt].real
        if not real.all():
            values = values[..., real]
            values = values[..., real, :] if name == "attention" else values
        return values.astype(np.float32, copy=False)

    def _reached(self, prompt: int, query: int) -> np.ndarray:
        """Return which tokens' `resid_mid` the routes to one end go through, `[layer, pos]`."""
        attention = self._table("attention", prompt)
        straight = {name: self._table(name, prompt) >= FINEST for name in _STRAIGHT}
        reached = np.zeros(attention.shape[::2], bool)  # [layer, pos]
        here = np.arange(attention.shape[-1]) == query
        for layer in reversed(range(len(attention))):
            here &= straight["past_mlp"][layer] | straight["mlp"][layer]
            reached[layer] = here
            read = (attention[layer][:, here] >= FINEST).any((0, 1))
            here = here & straight["residual"][layer] | read
        return reached

    def _routes(self, prompt: int, end: int) -> list[Edge]:
        """Return `ContributionGraph.routes` with columns counted over real tokens."""
        real = self.prompts[prompt].real
        places = real.cumsum() - 1
        which = prompt if self.graph.is_batch else None
        return [
            edge._replace(
                source=(edge.source[0], int(places[edge.source[1]])),
                target=(edge.target[0], int(places[edge.target[1]])),
            )
            for edge in self.graph.routes(end, THRESHOLD, which)
        ]


def _edges_of_heads(
    attention: np.ndarray, reached: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """List the edges of at least `FINEST`, of all queries or of those reached.

    Args:
        attention: `[layer, head, query, key]`.
        reached: `[layer, query]`, or None for all.

    Returns:
        Their weights; layer times heads plus head; query times tokens plus key; each `[edge]`.
    """
    weights, heads, places = [], [], []
    n_heads, n_pos = attention.shape[1:3]
    for layer, of_layer in enumerate(attention):
        kept = of_layer >= FINEST
        if reached is not None:
            kept &= reached[layer][:, None]
        head, query, key = kept.nonzero()
        weights.append(of_layer[kept])
        heads.append(layer * n_heads + head)
        places.append(query * n_pos + key)
    return tuple(map(np.concatenate, (weights, heads, places)))


def _strongest(weights: np.ndarray, heads: np.ndarray, places: np.ndarray) -> dict[str, Any]:
    """Return at most about `MOST_EDGES` edges, and the weight from which on all are there."""
    floor = FINEST
    if len(weights) > MOST_EDGES:
        floor = float(np.partition(weights, -MOST_EDGES)[-MOST_EDGES])
        kept = weights >= floor
        weights, heads, places = weights[kept], heads[kept], places[kept]
    return {
        "floor": floor,
        "weights": weights.astype(np.float32),
        "heads": heads.astype(np.int32),
        "places": places.astype(np.int32),
    }
