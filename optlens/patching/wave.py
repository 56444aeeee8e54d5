"""The engine: many patched runs of one model at once, each computing only what its patch changes.

A run that is patched in block L at column p equals the unpatched run in all blocks below L and in
all columns before p. So it starts from what the unpatched run recorded, at the site that is patched,
from column p on, and attends to the recorded keys and values of what comes before. Runs that start
in a block join those that started below, and all go through its linear layers as one matrix: a
*wave*. In the last block only the columns that the metric reads go past their keys and values.

`Wave._block` follows a block of `optlens/model.py` line by line.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from optlens.patching.base_run import BaseRun
from optlens.patching.cuts import Cuts
from optlens.patching.group import Group, Row
from optlens.patching.plan import key_columns, rounded_up
from optlens.patching.sites import SITES


class Wave:
    """Runs patches of one model on one set of prompts."""

    def __init__(
        self,
        model,
        base: BaseRun,
        sources: dict[str, list[Tensor]],
        columns: Tensor,
        reads: Tensor,
        cuts: Cuts | None = None,
        sparing: bool = False,
    ) -> None:
        """Keep what all patches share.

        Args:
            model: The model, in eval mode.
            base: The unpatched run.
            sources: Short site name to the values that patches write, for each layer one tensor
                `[prompts, ...]`.
            columns: The columns of the sweep's positions, `[prompts, positions]`.
            reads: The columns that the metric reads, `[prompts, n]` on the CPU.
            cuts: Which edges of attention patches cut, if they do.
            sparing: Whether memory for compiled products is spared; see `rounded_up`.
        """
        self.cuts, self.sparing = cuts, sparing
        self.model, self.base, self.sources = model, base, sources
        self.device = base.final.device
        self.columns, self.reads = columns.tolist(), reads.to(self.device)
        self.read_columns = reads.tolist()  # what is written where is decided on the host
        self.n_layers, self.length = model.config.n_layers, base.tokens.shape[1]
        self.heads = (model.config.n_heads, model.config.d_head)
        # A softmax over whole vector registers takes half the time, so keys are rounded up; those
        # that are added are masked, as they come after every query.
        self.key_columns = torch.arange(key_columns(self.length), device=self.device)
        self.all_columns = self.key_columns[: self.length]
        self.real = self._padded(base.real)
        self._united: tuple[list[Tensor], Tensor] = ([], base.final)  # see `_through`

    @torch.no_grad()
    def run(self, rows: list[Row]) -> Tensor:
        """Run patches.

        Args:
            rows: The runs, in any order.

        Returns:
            The residual stream after the last block at the columns that the metric reads,
            `[run, n, d_model]`, in the order of `rows`.
        """
        place = {id(row): number for number, row in enumerate(rows)}
        self.windowed = any(len(row.cell.layers) > 1 for row in rows)
        self.starting: dict[tuple[int, str], list[Row]] = defaultdict(list)
        for row in rows:
            self.starting[row.layer, row.cell.site.name].append(row)
        flow: list[Group] = []
        for layer in range(min(row.layer for row in rows), self.n_layers):
            self._go_to(self.base.values["resid_pre"][layer].device, flow)
            flow = self._whole(layer, flow)  # what the block below held is freed first
            flow = self._block(layer, flow)
        self._go_to(self.base.final.device, flow)
        prompts = self._index([row.prompt for row in rows])
        final = self.base.final[prompts[:, None], self.reads[prompts]]
        for group in flow:
            self._put(final, self._index([place[id(row)] for row in group.rows]), group)
        return final

    def _go_to(self, device: torch.device, flow: list[Group]) -> None:
        """Bring all that flows to a device; the blocks of a model may be divided among several."""
        if device == self.device:
            return
        self.device = device
        self.reads, self.real = self.reads.to(device), self.real.to(device)
        self.key_columns = self.key_columns.to(device)
        self.all_columns = self.key_columns[: self.length]
        for group in flow:
            group.go_to(device)

    # ---------------------------------------------------------------------------- one block

    def _block(self, layer: int, flow: list[Group]) -> list[Group]:
        """Take running groups through a block, and start others at the sites that they patch."""
        block = self.model.decoder.layers[layer]
        if layer == 0:
            self._join(flow, "embed", layer)
        self._join(flow, "resid_pre", layer)
        self._attend(flow, layer)  # x: resid_pre -> z
        self._join(flow, "z", layer)
        self._add_heads(flow, layer)
        self._join(flow, "attn_out", layer)
        for group in flow:
            group.x += group.stream
        if not block.pre_ln:
            self._map(flow, block.self_attn_layer_norm)
        self._join(flow, "resid_mid", layer)
        for group in flow:
            group.stream = group.x
        if block.pre_ln:
            self._map(flow, block.final_layer_norm)
        self._map(flow, block.fc1)
        self._join(flow, "mlp_pre", layer)
        self._map(flow, F.relu_ if block.activation is F.relu else block.activation)
        self._join(flow, "mlp_post", layer)
        self._map(flow, block.fc2)
        self._join(flow, "mlp_out", layer)
        for group in flow:
            group.x += group.stream
        if not block.pre_ln:
            self._map(flow, block.final_layer_norm)
        self._join(flow, "resid_post", layer)
        return flow

    def _attend(self, flow: list[Group], layer: int) -> None:
        """Replace the streams by z, `[run, pos, head, d_head]`; start what is patched on the way."""
        block = self.model.decoder.layers[layer]
        attention = block.self_attn
        norm = block.self_attn_layer_norm
        for group in flow:
            group.stream = group.x
        new = [group.new for group in flow]  # the rest is as recorded
        if block.pre_ln:
            new = self._through(new, norm)
        self.recorded = {name: self._padded(self.base.values[name][layer]) for name in "kv"}
        keys, values = (
            self._through(new, linear) for linear in (attention.k_proj, attention.v_proj)
        )
        keys_values = [
            tuple(
                self._all_keys(name, layer, group, x.unflatten(-1, self.heads))
                for name, x in zip("kv", pair, strict=True)
            )
            for group, *pair in zip(flow, keys, values, strict=True)
        ]
        if layer == self.n_layers - 1:
            for group in flow:
                if self.reads.shape[1] < group.columns.shape[1]:
                    group.only(self.reads[group.prompts])
            new = [group.new for group in flow]
            if block.pre_ln:
                new = self._through(new, norm)
        for group, x in zip(flow, self._through(new, attention.q_proj), strict=True):
            group.x, group.changed = self._queries(layer, group, x.unflatten(-1, self.heads)), None
        self._join(flow, "q", layer)
        for name in ("k", "v", "attn_scores", "pattern"):
            self._start(flow, name, layer)
        for group in flow[len(keys_values) :]:
            keys_values.append(tuple(self._all_keys(name, layer, group, None) for name in "kv"))
        for group, (k, v) in zip(flow, keys_values, strict=True):
            group.x = self._weighted_values(layer, group, k, v)

    def _padded(self, x: Tensor) -> Tensor:
        """Add columns of zeros to `[prompts, pos, ...]`, as many as keys are rounded up by."""
        more = len(self.key_columns) - self.length
        return torch.cat([x, x.new_zeros(len(x), more, *x.shape[2:])], 1) if more else x

    def _queries(self, layer: int, group: Group, own: Tensor) -> Tensor:
        """Give queries of a group's columns, recorded ones where they cannot have changed."""
        if group.changed is None:
            return own
        queries = self._recorded("q", layer, group)
        queries[:, : group.changed] = own
        return queries

    def _all_keys(self, name: str, layer: int, group: Group, own: Tensor | None) -> Tensor:
        """Give keys or values of all columns, `[run, key, head, d_head]`, patched where they are."""
        whole = self.recorded[name].index_select(0, group.prompts)  # a copy
        if own is not None:
            whole[:, group.first : group.first + own.shape[1]] = own
        if self.windowed or group.site == name:
            self._write(whole[:, : self.length], name, layer, group.rows)
        return whole

    def _weighted_values(self, layer: int, group: Group, k: Tensor, v: Tensor) -> Tensor:
        """Compute z `[run, pos, head, d_head]` from queries, scores or a pattern in `group.x`."""
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # [run, head, key, d_head]
        columns = group.columns[:1] if group.contiguous else group.columns
        allowed = self.key_columns <= columns.unsqueeze(-1)  # [run or 1, query, key]
        if self.base.padded:
            allowed = allowed & self.real[group.prompts].unsqueeze(1)
        allowed = allowed.unsqueeze(1)
        x, squares = group.x, self._edits_squares(layer, group)
        if group.site not in ("attn_scores", "pattern"):
            q = (x * self.model.decoder.layers[layer].self_attn.scale).transpose(1, 2)
            if not squares:
                z = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=1.0)
                return z.transpose(1, 2)
            k, allowed = k[:, :, : self.length], allowed[..., : self.length]
            x = (q @ k.transpose(2, 3)).masked_fill(~allowed, -torch.inf).transpose(1, 2)
            x = self._settled(group, x, "attn_scores", layer)
        if group.site != "pattern":
            nothing = x.amax(-1, keepdim=True) == -torch.inf  # a query that may see no key
            wide = torch.promote_types(x.dtype, torch.float32)
            x = x.masked_fill(nothing, 0.0).softmax(-1, dtype=wide).to(x.dtype)
            x = x.masked_fill(nothing, 0.0)
            if squares:
                x = self._settled(group, x, "pattern", layer)
        return torch.einsum("rqhk,rhke->rqhe", x, v[:, :, : self.length])

    def _edits_squares(self, layer: int, group: Group) -> bool:
        """Tell whether scores or a pattern that a group computes in a block are written to."""
        return self.windowed and any(
            row.cell.site.name in ("attn_scores", "pattern") and layer in row.cell.layers
            for row in group.rows
        )

    def _add_heads(self, flow: list[Group], layer: int) -> None:
        """Turn z into what attention adds to the stream."""
        out_proj = self.model.decoder.layers[layer].self_attn.out_proj
        self._map(flow, lambda z: out_proj(z.flatten(1)))

    # ------------------------------------------------------------------- starting and writing

    def _join(self, flow: list[Group], name: str, layer: int) -> None:
        """Write what running groups have to write at a site, and start those patched there."""
        for group in flow:
            group.x = self._settled(group, group.x, name, layer)
        self._start(flow, name, layer)

    def _settled(self, group: Group, x: Tensor, name: str, layer: int) -> Tensor:
        """Return what a group has computed at a site, with what its runs write there."""
        if self.windowed:
            self._edit(group, x, name, layer)
        return x

    def _start(self, flow: list[Group], name: str, layer: int) -> None:
        """Start the runs that branch off at a site of this block, one group for each column."""
        site = SITES[name]
        by_shape: dict[tuple[int, bool], list[Row]] = defaultdict(list)
        for row in self.starting[layer, name]:
            by_shape[row.first, row.cell.pos is not None].append(row)
        for (first, at_one), rows in by_shape.items():
            single = at_one and not site.spreads
            prompts = self._index([row.prompt for row in rows])
            columns = self.all_columns[first : first + 1 if single else None]
            columns, contiguous = columns.expand(len(rows), -1), True
            in_last = layer == self.n_layers - 1 and name not in ("embed", "resid_pre")
            if in_last and not single and self.reads.shape[1] < columns.shape[1]:
                columns, contiguous = self.reads[prompts], False
            group = Group(first, rows, prompts, columns, columns, None, name, contiguous)
            group.x = self._recorded("q" if name in ("k", "v") else name, layer, group)
            if name not in ("k", "v"):
                self._edit(group, group.x, name, layer)
            if name in ("embed", "resid_pre") and at_one:
                group.changed = 1
            if name == "embed":
                group.x = group.x + self._recorded("pos_embed", 0, group)
            if site.stream is not None:
                group.stream = self._recorded(site.stream, layer, group)
            flow.append(group)

    def _recorded(self, name: str, layer: int, group: Group) -> Tensor:
        """Copy what the unpatched run had at a site, in a group's columns."""
        tokens = group.prompts[:, None] * self.length + group.columns
        values = self.base.values[name][layer].flatten(0, 1)  # of the embedding: perhaps elsewhere
        chosen = values.index_select(0, tokens.flatten().to(values.device))
        return chosen.to(self.device).unflatten(0, tokens.shape)

    def _edit(self, group: Group, x: Tensor, name: str, layer: int) -> None:
        """Write a site's patched values into a group's value of that site, in place."""
        columns = None
        if not group.contiguous:  # then they are those that the metric reads
            columns = [self.read_columns[row.prompt] for row in group.rows]
        self._write(x, name, layer, group.rows, group.first, columns)

    def _write(
        self,
        x: Tensor,
        name: str,
        layer: int,
        rows: list[Row],
        first: int = 0,
        columns: list[list[int]] | None = None,
    ) -> None:
        """Write patched values in place into `x` `[run, pos, ...]`, whose columns start at `first`."""
        for run, row in enumerate(rows):
            cell = row.cell
            if cell.site.name != name or layer not in cell.layers:
                continue
            here = range(first, first + x.shape[1]) if columns is None else columns[run]
            if cell.cut is not None:
                heads = slice(None) if cell.head is None else slice(cell.head, cell.head + 1)
                self.cuts.apply(x[run][:, heads], *cell.cut, row.prompt, here)
                continue
            source = self.sources[name][layer][row.prompt]
            rest: tuple = () if cell.head is None else (cell.head,)
            if cell.neuron is not None:
                rest = (cell.neuron,)
            if cell.key is not None:
                rest = (*(rest or (slice(None),)), self.columns[row.prompt][cell.key])
            if cell.pos is None:
                at = slice(first, None) if columns is None else here
                x[(run, slice(None), *rest)] = source[(at, *rest)]
                continue
            column = self.columns[row.prompt][cell.pos]
            if columns is None and column in here:
                x[(run, column - first, *rest)] = source[(column, *rest)]
            for place in range(len(here)) if columns is not None else ():
                if here[place] == column:
                    x[(run, place, *rest)] = source[(column, *rest)]

    # ------------------------------------------------------------------- from block to block

    def _whole(self, layer: int, flow: list[Group]) -> list[Group]:
        """Complete groups to all columns from their first one on, and unite those of one column."""
        alike: dict[tuple[int, int | None], list[Group]] = defaultdict(list)
        for group in flow:
            width = group.x.shape[1]
            if width < self.length - group.first:
                group.changed = width
                group.columns = self.all_columns[group.first :].expand(len(group.rows), -1)
                whole = self._recorded("resid_pre", layer, group)
                whole[:, :width] = group.x
                group.x = whole
            group.site = "resid_pre"
            alike[group.first, group.changed].append(group)
        return [
            groups[0]
            if len(groups) == 1
            else Group(
                first,
                [row for group in groups for row in group.rows],
                torch.cat([group.prompts for group in groups]),
                torch.cat([group.columns for group in groups]),
                torch.cat([group.x for group in groups]),
                changed=changed,
            )
            for (first, changed), groups in alike.items()
        ]

    def _put(self, final: Tensor, places: Tensor, group: Group) -> None:
        """Write a group's last values over the unpatched run's, in the columns that are read."""
        reads = self.reads[group.prompts]
        same = reads.unsqueeze(2) == group.columns.unsqueeze(1)  # [run, read, pos]
        found = same.any(-1) & (reads >= group.first)
        entry = same.float().argmax(-1).unsqueeze(-1).expand(-1, -1, group.x.shape[-1])
        final[places] = torch.where(found.unsqueeze(-1), group.x.gather(1, entry), final[places])

    def _map(self, flow: list[Group], function: Callable[[Tensor], Tensor]) -> None:
        """Replace what flows in all groups by a function of it."""
        parts = self._through([group.x for group in flow], function)
        for group, x in zip(flow, parts, strict=True):
            group.x = x

    def _through(self, parts: list[Tensor], function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Apply a function of tokens `[token, ...]` to all parts `[run, pos, ...]` at once.

        What one function gave goes to the next as it is, if no other part came in between. Some
        rows of zeros round the number of tokens up: oneDNN compiles its product for every number
        anew, which takes time and memory.
        """
        if not parts:
            return []
        last, united = self._united
        if len(last) != len(parts) or any(a is not b for a, b in zip(last, parts, strict=True)):
            flat = [part.flatten(0, 1) for part in parts]
            n_tokens = sum(len(part) for part in flat)
            united = flat[0].new_empty(rounded_up(n_tokens, self.sparing), *flat[0].shape[1:])
            torch.cat(flat, out=united[:n_tokens])
            united[n_tokens:] = 0
        result = function(united)
        shapes = [part.shape[:2] for part in parts]
        sizes = [runs * width for runs, width in shapes]
        pieces = result[: sum(sizes)].split(sizes)
        pieces = [x.unflatten(0, shape) for x, shape in zip(pieces, shapes, strict=True)]
        self._united = (pieces, result)
        return pieces

    def _index(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self.device)
