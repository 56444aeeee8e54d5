"""Sample documents from the demo checkpoint and check them against the corpus's grammar.

A sentence is accepted if its form is one that the generator makes: with every name, noun,
adjective, verb and number replaced by its class, it equals a sentence of a large sample of the
corpus, and its *a* and *an* are right.
"""

import random
import re
from collections.abc import Iterable

import torch
from tokenizers import Tokenizer
from torch import Tensor

from optlens.demo import facts
from optlens.demo import lexicon as lx
from optlens.demo import people as pp
from optlens.demo.corpus import BOS, documents
from optlens.model import OPTForCausalLM

REFERENCE_DOCUMENTS = 60_000
WORD = re.compile(r"[A-Za-z]+|\d+|[^\sA-Za-z\d]")
SENTENCE_END = re.compile(r'(?<=[.?!])"? +(?=["A-Z])')


def _word_classes() -> dict[str, str]:
    """Map the words of the lexicon to their class; a word of two classes keeps the first."""
    classes: dict[str, str] = {}

    def put(name: str, words: Iterable[str]) -> None:
        for word in words:
            classes.setdefault(word, name)

    put("NAME", [*pp.NAMES, *pp.HELD_OUT_NAMES, *pp.UNSEEN_NAMES])
    put("TOWN", pp.TOWNS)
    put("SURNAME", pp.SURNAMES)
    put("MOMENT", [*lx.DAYS, *lx.MONTHS])
    put("COUNT", lx.NUMBERS)
    put("ADJECTIVE", [*lx.COLORS, *lx.ADJECTIVES, *lx.MOODS, *lx.WEATHER])
    put("ADVERB", lx.ADVERBS)
    put("MASS", [*lx.FOODS, *lx.DRINKS, *lx.MATERIALS])
    nouns = [*lx.GIFTS, *lx.HELD_OUT_GIFTS, *lx.THINGS, *lx.ANIMALS, *lx.JOBS, *lx.PLACES, *lx.KIN]
    nouns += [*lx.EVENTS, *lx.HELD_OUT_EVENTS]
    put("NOUN", nouns)
    put("NOUNS", map(lx.plural, nouns))
    for verb in lx.VERBS:
        put("VERB", [verb])
        put("VERBS", [lx.third(verb)])
        put("PAST", [lx.past(verb)])
    put("PAST", "gave handed passed sent offered showed".split())
    put("PREPOSITION", ["near", "behind", "beside", "under", "above"])
    put("THIS", ["this", "that", "one"])
    put("THESE", ["these", "those", "many", "some"])
    for relation, table in facts.RELATIONS.items():
        put(f"{relation} of", table.keys())
        put(relation, table.values())
    return classes


def _is_invented(word: str) -> bool:
    """Tell whether a word is built as the corpus builds its made-up names."""
    onset, vowel = "|".join(pp.ONSETS), "|".join(pp.VOWELS)
    return bool(
        re.fullmatch(rf"((?:{onset})(?:{vowel})){{2,3}}(?:{'|'.join(pp.CODAS)})", word.lower())
    )


