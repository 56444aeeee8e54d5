"""Neurons of the MLPs: where they fire, what they write, which of them are dead or simple.

`top_examples` finds the places of a text where neurons fire most strongly, `statistics` how often they fire (dead
and positional neurons), `triggers` on which n-grams, and `vocabulary_effect` which tokens they promote
and suppress. All but the last run a model over a text of any length in bounded memory.
"""

from optlens.neurons.effect import VocabularyEffect, direct_effect, vocabulary_effect
from optlens.neurons.examples import Example, TopExamples, top_examples
from optlens.neurons.ngrams import Trigger, Triggers, triggers
from optlens.neurons.statistics import NeuronStatistics, statistics

__all__ = [
    "Example",
    "NeuronStatistics",
    "TopExamples",
    "Trigger",
    "Triggers",
    "VocabularyEffect",
    "direct_effect",
    "statistics",
    "top_examples",
    "triggers",
    "vocabulary_effect",
]
