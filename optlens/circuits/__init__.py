"""What heads do on a prompt: scores of known kinds, what they move, and where it comes from.

Every function takes a model and a source, which is a prompt to record or a `Recording` that holds
what is needed (the error says what to add). A batch of prompts has a leading batch axis in all that
comes back, and padding counts nowhere.
"""

from optlens.circuits.graph import ContributionGraph, Edge, contribution_graph
from optlens.circuits.heads import HeadScores, head_scores
from optlens.circuits.values import ScoreDetail, score_detail, value_weighted_attention

__all__ = [
    "ContributionGraph",
    "Edge",
    "HeadScores",
    "ScoreDetail",
    "contribution_graph",
    "head_scores",
    "score_detail",
    "value_weighted_attention",
]
