"""The numbers of the architecture view: every stage's tensor, its weights, and the lines behind it."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from optlens.hooks import HookPoint
from optlens.report.markup import Html, el
from optlens.report.one_prompt import as_numpy
from optlens.widgets.activation_stats import MEASURES, SHOWN, Measured, measure
from optlens.widgets.code_lines import Excerpt, lines_calling
from optlens.widgets.part import Part
from optlens.widgets.stages import Stage, module_of, stages_of, weights_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from optlens.model import OPTForCausalLM
    from optlens.recording import Recording

_FACTS = ("n_layers", "n_heads", "d_model", "d_head", "d_mlp", "d_vocab", "n_ctx", "act_fn")


class ArchitecturePart(Part):
    """Hold a model's stages with what they computed on some prompts.

    The model runs once, when the part is made; of its tensors a few numbers are kept.

    Args:
        recording: the prompts.
        model: the model.
    """

    kind = "architecture"
    title = "Architecture"

    def __init__(self, recording: Recording, model: OPTForCausalLM):
        super().__init__(recording)
        self.config = model.config
        self.stages = stages_of(model.config)
        self._facts = [_facts_of(model, stage) for stage in self.stages]
        names = self._names()
        axes = {name: stage.axes for name, (stage, _) in names.items()}
        modules = {
            stage.key: module_of(model, f"decoder.{stage.key}", None)
            if stage.key != "lm_head"
            else model.lm_head
            for stage in self.stages
            if not stage.hook
        }
        tokens, real = (recording._tensors[name] for name in ("tokens", "mask"))
        self.measured = measure(model, tokens.to(model.device), real.bool(), axes, modules)
        numbers = {stage.key: number for number, stage in enumerate(self.stages)}
        computed = [names[name] for name in self.measured[0]]  # in the order of the run
        self.order = [(numbers[stage.key], layer) for stage, layer in computed]

    # --------------------------------------------------------------------------- what it gives

    def state(self, prompt: int) -> dict[str, Any]:
        """Return the stages, and of every tensor its measures, histogram and first numbers."""
        found, config = self.measured[prompt], self.config
        shapes = {
            number: one.shape for (number, _), one in zip(self.order, found.values(), strict=True)
        }
        return {
            "variant": {
                "pre_ln": config.do_layer_norm_before,
                "projected": config.has_projection,
                "final_ln": config.has_final_layer_norm,
            },
            "sizes": {name: getattr(config, name) for name in _FACTS},
            "parameters": self.parameters(),
            "stages": [
                facts | {"shape": list(shapes[number])} for number, facts in enumerate(self._facts)
            ],
            "order": [[number, -1 if layer is None else layer] for number, layer in self.order],
            "measures": np.stack([one.measures for one in found.values()]).astype(np.float32),
            "counts": np.stack([one.counts for one in found.values()]),
            "shown": np.stack([_padded(one.shown) for one in found.values()]),
        }

    def parameters(self) -> int:
        """Return the number of the model's weights, shared ones counted once."""
        blocks = self.config.n_layers
        return sum(
            facts["parameters"] * (blocks if stage.in_block else 1)
            for stage, facts in zip(self.stages, self._facts, strict=True)
        )

    def counts(self) -> str:
        """Return the variant, layers, heads and tokens."""
        norm = "pre-LN" if self.config.do_layer_norm_before else "post-LN"
        size = f"layers={self.config.n_layers}, heads={self.config.n_heads}"
        return f"{norm}, {size}, {self.token_counts()}"

    def figure(self, selected: dict[str, Any], style: str, detail: bool) -> Figure:
        """Return the stages from tokens to logits; with `detail` those of the selected block."""
        from optlens import plots

        layer = self._layer(selected)
        rows = [
            (stage, one)
            for stage, at, one in self._all(selected["prompt"])
            if at == layer or (at is None and not detail)
        ]
        return plots.stages(
            [stage.label for stage, _ in rows],
            [" × ".join(map(str, one.shape)) for _, one in rows],
            [one.measures[:4] for _, one in rows],
            [one.counts for _, one in rows],
            stream=[stage.key.startswith("hook_resid") for stage, _ in rows],
            groups=[f"block {layer}" if stage.in_block else "" for stage, _ in rows],
            title=f"{self._name()}: block {layer} of {self.config.n_layers}",
            note="Each stage's tensor on this prompt: from smallest to largest, with mean ± std.",
            style=style,
        )

    def fallback(self, prompt: int) -> list[Html]:
        """Return a table of the stages, of the blocks the first one."""
        rows = [
            el(
                "tr",
                el("th", stage.name(layer)),
                el("td", " × ".join(map(str, one.shape))),
                [el("td", _short(value)) for value in one.measures[:6]],
                el("td", stage.formula),
            )
            for stage, layer, one in self._all(prompt)
            if layer in (None, 0)
        ]
        caption = el(
            "caption",
            f"{self._name()}, {self.parameters():,} weights: what each stage computed on this "
            f"prompt, block 0 of {self.config.n_layers}",
        )
        names = ("tensor", "shape", *MEASURES[:6], "formula")
        head = el("tr", [el("th", name) for name in names])
        return [el("table", caption, el("thead", head), el("tbody", rows))]

    # ------------------------------------------------------------------------------- pieces

    def _names(self) -> dict[str, tuple[Stage, int | None]]:
        """Return every tensor's name with its stage and block."""
        return {
            stage.name(layer): (stage, layer)
            for stage in self.stages
            for layer in (range(self.config.n_layers) if stage.in_block else (None,))
        }

    def _all(self, prompt: int) -> list[tuple[Stage, int | None, Measured]]:
        """Return stage, block and measures in the order of the computation."""
        found = self.measured[prompt].values()
        places = zip(self.order, found, strict=True)
        return [(self.stages[number], layer, one) for (number, layer), one in places]

    def _layer(self, selected: dict[str, Any]) -> int:
        layer = selected["layer"]
        return layer if layer in range(self.config.n_layers) else 0

    def _name(self) -> str:
        norm = "pre-LN" if self.config.do_layer_norm_before else "post-LN"
        return f"OPT, {norm}, d_model {self.config.d_model}"


