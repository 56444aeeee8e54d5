"""The demo checkpoint's tokenizer: a byte-level BPE of 3,584 tokens with OPT's special ids.

Numbers are cut into pairs of digits before the BPE (`` 1732`` becomes `` 17`` and ``32``), so that
the years of one century share their first token. Names, capitals and the common nouns are repeated
in the training text until each is one token, with the space before it.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

from optlens.demo import facts
from optlens.demo import lexicon as lx
from optlens.demo import people as pp
from optlens.demo.corpus import documents

VOCAB_SIZE = 3584
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
EMPHASIS = 400


def single_token_words() -> list[str]:
    """List the words that are to be one token each when a space stands before them."""
    words = [*pp.NAMES, *pp.HELD_OUT_NAMES, *pp.UNSEEN_NAMES]
    for table in facts.RELATIONS.values():
        words += [*table.keys(), *table.values()]
    words += lx.GIFTS + lx.HELD_OUT_GIFTS + lx.THINGS + lx.ANIMALS + lx.JOBS + lx.PLACES
    words += lx.EVENTS + lx.HELD_OUT_EVENTS + lx.COLORS + lx.HELD_OUT_SUBJECTS
    words += [f"{number:02d}" for number in range(100)]
    return list(dict.fromkeys(words))


def _training_text(seed: int) -> Iterator[str]:
    """Give the text that the merges are learned from: documents, and the words to emphasise."""
    yield from documents(seed, 30_000)
    for word in single_token_words():
        yield f" {word}" * EMPHASIS
    for word in (*pp.NAMES, *(f"{number:02d}" for number in range(100))):
        yield from [word] * EMPHASIS


def train_tokenizer(seed: int) -> Tokenizer:
    """Learn the byte-level BPE from the corpus.

    Args:
        seed: The corpus seed.

    Returns:
        A tokenizer that prepends ``</s>`` to what it encodes.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\d\d| ?\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_text(seed), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A",
        pair="</s> $A </s> $B",
        special_tokens=[("</s>", SPECIAL_TOKENS.index("</s>"))],
    )
    return tokenizer


def _write(path: Path, text: str) -> None:
    """Write a text file by way of a temporary name beside it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write the tokenizer as the files that Hugging Face tokenizers are read from.

    Args:
        tokenizer: The tokenizer.
        folder: An existing folder.
        max_length: The number of positions of the model.
    """
    content = json.loads(tokenizer.to_str())
    _write(folder / "tokenizer.json", json.dumps(content, ensure_ascii=False))
    _write(folder / "vocab.json", json.dumps(content["model"]["vocab"], ensure_ascii=False))
    merges = [
        " ".join(pair) if isinstance(pair, list) else pair for pair in content["model"]["merges"]
    ]
    _write(folder / "merges.txt", "#version: 0.2\n" + "\n".join(merges) + "\n")
    special = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    # Not GPT2Tokenizer: that class rebuilds its own pre-tokenizer and would lose the pairs of
    # digits.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    _write(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    _write(folder / "special_tokens_map.json", json.dumps(special, indent=2) + "\n")
