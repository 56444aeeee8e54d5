"""Activation patching: sweeps over places in the network, each patch equal to one forward pass."""

from optlens.patching.ablation import ablate_sweep
from optlens.patching.attribution import attribution_patch
from optlens.patching.circuit_run import faithfulness
from optlens.patching.edge_graph import Circuit, EdgeGraph
from optlens.patching.edges import EdgeScores, edge_attribution
from optlens.patching.knockout import knockout_sweep
from optlens.patching.paths import path_patch
from optlens.patching.plan import SweepPlan
from optlens.patching.result import PatchResult
from optlens.patching.stream import SweepStream
from optlens.patching.sweep import Sweep, patch_sweep
from optlens.patching.tokens import TokenAttribution, token_attribution
from optlens.patching.tracing import causal_trace

__all__ = [
    "Circuit",
    "EdgeGraph",
    "EdgeScores",
    "PatchResult",
    "Sweep",
    "SweepPlan",
    "SweepStream",
    "TokenAttribution",
    "ablate_sweep",
    "attribution_patch",
    "causal_trace",
    "edge_attribution",
    "faithfulness",
    "knockout_sweep",
    "patch_sweep",
    "path_patch",
    "token_attribution",
]
