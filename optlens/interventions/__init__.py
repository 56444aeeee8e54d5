"""Interventions: what to change in a run, as data that can be printed, compared, saved, replayed.

    with model.intervene([Ablate("z", layer=9, head=6), Knockout(query=-1, key=" John")]):
        logits = model(prompt).logits

The same lists go to `model.record(prompt, interventions=...)`. Read `kinds.py` for what there is,
`address.py` for where it can act, `edits.py` for how it becomes hook functions.
"""

from optlens.interventions.edits import as_list, intervene, resolve
from optlens.interventions.intervention import Intervention
from optlens.interventions.kinds import Ablate, Freeze, Knockout, Patch, Scale, Steer
from optlens.interventions.store import (
    describe,
    in_words,
    load_interventions,
    provenance,
    save_interventions,
)

__all__ = [
    "Ablate",
    "Freeze",
    "Intervention",
    "Knockout",
    "Patch",
    "Scale",
    "Steer",
    "as_list",
    "describe",
    "in_words",
    "intervene",
    "load_interventions",
    "provenance",
    "resolve",
    "save_interventions",
]