class Grammar:
    """The words and sentence forms of the corpus, collected from a sample of it.

    Attributes:
        words: All words of the sample and of the lexicon.
        forms: All sentence forms of the sample.
        sentences: The sentences themselves, to tell new ones from repeated ones.
    """

    def __init__(self, seed: int = 0) -> None:
        """Collect words and forms from ``REFERENCE_DOCUMENTS`` documents."""
        self._classes = _word_classes()
        self.words = set(self._classes)
        self.forms: set[tuple[str, ...]] = set()
        self.sentences: set[str] = set()
        for text in documents(seed, REFERENCE_DOCUMENTS):
            for sentence in SENTENCE_END.split(text):
                self.sentences.add(sentence)
                self.words.update(WORD.findall(sentence))
                self.forms.add(self.form(sentence))

    def form(self, sentence: str) -> tuple[str, ...]:
        """Give the sentence with its content words replaced by their classes."""
        form = []
        for index, word in enumerate(WORD.findall(sentence)):
            plain = word if index or word in self._classes else word[0].lower() + word[1:]
            if word.isdigit():
                plain = "YEAR" if len(word) == 4 else "NUMBER"
            elif word not in self._classes and plain not in self.words and _is_invented(word):
                plain = "NAME"
            plain = self._classes.get(plain, plain)
            if plain == "COUNT":
                plain = "THESE"
            if plain == "ADJECTIVE" and form and form[-1] == "ADJECTIVE":
                continue
            form.append({"an": "a"}.get(plain, plain))
        return tuple(form)

    def knows(self, word: str) -> bool:
        """Tell whether a word belongs to the corpus, made-up names and numbers included."""
        return word in self.words or not word[0].isalpha() or _is_invented(word)

    def distinct_words(self) -> int:
        """Count the words of the corpus, capitals aside and made-up names left out."""
        own = (w for w in self.words if w.isalpha())
        return len(
            {w.lower() for w in own if w in self._classes or w.islower() or not _is_invented(w)}
        )

    def accepts(self, sentence: str) -> bool:
        """Tell whether the generator makes sentences of this form."""
        return self.form(sentence) in self.forms and lx.fix_articles(sentence) == sentence


@torch.no_grad()
def sample(
    model: OPTForCausalLM, tokenizer: Tokenizer, count: int, seed: int = 0, max_tokens: int = 120
) -> list[str]:
    """Sample documents from the model's own distribution, each from ``</s>`` to the next ``</s>``.

    Args:
        model: The model, in eval mode.
        tokenizer: Its tokenizer.
        count: How many documents.
        seed: Equal seeds give equal documents on one machine.
        max_tokens: Documents that are not over by then are left out of the result.

    Returns:
        Finished documents, without ``</s>``.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.full((count, 1), BOS)
    newest: Tensor = tokens
    cache = None
    for _ in range(max_tokens):
        output = model(newest, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        newest = torch.multinomial(output.logits[:, -1].softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, newest], 1)
    texts = []
    for row in tokens.tolist():
        if BOS in row[1:]:
            texts.append(tokenizer.decode(row[1 : row.index(BOS, 1)]))
    return texts


def fluency(model: OPTForCausalLM, tokenizer: Tokenizer, count: int = 200) -> dict:
    """Sample documents and report how many words and sentences the generator's grammar accepts.

    Args:
        model: The model, in eval mode.
        tokenizer: Its tokenizer.
        count: Documents to sample.

    Returns:
        Shares ``known_words``, ``accepted_sentences``, ``new_sentences`` (of the accepted, not
        found word for word in the reference sample), the same check on fresh documents of the
        corpus itself (``corpus_accepted``), the ``distinct_words`` of the corpus, and five
        ``samples`` of several sentences.
    """
    grammar = Grammar()
    texts = sample(model, tokenizer, count)
    sentences = [sentence for text in texts for sentence in SENTENCE_END.split(text)]
    words = [word for sentence in sentences for word in WORD.findall(sentence)]
    accepted = [sentence for sentence in sentences if grammar.accepts(sentence)]
    fresh = [s for text in documents(1, count) for s in SENTENCE_END.split(text)]
    long = [text for text in texts if len(SENTENCE_END.split(text)) >= 3]
    return {
        "documents": len(texts),
        "sentences": len(sentences),
        "known_words": sum(map(grammar.knows, words)) / len(words),
        "accepted_sentences": len(accepted) / len(sentences),
        "new_sentences": sum(s not in grammar.sentences for s in accepted) / max(1, len(accepted)),
        "corpus_accepted": sum(map(grammar.accepts, fresh)) / len(fresh),
        "distinct_words": grammar.distinct_words(),
        "samples": random.Random(0).sample(long, min(5, len(long))),
    }