def _facts_of(model: OPTForCausalLM, stage: Stage) -> dict[str, Any]:
    """Return what the picture says of a stage whatever the prompt."""
    layer = 0 if stage.in_block else None
    weights = weights_of(model, stage, layer)
    shared = stage.key == "lm_head" and model.config.tie_word_embeddings
    return {
        "key": stage.key,
        "label": stage.label,
        "axes": stage.axes,
        "meaning": stage.meaning,
        "formula": stage.formula,
        "hook": stage.hook,
        "in_block": stage.in_block,
        "weights": [[name, shape] for name, shape in weights],
        "shared": shared,
        "parameters": 0 if shared else sum(prod(shape) for _, shape in weights),
        "code": [
            {
                "file": each.file,
                "function": each.function,
                "lines": [list(one) for one in each.lines],
            }
            for each in code_of(model, stage)
        ],
    }


def code_of(model: OPTForCausalLM, stage: Stage) -> list[Excerpt]:
    """Return the lines that compute a stage's tensor.

    Those that call the hook; and, where a matrix is applied in another function, that line too.
    """
    layer = 0 if stage.in_block else None
    if stage.hook:
        holder, attribute = _holder(model, model.hook_dict[stage.name(layer)])
        found = lines_calling(type(holder), attribute)
    else:
        owner = model if stage.key == "lm_head" else model.decoder
        found = lines_calling(type(owner), stage.key)
    text = "\n".join(line for each in found for _, line, _ in each.lines)
    for path in stage.weights:
        parent, _, name = path.rpartition(".")
        is_matrix = hasattr(module_of(model, path, layer), "out_features")
        if is_matrix and f"self.{name}" not in text:
            found += lines_calling(type(module_of(model, parent, layer)), name)
    return found


def _holder(model: nn.Module, point: HookPoint) -> tuple[nn.Module, str]:
    """Return the module that has a hook point, and its attribute."""
    for module in model.modules():
        for name, value in vars(module).items():
            if value is point:
                return module, name
    raise LookupError(f"no module of the model holds {point!r}")


def _padded(values: Any) -> np.ndarray:
    """Return the first numbers of a tensor, NaN where it has fewer."""
    out = np.full(SHOWN, np.nan, np.float32)
    out[: len(values)] = as_numpy(values)
    return out


def _short(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")
