"""The scores by which a grid of heads is sorted: those of `optlens.circuits.head_scores`, in words."""

from dataclasses import dataclass

from optlens.circuits import HeadScores, head_scores
from optlens.recording import Recording


@dataclass(frozen=True)
class Score:
    """Describe one score.

    Attributes:
        label: its name, as a menu shows it.
        meaning: a sentence for people.
        share: whether it is a share of attention, 0 to 1.
        ascending: whether a sorted grid begins with the smallest.
    """

    label: str
    meaning: str
    share: bool = True
    ascending: bool = False


SCORES: dict[str, Score] = {
    "entropy": Score(
        "entropy",
        "How widely a head spreads its weight, in nats: 0 reads one token alone.",
        share=False,
        ascending=True,
    ),
    "previous_token": Score("previous token", "Mean weight on the token before."),
    "induction": Score("induction", "Mean weight on what followed earlier equal tokens."),
    "duplicate_token": Score("duplicate token", "Mean weight on earlier equal tokens."),
    "first_token": Score("first token", "Mean weight on the first token."),
    "distance": Score("distance", "How many tokens back a head reads in the mean.", share=False),
}


def scores_of(recording: Recording, prompt: int, layers: list[int] | None = None) -> HeadScores:
    """Return the scores of one prompt; the others of a batch are not read.

    Args:
        recording: one that holds "attention".
        prompt: which of its prompts.
        layers: which of its layers; None for all.
    """
    names = ("attention", "tokens", "mask")
    tensors = {name: recording._tensors[name][prompt : prompt + 1] for name in names}
    columns = [recording.metadata["columns"][prompt]]
    alone = Recording(tensors, recording.metadata | {"is_batch": False, "columns": columns})
    return head_scores(None, alone, layers=layers)
