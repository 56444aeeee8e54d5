"""Runs of path patching: what senders change in the stream, and what receivers make of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optlens import checks
from optlens.names import get_act_name
from optlens.patching.base_run import BaseRun
from optlens.patching.budget import bytes_of, compiled_bytes, portion_budget
from optlens.patching.path_nodes import PathCell, PathGrid, Receivers, Sender
from optlens.patching.plan import MOST_TOKENS

if TYPE_CHECKING:
    from optlens.hooks import HookPoint
    from optlens.model import OPTForCausalLM


@dataclass(frozen=True, eq=False)
class PathRow:
    """One entry of the result for one prompt.

    Attributes:
        index: Its place in the flattened result.
        cell: Which components send.
        prompt: Which prompt.
        columns: The columns at which they send something else than in the base run, `[n]`.
    """

    index: int
    cell: PathCell
    prompt: int
    columns: Tensor

    @property
    def layer(self) -> int:
        """The first block in which something is sent."""
        return max(0, min(sender.layer for sender in self.cell.senders))


class PathWave:
    """Runs many paths of one pair of runs side by side."""

    def __init__(
        self,
        model: OPTForCausalLM,
        base: BaseRun,
        sources: dict[str, list[Tensor]],
        receivers: Receivers,
        differs: Tensor,
        freeze_mlps: bool,
    ) -> None:
        """Keep what all paths share.

        Args:
            model: The model.
            base: The base run, with resid_pre, z, attn_out and mlp_out.
            sources: z, mlp_out, embed and pos_embed of the source run.
            receivers: Where paths end.
            differs: True at real tokens from the first difference on, `[prompts, pos]` on the CPU.
            freeze_mlps: Whether MLPs are held at their base values.
        """
        self.model, self.base, self.sources, self.differs = model, base, sources, differs
        self.receivers, self.freeze_mlps = receivers, freeze_mlps
        self.n_layers = model.config.n_layers
        self.heads = (model.config.n_heads, model.config.d_head)

    # ------------------------------------------------------------------------ what has to be run

    def rows_of(self, grid: PathGrid) -> list[PathRow]:
        """List the entries that have a path to the receivers and something new to send along it."""
        last = self.receivers.stage(self.n_layers)
        rows, news_of = [], cache(self._news)
        for index, cell in enumerate(grid.cells):
            senders = tuple(sender for sender in cell.senders if sender.stage < last)
            if not senders:
                continue
            news = torch.stack([news_of(sender) for sender in senders]).any(0)
            for prompt, at in enumerate(news):
                if cell.pos is not None:
                    column = grid.columns[prompt, cell.pos]
                    at = at & (torch.arange(len(at)) == column)
                if at.any():
                    columns = at.nonzero().flatten().to(self.base.final.device)
                    rows.append(PathRow(index, PathCell(senders, cell.pos), prompt, columns))
        return sorted(rows, key=lambda row: (row.layer, row.index))

    def _news(self, sender: Sender) -> Tensor:
        """Tell where a component's value differs between the runs, `[prompts, pos]`."""
        base, sources, layer = self.base.values, self.sources, sender.layer
        if sender.what == "embed":
            changed = base["resid_pre"][0] != self._embedding()
        elif sender.what == "mlp":
            changed = base["mlp_out"][layer] != sources["mlp_out"][layer]
        else:
            head = sender.what
            changed = base["z"][layer][:, :, head] != sources["z"][layer][:, :, head]
        known = checks.on_host(changed.any(-1))
        return self.differs if known is None else known & self.differs

    def _embedding(self) -> Tensor:
        return self.sources["embed"][0] + self.sources["pos_embed"][0]

    def portions(self, rows: list[PathRow], memory_budget: int | None) -> Iterator[list[PathRow]]:
        """Divide rows into portions that fit into memory; those of an entry stay together.

        Raises:
            MemoryError: If the budget is too small for the two runs and one entry.
        """
        length, config = self.base.tokens.shape[1], self.model.config
        each = length * (12 * config.d_model + 2 * config.d_mlp) * self.base.final.element_size()
        entries: dict[int, list[PathRow]] = {}
        for row in rows:
            entries.setdefault(row.index, []).append(row)
        left = portion_budget(
            memory_budget,
            bytes_of(self.base.values, self.sources),
            compiled_bytes(config),
            max(map(len, entries.values()), default=0) * each,
            self.base.devices,
            "path",
        )
        most = max(1, min(MOST_TOKENS // length, left // each))
        portion: list[PathRow] = []
        for entry in entries.values():
            if portion and len(portion) + len(entry) > most:
                yield portion
                portion = []
            portion += entry
        if portion:
            yield portion

    # ----------------------------------------------------------------------------------- running

    def run(self, rows: list[PathRow]) -> Tensor:
        """Run paths.

        Args:
            rows: The entries.

        Returns:
            The residual stream after the last block, `[row, pos, d_model]`.
        """
        prompts = torch.tensor([row.prompt for row in rows], device=self.base.final.device)
        stream, received = self._send(rows, prompts)
        if self.receivers.final:
            return stream
        first = min(layer for _, layer in received)
        hooks = [
            (
                get_act_name("pre" if part == "mlp" else part, layer),
                self._receiving(part, layer, new),
            )
            for (part, layer), new in received.items()
        ]
        with self.model.hooks(hooks):
            return self.model(
                self.base.values["resid_pre"][first][prompts],
                attention_mask=self.base.real[prompts].long() if self.base.padded else None,
                start_at_layer=first,
                stop_at_layer=self.n_layers,
                use_cache=False,
            )

    def _receiving(self, part: str, layer: int, new: Tensor) -> Callable:
        """Make the hook function that gives receivers their input."""
        heads = self.receivers.heads.get((part, layer), slice(None))

        def receive(value: Tensor, hook: HookPoint) -> None:
            value[:, :, heads] = new

        return receive

    def _send(
        self, rows: list[PathRow], prompts: Tensor
    ) -> tuple[Tensor, dict[tuple[str, int], Tensor]]:
        """Follow the stream from the senders on, all components but these held at the base run.

        Returns:
            The stream behind the last receiver, `[row, pos, d_model]`; and for each receiving part
            and layer its queries, keys or values `[row, pos, head, d_head]` or, for "mlp", neurons
            before the activation `[row, pos, d_mlp]`.
        """
        first = min(row.layer for row in rows)
        x = self.base.values["resid_pre"][first][prompts]  # a copy, as all that follow
        for number, row in enumerate(rows):
            if any(sender.what == "embed" for sender in row.cell.senders):
                x[number, row.columns] = self._embedding()[row.prompt, row.columns]
        received: dict[tuple[str, int], Tensor] = {}
        last = self.receivers.stage(self.n_layers)
        for layer in range(first, min(self.n_layers, last // 2 + 1)):
            block = self.model.decoder.layers[layer]
            self._read_heads(received, layer, x)
            x = x + self._attn_out(rows, prompts, layer)
            if not block.pre_ln:
                x = block.self_attn_layer_norm(x)
            mlp_in = block.final_layer_norm(x) if block.pre_ln else x
            if layer in self.receivers.mlps:
                received["mlp", layer] = block.fc1(mlp_in)
            x = x + self._mlp_out(rows, prompts, layer, mlp_in)
            if not block.pre_ln:
                x = block.final_layer_norm(x)
        return x, received

    def _read_heads(self, received: dict[tuple[str, int], Tensor], layer: int, x: Tensor) -> None:
        """Compute what receiving heads of a block make of the stream."""
        block = self.model.decoder.layers[layer]
        parts = [part for part, at in self.receivers.heads if at == layer]
        if not parts:
            return
        x = block.self_attn_layer_norm(x) if block.pre_ln else x
        for part in parts:
            projected = getattr(block.self_attn, f"{part}_proj")(x).unflatten(-1, self.heads)
            received[part, layer] = projected[:, :, self.receivers.heads[part, layer]]

    def _attn_out(self, rows: list[PathRow], prompts: Tensor, layer: int) -> Tensor:
        """Return what attention adds: the base run's, but for the heads that send."""
        out = self.base.values["attn_out"][layer][prompts]
        heads = [
            [s.what for s in row.cell.senders if s.layer == layer and isinstance(s.what, int)]
            for row in rows
        ]
        sending = [number for number, sent in enumerate(heads) if sent]
        if not sending:
            return out
        z = self.base.values["z"][layer][prompts[sending]]  # [row, pos, head, d_head]
        for place, number in enumerate(sending):
            row = rows[number]
            at = row.columns[:, None], torch.tensor(heads[number], device=z.device)
            z[(place, *at)] = self.sources["z"][layer][(row.prompt, *at)]
        out[sending] = self.model.decoder.layers[layer].self_attn.out_proj(z.flatten(2))
        return out

    def _mlp_out(self, rows: list[PathRow], prompts: Tensor, layer: int, mlp_in: Tensor) -> Tensor:
        """Return what the MLP adds: frozen or computed, but for the runs in which it sends."""
        if self.freeze_mlps:
            out = self.base.values["mlp_out"][layer][prompts]
        else:
            block = self.model.decoder.layers[layer]
            out = block.fc2(block.activation(block.fc1(mlp_in)))
        for number, row in enumerate(rows):
            if any(s.layer == layer and s.what == "mlp" for s in row.cell.senders):
                source = self.sources["mlp_out"][layer]
                out[number, row.columns] = source[row.prompt, row.columns]
        return out
