"""OPT's tokenizer: byte-level BPE, with one `</s>` in front of every text.

Computes the token ids that OPT reads from text, text from ids, and legible labels for single ids.
It is the step before the forward pass (`model.to_tokens`) and after it (`model.to_string`).
Text is cut into words, each word's UTF-8 bytes are spelt with 256 printable characters, and the
merges of GPT-2's byte-level BPE are applied, in RoBERTa's id order: `<s>` 0, `<pad>` 1, `</s>` 2,
`<unk>` 3. OPT uses `</s>` as beginning, end and unknown token, and only ever puts it in front.
The merging is done by the `tokenizers` library. Training a vocabulary is left out.
"""

from __future__ import annotations

import operator
import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor

from optlens import checks, tokenizer_files

_VISIBLE = {" ": "·", "\n": "↵", "\t": "⇥", "\x7f": "␡"}


def _byte_alphabet() -> dict[str, int]:
    """Return the byte that each of byte-level BPE's 256 characters stands for.

    Bytes that Latin-1 prints stand for themselves; the others take the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()


def _legible(data: bytes, show: Callable[[str], str] = str) -> str:
    """Return UTF-8 text, each character through `show`; other bytes are written `⟨E4 B8⟩`."""
    # surrogateescape marks an undecodable byte b as U+DC00 + b, which no valid UTF-8 decodes to.
    text = "".join(map(show, data.decode("utf-8", errors="surrogateescape")))
    return re.sub(
        "[\udc80-\udcff]+",
        lambda run: "⟨" + " ".join(f"{ord(char) - 0xDC00:02X}" for char in run[0]) + "⟩",
        text,
    )


def _visible(char: str) -> str:
    """Return a character so that it can be seen: no blank, control or invisible format character."""
    if char in _VISIBLE:
        return _VISIBLE[char]
    if char < " ":
        return chr(0x2400 + ord(char))  # Unicode's pictures of the control codes
    if unicodedata.category(char) in {"Cc", "Cf", "Co", "Zs", "Zl", "Zp"}:
        return f"⟨U+{ord(char):04X}⟩"
    return char


def _id_list(ids: int | Sequence[int] | Tensor) -> list[int]:
    """Return ids `[pos]`, or one id, as a list of ints."""
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    return [operator.index(index) for index in ([ids] if isinstance(ids, int) else ids)]


class OPTTokenizer:
    """Turn text into OPT's token ids and back.

    Build one with `from_folder`, `from_files` or `from_tokenizers`; a model loaded from a
    checkpoint carries its own as `model.tokenizer`.

    Attributes:
        bos_token_id: Id put in front of a text (OPT: 2, `</s>`); None if there is none.
        eos_token_id: Id that ends a text (OPT: 2), or None.
        unk_token_id: Id of the unknown token (OPT: 2), or None. Byte-level BPE never needs it.
        pad_token_id: Id that fills up shorter rows (OPT: 1, `<pad>`), or None.
        add_bos_token: Whether a text gets `bos_token_id` in front. True for OPT, False for
            vocabularies whose models never saw one there (Galactica).

    Example:
        >>> import optlens
        >>> tokenizer = optlens.load().tokenizer
        >>> tokenizer.decode(tokenizer.encode("The cat sat."))
        '</s>The cat sat.'
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        settings: dict[str, Any] | None = None,
        n_rows: int | None = None,
        last_id: int | None = None,
    ):
        """Wrap a byte-level BPE, which `from_tokenizers` would copy first.

        Args:
            tokenizer: The BPE, of the `tokenizers` library. It is changed: special tokens are added.
            settings: Keys as in tokenizer_config.json; what is missing is as in OPT's checkpoints.
            n_rows: Rows of the embedding (d_vocab), if known.
            last_id: The vocabulary's largest id without added tokens, if known.

        Raises:
            ValueError: If it is another kind of tokenizer, or has ids beyond `n_rows`.
        """
        kind = type(tokenizer.model).__name__
        parts = [part for part in (tokenizer.pre_tokenizer, tokenizer.decoder) if part is not None]
        if kind != "BPE" or not any(b"ByteLevel" in part.__getstate__() for part in parts):
            raise ValueError(
                f"Expected a byte-level BPE, the tokenizer of OPT; got {kind} with pre-tokenizer "
                f"{tokenizer.pre_tokenizer}. A model can also run on a tensor of token ids."
            )
        self._settings = dict(settings or {})
        self._backend = tokenizer
        # A file may have these switched on, which would cut and fill up every text in silence.
        self._backend.no_truncation()
        self._backend.no_padding()
        ids, self.add_bos_token = tokenizer_files.apply_settings(self._backend, self._settings)
        self.bos_token_id, self.eos_token_id = ids["bos_token"], ids["eos_token"]
        self.unk_token_id, self.pad_token_id = ids["unk_token"], ids["pad_token"]
        added = self._backend.get_added_tokens_decoder()
        self._added_ids = set(added)
        self.special_ids = {index for index, token in added.items() if token.special}
        if last_id is None:  # fetching the vocabulary takes a fifth of the time of reading it
            last_id = max(self._backend.get_vocab().values(), default=-1)
        self._last_id = max([last_id, *added])
        self.n_rows = n_rows
        if n_rows is not None:
            self.check_rows(n_rows)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike, n_rows: int | None = None) -> OPTTokenizer:
        """Read a checkpoint folder: tokenizer.json if it is there, else vocab.json and merges.txt.

        Raises:
            FileNotFoundError: If the folder, or a tokenizer in it, is missing.
            ValueError: If a file is damaged (it is named) or an id lies beyond `n_rows`.
        """
        tokenizer, settings, last_id = tokenizer_files.read_folder(Path(folder))
        return cls(tokenizer, settings, n_rows, last_id)

    @classmethod
    def from_files(cls, vocab: str | os.PathLike, merges: str | os.PathLike) -> OPTTokenizer:
        """Read vocab.json and merges.txt, with OPT's special tokens."""
        tokenizer, last_id = tokenizer_files.build_bpe(Path(vocab), Path(merges))
        return cls(tokenizer, last_id=last_id)

    @classmethod
    def from_tokenizers(cls, tokenizer: Tokenizer, **settings: str | bool) -> OPTTokenizer:
        """Copy a `tokenizers.Tokenizer`; keywords like `bos_token="<s>"`, `add_bos_token=False`."""
        return cls(Tokenizer.from_str(tokenizer.to_str()), settings)

    def __repr__(self) -> str:
        return f"OPTTokenizer({self.vocab_size} tokens, bos {self.bos_token_id})"

    @property
    def vocab_size(self) -> int:
        """Number of tokens that have a text; OPT's embedding has 7 rows more."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def check_rows(self, n_rows: int) -> None:
        """Raise a ValueError unless every token's id is a row of an embedding of `n_rows` rows."""
        if self._last_id >= n_rows:
            raise ValueError(
                f"The tokenizer has ids up to {self._last_id}, the model's embedding only {n_rows} "
                "rows: they belong to different models, or the embedding was not resized."
            )

    def encode(self, text: str, prepend_bos: bool = True) -> list[int]:
        """Return the ids of a text.

        Args:
            text: Any text. Special tokens written in it, such as `</s>`, become their own ids.
            prepend_bos: Put `bos_token_id` in front, if this tokenizer does so (`add_bos_token`)
                and the text does not begin with it already.

        Raises:
            InputError: If the text holds half of a surrogate pair, which is no Unicode character.
        """
        if not isinstance(text, str):
            raise TypeError(f"Expected text (str), got {type(text).__name__}.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise checks.InputError(
                f"Character {error.start} of the text is U+{ord(text[error.start]):04X}, half of a "
                'surrogate pair. Remove it, or read the text with errors="replace".'
            ) from error
        ids = self._backend.encode(text, add_special_tokens=False).ids
        if prepend_bos and self.add_bos_token and ids[:1] != [self.bos_token_id]:
            ids.insert(0, self.bos_token_id)
        return ids

    def decode(self, ids: int | Sequence[int] | Tensor, skip_special: bool = False) -> str:
        """Return the text of ids `[pos]`.

        Bytes that make no whole character become U+FFFD. An id without a token, of which OPT's
        embedding has 7, is written `⟨50265⟩`.

        Args:
            ids: One id, a list or a tensor `[pos]`.
            skip_special: Leave out special tokens, and ids without a token.
        """
        ids = _id_list(ids)
        if skip_special:
            ids = [i for i in ids if i not in self.special_ids and self.bytes_of(i) is not None]
        pieces = [f"⟨{i}⟩".encode() if (data := self.bytes_of(i)) is None else data for i in ids]
        return b"".join(pieces).decode("utf-8", errors="replace")

    def to_str_tokens(self, ids: int | Sequence[int] | Tensor) -> list[str]:
        """Return each id's own text, such as `['</s>', 'Hello', ' world']`.

        Bytes that make no whole character are written in hexadecimal, `⟨E4 B8⟩`.
        """
        pieces = [(index, self.bytes_of(index)) for index in _id_list(ids)]
        return [f"⟨{i}⟩" if data is None else _legible(data) for i, data in pieces]

    def display(self, index: int) -> str:
        """Return a label for one id that shows all there is in it.

        Blanks become `·`, line ends `↵`, tabs `⇥`, other invisible characters their number, bytes
        that make no whole character `⟨E4 B8⟩`; an empty token is `∅`, a lone accent sits on `◌`.
        """
        data = self.bytes_of(index)
        if data is None:
            return f"⟨{index}⟩"
        label = _legible(data, _visible) or "∅"
        return "◌" + label if unicodedata.category(label[0]).startswith("M") else label

    def display_tokens(self, ids: int | Sequence[int] | Tensor) -> list[str]:
        """Return one `display` label per id; labels may repeat, so address tokens by position."""
        return [self.display(index) for index in _id_list(ids)]

    def bytes_of(self, index: int) -> bytes | None:
        """Return a token's UTF-8 bytes, or None for an id that has no token."""
        if index < 0 or (self.n_rows is not None and index >= self.n_rows):
            top = "" if self.n_rows is None else f" to {self.n_rows - 1}"
            raise checks.InputError(f"There is no token id {index}; ids go from 0{top}.")
        token = self._backend.id_to_token(index)
        if token is None:
            return None
        # Added tokens are kept as plain text; all others in the byte alphabet.
        if index in self._added_ids or not _BYTE_OF.keys() >= set(token):
            return token.encode("utf-8")
        return bytes(map(_BYTE_OF.__getitem__, token))

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token in the vocabulary's own spelling (`Ġworld`), or None."""
        return self._backend.token_to_id(token)

    def single_token(self, text: str) -> int:
        """Return the id of a text that is one token, such as `" Mary"`.

        Raises:
            InputError: If it is not exactly one, showing its pieces.
        """
        ids = self.encode(text, prepend_bos=False)
        if len(ids) == 1:
            return ids[0]
        if not ids:
            raise checks.InputError("The text is empty, expected one token.")
        pieces = ", ".join(map("{!r} ({})".format, self.to_str_tokens(ids), ids))
        other = text[1:] if text.startswith(" ") else f" {text}"
        hint = f" {other!r} is one token." if len(self.encode(other, False)) == 1 else ""
        raise checks.InputError(f"{text!r} is {len(ids)} tokens, expected one: {pieces}.{hint}")

    def pad(
        self, rows: Sequence[Sequence[int]], side: Literal["left", "right"] = "left"
    ) -> tuple[Tensor, Tensor]:
        """Fill up rows of ids to one length.

        Args:
            rows: Ids of each prompt; none may be empty.
            side: Where the padding goes.

        Returns:
            The ids `[batch, pos]` and their mask `[batch, pos]`, 1 for real tokens and 0 for
            padding, both int64.

        Raises:
            InputError: If there are no rows or one is empty.
        """
        if side not in ("left", "right"):
            raise ValueError(f'side must be "left" or "right", got {side!r}.')
        empty = [number for number, row in enumerate(rows) if len(row) == 0]
        if len(rows) == 0 or empty:
            which = f"Prompt {empty[0]}" if empty else "The list of prompts"
            raise checks.InputError(f"{which} is empty, it needs at least one token.")
        length = max(map(len, rows))
        # The mask hides the padding, so without a pad token any id may fill it.
        ids = torch.full((len(rows), length), self.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            real = slice(length - len(row), length) if side == "left" else slice(0, len(row))
            ids[number, real] = torch.tensor(row)
            mask[number, real] = 1
        return ids, mask

    def save(self, folder: str | os.PathLike) -> None:
        """Write the tokenizer's files into a folder, from which transformers gives the same ids.

        They are tokenizer.json, vocab.json, merges.txt, tokenizer_config.json and
        special_tokens_map.json, all complete before the first replaces an old one.
        """
        settings = self._settings | {"add_bos_token": self.add_bos_token}
        tokenizer_files.write_folder(Path(folder), self._backend, settings)


class TokenizerMethods:
    """Give a model the methods that turn prompts into tokens and back.

    The model has `tokenizer` (None for one without), `config` and, if not on the CPU, `device`.
    """

    tokenizer: OPTTokenizer | None
    config: Any

    def to_tokens(self, prompt: str | Sequence[str] | Tensor, prepend_bos: bool = True) -> Tensor:
        """Return the token ids of a prompt, `[batch, pos]` int64, on the model's device.

        Prompts of unequal length are padded on the left; `to_tokens_and_mask` gives the mask too.

        Args:
            prompt: A string, a list of strings, or token ids `[pos]` or `[batch, pos]`.
            prepend_bos: Put `</s>` in front of strings, once, as OPT was trained. A vocabulary
                made without it (`tokenizer.add_bos_token` is False) gets none. To see part of a
                prompt tokenised, pass False.

        Raises:
            InputError: If a prompt is empty, or an id is out of range.

        Example:
            >>> import optlens
            >>> model = optlens.load()
            >>> model.to_string(model.to_tokens("The cat sat."))
            ['</s>The cat sat.']
        """
        return self.to_tokens_and_mask(prompt, prepend_bos)[0]

    def to_tokens_and_mask(
        self, prompt: str | Sequence[str] | Tensor, prepend_bos: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Return token ids as `to_tokens` does, with their mask `[batch, pos]`.

        The mask is 1 for real tokens and 0 for padding; None when nothing was padded. Token ids are
        taken as they are: if they hold padding, the mask is the caller's to give.
        """
        tokens, mask = self._ids_and_mask(prompt, prepend_bos)
        device = getattr(self, "device", tokens.device)
        return tokens.to(device), None if mask is None else mask.to(device)

    def _ids_and_mask(
        self, prompt: str | Sequence[str] | Tensor, prepend_bos: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Return the same where it is made: of text on the CPU, of ids where they are."""
        texts, mask = [prompt] if isinstance(prompt, str) else prompt, None
        if isinstance(prompt, Tensor):
            tokens = prompt[None] if prompt.ndim == 1 else prompt
        elif isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts):
            tokenizer = self._text_tokenizer()
            tokens, mask = tokenizer.pad([tokenizer.encode(text, prepend_bos) for text in texts])
            mask = None if mask.all() else mask
        else:
            raise TypeError(
                "Expected a string, a list of strings or a tensor of token ids, got "
                f"{type(prompt).__name__}. Wrap a list of ids in torch.tensor(...)."
            )
        checks.token_ids(tokens, self.config.vocab_size)
        return tokens.long(), mask

    def to_string(self, tokens: int | Sequence | Tensor) -> str | list[str]:
        """Return the text of ids `[pos]`, or a list of texts of ids `[batch, pos]`."""
        tokens = tokens.tolist() if hasattr(tokens, "tolist") else tokens
        if isinstance(tokens, list | tuple) and tokens and isinstance(tokens[0], list | Tensor):
            return [self.to_string(row) for row in tokens]
        return self._text_tokenizer().decode(tokens)

    def to_str_tokens(
        self, prompt: str | Sequence[str] | Tensor, prepend_bos: bool = True
    ) -> list[str] | list[list[str]]:
        """Return the text of each token of a prompt; a list of prompts gives a list of lists.

        Example:
            >>> import optlens
            >>> "".join(optlens.load().to_str_tokens("The cat sat."))
            '</s>The cat sat.'
        """
        if isinstance(prompt, list | tuple):
            return [self.to_str_tokens(text, prepend_bos) for text in prompt]
        tokens, _ = self.to_tokens_and_mask(prompt, prepend_bos)
        rows = [self._text_tokenizer().to_str_tokens(row) for row in tokens]
        return rows[0] if len(rows) == 1 else rows

    def to_single_token(self, text: str) -> int:
        """Return the id of a text that is exactly one token; raise an InputError if it is not."""
        return self._text_tokenizer().single_token(text)

    def _text_tokenizer(self) -> OPTTokenizer:
        """Return the tokenizer; raise if there is none, or if it has ids the model has not."""
        if self.tokenizer is None:
            raise checks.InputError(
                "This model has no tokenizer, so it cannot read text. Give it a tensor of token "
                'ids, or set model.tokenizer = OPTTokenizer.from_folder("...").'
            )
        self.tokenizer.check_rows(self.config.vocab_size)
        return self.tokenizer
