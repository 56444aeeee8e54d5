"""A contribution graph: the weight of every edge, and the walk back from a prediction."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from optlens import checks
from optlens.metric_targets import columns_at

if TYPE_CHECKING:
    from optlens.recording import Recording


class Edge(NamedTuple):
    """A term of one sum.

    Attributes:
        weight: 0 to 1.
        part: "residual" (carried along), "L3H0" (a head) or "mlp3".
        source: The node it comes from: row and column of the graph.
        target: The node it goes into.
    """

    weight: float
    part: str
    source: tuple[int, int]
    target: tuple[int, int]


@dataclass(eq=False)
class ContributionGraph:
    """The weights of all edges; with a leading batch axis for a batch of prompts.

    A node is a residual stream at one place: row 0 is what the first block reads, row 2 L + 1 is
    `resid_mid` of layer L and row 2 L + 2 its `resid_post`; the column is the token's place in
    `tokens`, padding counted. For each query the weights into `resid_mid` add up to 1,
    `attention.sum over head and key + residual + bias`, and those into `resid_post`,
    `mlp + past_mlp`. All weights of padding are 0.

    Attributes:
        attention: What each head brings from each token, `[layer, head, query, key]`.
        residual: What goes past attention, `[layer, pos]`.
        bias: Attention's output bias, which comes from nowhere, `[layer, pos]`.
        mlp: What the MLP adds, `[layer, pos]`.
        past_mlp: What goes past the MLP, `[layer, pos]`.
        mask: True at real tokens, `[pos]`.
        tokens: Token ids, `[pos]`.
        measure: What the weights measure: "l1", "l2" or "projection".
        metadata: The tokens' texts and labels, the model's fingerprint.
        prompts: The prompts, as a recording that holds their tokens alone.
    """

    attention: Tensor
    residual: Tensor
    bias: Tensor
    mlp: Tensor
    past_mlp: Tensor
    mask: Tensor
    tokens: Tensor
    measure: str
    metadata: dict[str, Any] = field(default_factory=dict)
    prompts: Recording | None = None

    @property
    def is_batch(self) -> bool:
        """Whether there is a leading batch axis."""
        return self.mlp.ndim == 3

    @property
    def row_labels(self) -> list[str]:
        """Names of the rows of nodes: "embed", "0 mid", "0 post", ..., as in the logit lens."""
        n_layers = self.mlp.shape[-2]
        return ["embed", *(f"{layer} {at}" for layer in range(n_layers) for at in ("mid", "post"))]

    def edges(self, threshold: float = 0.05, prompt: int | None = None) -> list[Edge]:
        """Return the edges of at least this weight, strongest first.

        The bias has no edge, since it comes from no node. Edges of no weight are never listed.

        Args:
            threshold: The least weight, 0 to 1.
            prompt: Which prompt of a batch.

        Raises:
            InputError: If the threshold is outside 0 to 1, or it is not clear which prompt.
        """
        if not 0 <= threshold <= 1:
            raise checks.InputError(f"threshold={threshold}: weights are between 0 and 1.")
        found = []

        def add(weights: Tensor, name: str, layer: int, rows: tuple[int, int]) -> None:
            """List the entries of `[pos]` (straight up) or `[head, query, key]`."""
            kept = (weights >= threshold) & (weights > 0)
            for place, weight in zip(kept.nonzero().tolist(), weights[kept].tolist(), strict=True):
                head, target, source = place if len(place) == 3 else (None, *place * 2)
                part = name if head is None else f"L{layer}H{head}"
                found.append(Edge(weight, part, (rows[0], source), (rows[1], target)))

        tables = self._of(prompt)
        for layer in range(self.mlp.shape[-2]):
            before, mid, after = (2 * layer + step for step in range(3))
            add(tables["residual"][layer], "residual", layer, (before, mid))
            add(tables["attention"][layer], "head", layer, (before, mid))
            add(tables["past_mlp"][layer], "residual", layer, (mid, after))
            add(tables["mlp"][layer], f"mlp{layer}", layer, (mid, after))
        return sorted(found, key=lambda edge: -edge.weight)

    def routes(
        self, pos: int = -1, threshold: float = 0.05, prompt: int | None = None
    ) -> list[Edge]:
        """Return the edges that lead to the end of one column, from the last row down.

        Starting from the last residual stream of a token, edges of at least the threshold are
        followed back to the nodes they come from, and from these on.

        Args:
            pos: The token, counted over the prompt's real tokens.
            threshold: As in `edges`.
            prompt: As in `edges`.

        Returns:
            The edges by the row they go into, last row first, then strongest first.
        """
        real = self._of(prompt)["mask"]
        column = int(columns_at(real[None], pos))
        into: dict[tuple[int, int], list[Edge]] = {}
        for edge in self.edges(threshold, prompt):
            into.setdefault(edge.target, []).append(edge)
        rows = len(self.row_labels)
        reached, found = {(rows - 1, column)}, []
        for row in reversed(range(rows)):
            here = [into.get(node, []) for node in reached if node[0] == row]
            edges = sorted((edge for of in here for edge in of), key=lambda edge: -edge.weight)
            found += edges
            reached |= {edge.source for edge in edges}
        return found

    def _of(self, prompt: int | None) -> dict[str, Tensor]:
        """Return the tables of one prompt."""
        names = ("attention", "residual", "mlp", "past_mlp", "mask")
        tables = {name: getattr(self, name) for name in names}
        if not self.is_batch and prompt is None:
            return tables
        count = len(self.mlp) if self.is_batch else 1
        if prompt is None or not -count <= prompt < count:
            raise checks.InputError(
                f"prompt={prompt}: this graph is of {count} prompts; say which, 0 to {count - 1}."
            )
        return {name: table[prompt] for name, table in tables.items()} if self.is_batch else tables

    def __repr__(self) -> str:
        """Say how large it is."""
        layers, heads, pos = self.attention.shape[-4:-1]
        prompts = f"{len(self.mlp)} prompts, " if self.is_batch else ""
        return f"ContributionGraph({prompts}{layers} layers, {heads} heads, {pos} tokens; {self.measure})"
