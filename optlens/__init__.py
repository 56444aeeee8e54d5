"""optlens: look inside Meta's OPT language models.

Example:
    >>> import optlens
    >>> model = optlens.load()  # the embedded demo checkpoint, no network
    >>> rec = model.record("The cat sat on the")  # attention, residual stream, logit lens
    >>> lens = rec.logit_lens(top_k=5)
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from optlens import evaluate, metrics, neurons, prompts
from optlens.cache import ActivationCache
from optlens.capture import estimate_bytes, record
from optlens.comparison import Comparison, compare
from optlens.config import OPTConfig
from optlens.interventions import (
    Ablate,
    Freeze,
    Knockout,
    Patch,
    Scale,
    Steer,
    load_interventions,
    save_interventions,
)
from optlens.lens import LogitAttribution, LogitLens, direct_logit_attribution, logit_lens
from optlens.model import OPTForCausalLM, OPTModel
from optlens.names import get_act_name, hook_names
from optlens.patching import (
    PatchResult,
    ablate_sweep,
    attribution_patch,
    causal_trace,
    edge_attribution,
    faithfulness,
    knockout_sweep,
    patch_sweep,
    path_patch,
    token_attribution,
)
from optlens.recording import Recording
from optlens.task_heads import OPTForQuestionAnswering, OPTForSequenceClassification
from optlens.tokenizer import OPTTokenizer

__version__ = "0.1.0"
__all__ = [
    "Ablate",
    "ActivationCache",
    "Comparison",
    "Conversion",
    "Freeze",
    "Knockout",
    "LogitAttribution",
    "LogitLens",
    "MemoryPlan",
    "OPTConfig",
    "OPTForCausalLM",
    "OPTForQuestionAnswering",
    "OPTForSequenceClassification",
    "OPTModel",
    "OPTTokenizer",
    "Patch",
    "PatchResult",
    "Recording",
    "Scale",
    "Steer",
    "ablate_sweep",
    "attribution_patch",
    "causal_trace",
    "circuits",
    "compare",
    "convert",
    "direct_logit_attribution",
    "edge_attribution",
    "estimate_bytes",
    "evaluate",
    "faithfulness",
    "get_act_name",
    "hook_names",
    "knockout_sweep",
    "load",
    "load_interventions",
    "logit_lens",
    "metrics",
    "neurons",
    "patch_sweep",
    "path_patch",
    "plan",
    "plots",
    "prompts",
    "record",
    "save_interventions",
    "token_attribution",
    "widgets",
]


# Names that few programs use, and the modules that they come from.
_WHEN_ASKED_FOR = {
    "Conversion": "optlens.checkpoints",
    "convert": "optlens.checkpoints",
    "MemoryPlan": "optlens.planning",
    "plan": "optlens.planning",
}


def __getattr__(name: str) -> Any:
    """Import circuits, plots, widgets and rare names when they are first asked for."""
    if name in ("circuits", "plots", "widgets"):
        return importlib.import_module(f"optlens.{name}")
    if name in _WHEN_ASKED_FOR:
        return getattr(importlib.import_module(_WHEN_ASKED_FOR[name]), name)
    raise AttributeError(f"module 'optlens' has no attribute {name!r}")


def load(source: str | os.PathLike | None = None, **options: Any) -> OPTForCausalLM:
    """Load an OPT, in eval mode, with its tokenizer.

    Args:
        source: A checkpoint folder, a Hub id such as "facebook/opt-125m", or nothing for the demo
            checkpoint that ships with optlens and needs no network.
        **options: `device`, `dtype`, `device_map`, `quantize`, `revision` and `progress`, as
            `optlens.checkpoints.load_model` explains. For what does not fit into memory:
            `device_map="stream"`, `quantize="int8"`, `dtype="bfloat16"`.

    Example:
        >>> model = load()
        >>> model.config.n_layers > 1
        True
    """
    if source is None:
        from optlens import demo

        source = demo.path()
    return OPTForCausalLM.from_pretrained(source, **options)
