"""What a metric says of runs that are known by their last residual stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optlens import checks
from optlens.metrics import Metric, as_metric
from optlens.patching.base_run import BaseRun
from optlens.weights import effective_weight

if TYPE_CHECKING:
    from optlens.model import OPTForCausalLM

MOST_LOGITS = 256  # runs whose logits are computed at once
AnyMetric = Metric | Callable[[Tensor], Tensor]


class Measure:
    """A metric, bound to the prompts of a base run.

    Attributes:
        name: The metric as text.
        metric: The bound metric.
        reads: The columns that it reads, `[prompts, n]`, on the device of the last block.
        ends: The metric of the clean and of the corrupt run, `[prompts]` each; None where there is
            no corrupt run.
        unpatched: The metric of the base run, `[prompts]`.
    """

    def __init__(
        self,
        model: OPTForCausalLM,
        base: BaseRun,
        metric: AnyMetric | None,
        finals: tuple[Tensor, Tensor | None],
    ) -> None:
        """Bind a metric; no hook may edit the model, and gradients should be off.

        Args:
            model: The model.
            base: The unpatched run.
            metric: What to measure.
            finals: The last residual streams of the clean and the corrupt run,
                `[prompts, pos, d_model]`.

        Raises:
            InputError: If there is no metric, or it does not fit the prompts.
        """
        if metric is None:
            raise checks.InputError(
                "Say what to measure: metric=optlens.metrics.logit_diff(' Mary', ' John'), for one."
            )
        self.model, self.base = model, base
        metric = as_metric(metric)
        self.name = str(metric)
        self.metric = metric.bind(model, base.tokens, base.seen.long() if base.padded else None)
        self.reads = self.metric.columns.to(base.final.device)
        if self.metric.needs_clean:
            self.metric = self.metric.with_clean(self._logits(self.read(finals[0])))
        self.ends = [None if end is None else self._all(end) for end in finals]
        self.unpatched = self._all(base.final)

    def read(self, final: Tensor) -> Tensor:
        """Take the columns that the metric reads of all prompts, `[prompts, n, d_model]`."""
        rows = torch.arange(len(final), device=final.device)
        return final[rows[:, None], self.reads]

    def fill(
        self, values: Tensor, cells: Sequence[int], prompts: Sequence[int], final: Tensor
    ) -> None:
        """Put the metric of runs in its place.

        Args:
            values: Where to, `[cell, prompts]`.
            cells: The cell of each run; a callable needs all changed runs of a cell together.
            prompts: The prompt of each run.
            final: The last residual stream at the columns that the metric reads,
                `[run, n, d_model]`.
        """
        here = torch.tensor(prompts)
        at = here.to(final.device)
        if not self.metric.whole:
            found = [
                self.metric(self._logits(part, which), which)
                for part, which in zip(final.split(MOST_LOGITS), at.split(MOST_LOGITS), strict=True)
            ]
            values[torch.tensor(cells), here] = torch.cat(found).to(values)
            return
        # a function of all prompts' logits: where a patch changes nothing, the unpatched run's
        by_cell: dict[int, list[int]] = {}
        for number, cell in enumerate(cells):
            by_cell.setdefault(cell, []).append(number)
        for cell, numbers in by_cell.items():
            whole = self.base.final.clone()
            whole[at[numbers]] = final[numbers]
            values[cell] = self.metric(self._logits(whole)).to(values)

    def _all(self, final: Tensor) -> Tensor:
        """Compute the metric of a whole run, `[prompts]`."""
        return self.metric(self._logits(self.read(final))).cpu()

    def _logits(self, final: Tensor, prompts: Tensor | None = None) -> Tensor:
        """Compute the logits that the metric needs, `[run, n, tokens]`."""
        hidden = self.model.decoder.finish(final)
        tokens = self.metric.token_ids
        if tokens is None:
            return self.model.lm_head(hidden)
        tokens = tokens if prompts is None else tokens.to(prompts.device)[prompts]
        try:
            unembedding = effective_weight(self.model.lm_head)
        except TypeError:  # quantised: the module can be called, its matrix not be read
            logits = self.model.lm_head(hidden)
            tokens = tokens.to(logits.device).unsqueeze(1).expand(-1, logits.shape[1], -1)
            return logits.gather(2, tokens)
        chosen = unembedding[tokens.to(unembedding.device)]
        return hidden.to(chosen.device) @ chosen.transpose(1, 2)
