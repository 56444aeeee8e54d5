"""The tokenizer's files: what a checkpoint folder says about its byte-level BPE.

Reads tokenizer.json, or vocab.json with merges.txt, and the small settings files beside them; writes
all of them, so that other libraries give the same ids. It runs before any text is turned into ids.
The formats are those of Hugging Face checkpoints. What the settings mean is left to `tokenizer.py`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from optlens.files import type_of, why_unreadable
from optlens.staging import commit, staging_folder

# What opt checkpoints' own tokenizer_config.json says; used where a folder says nothing.
_OPT_TOKENS = {
    "bos_token": "</s>",
    "eos_token": "</s>",
    "unk_token": "</s>",
    "pad_token": "<pad>",
}
# The order in which transformers adds named tokens that the vocabulary lacks: it decides their ids.
_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_NO_MERGE = ("", "#version")  # how lines of merges.txt begin that hold none
_OLDER_FILE = "added_tokens.json"
_MORE_TOKENS = ("additional_special_tokens", "extra_special_tokens")
# True of the folder that was read, but not of the one that is written.
_STALE = ("added_tokens_decoder", "name_or_path", "special_tokens_map_file", "tokenizer_file")


def _read_text(path: Path) -> str:
    """Return a file's text; raise a ValueError that names it when it cannot be read as UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {why_unreadable(path, error)}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}). Fetch the file again.") from error


def _read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; raise a ValueError that names the file when it holds anything else."""
    try:
        content = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}). It may be half downloaded: fetch the file again."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type_of(content)}, expected a JSON object.")
    return content


def _read_json_if_there(path: Path) -> dict[str, Any]:
    return _read_json(path) if os.path.lexists(path) else {}


def _read_vocab(path: Path) -> dict[str, int]:
    """Return vocab.json as token to id; raise when it does not give each token its own id."""
    vocab = _read_json(path)
    kinds = set(map(type, vocab.values()))
    ids = set(vocab.values()) if kinds == {int} else set()
    if kinds != {int} or min(ids) < 0:  # only then go through them one by one
        for token, index in vocab.items():
            if type(index) is not int or index < 0:
                raise ValueError(
                    f"{path}: token {token!r} has id {index!r}, expected an integer >= 0."
                )
    if not vocab or len(ids) < len(vocab):
        raise ValueError(f"{path} must hold at least one token and give each an id of its own.")
    return vocab


def _read_merges(path: Path) -> list[tuple[str, str]]:
    """Return the merges of merges.txt, in order; raise naming the line that is not a pair."""
    lines = _read_text(path).splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line[:8] not in _NO_MERGE]
    if set(map(len, merges)) - {2}:  # only then go through them one by one
        for number, line in enumerate(lines, start=1):
            if line[:8] not in _NO_MERGE and line.count(" ") != 1:
                raise ValueError(
                    f"{path}, line {number}: {line!r} is not two tokens and one space."
                )
    return merges


def build_bpe(vocab: Path, merges: Path, add_prefix_space: bool = False) -> tuple[Tokenizer, int]:
    """Build a byte-level BPE from vocab.json and merges.txt; return it and its largest id.

    Raises:
        ValueError: If a file is damaged or the two do not belong together; the file is named.
    """
    tokens, pairs = _read_vocab(vocab), _read_merges(merges)
    try:
        bpe = models.BPE(vocab=tokens, merges=pairs)
    except Exception as error:  # the library raises a bare Exception
        raise ValueError(f"{merges} does not belong to {vocab}: {error}.") from error
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, max(tokens.values())


def _read_settings(folder: Path) -> dict[str, Any]:
    """Return the folder's settings in the keys of tokenizer_config.json.

    special_tokens_map.json and added_tokens.json are older files, which a table of added tokens in
    tokenizer_config.json replaces. config.json only lends its token ids.
    """
    settings = _read_json_if_there(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings |= _read_json_if_there(folder / "special_tokens_map.json")
        added = _read_json_if_there(folder / _OLDER_FILE)
        settings["added_tokens_decoder"] = {str(i): {"content": t} for t, i in added.items()}
    try:
        _check_tokens(settings)
    except ValueError as error:
        where = "tokenizer_config.json, special_tokens_map.json and added_tokens.json"
        raise ValueError(f"{folder} ({where}): {error}") from error
    config = _read_json_if_there(folder / "config.json")
    ids = {f"{key}_id": config.get(f"{key}_id") for key in _OPT_TOKENS}
    return settings | {key: index for key, index in ids.items() if isinstance(index, int)}


def _check_tokens(settings: dict[str, Any]) -> None:
    """Raise where a setting that should hold tokens holds something else."""
    named = {key: settings[key] for key in _NAMED_TOKENS if settings.get(key)}
    for key in _MORE_TOKENS:
        extra = settings.get(key) or []
        if not isinstance(extra, list | dict):
            raise ValueError(f"{key} is {type_of(extra)}, expected a list of tokens.")
        entries = extra.items() if isinstance(extra, dict) else enumerate(extra)
        named |= {f"{key}, {place}": entry for place, entry in entries if entry}
    table = settings.get("added_tokens_decoder") or {}
    if not isinstance(table, dict):
        raise ValueError(f"added_tokens_decoder is {type_of(table)}, expected a table.")
    for index, entry in table.items():
        if not index.isdecimal():
            raise ValueError(f"an added token has the id {index!r}, expected a number.")
        named[f"added token {index}"] = entry
    for key, entry in named.items():
        text = entry.get("content") if isinstance(entry, dict) else entry
        if not isinstance(text, str):
            raise ValueError(f"{key} is {entry!r}, expected a token's text, or a table with one.")


def read_folder(folder: Path) -> tuple[Tokenizer, dict[str, Any], int | None]:
    """Return a checkpoint folder's tokenizer, its settings, and the largest id where it is known.

    The settings have the keys of tokenizer_config.json, and `bos_token_id` and the like if the
    model's config.json gives them.

    Raises:
        FileNotFoundError: If the folder, or a tokenizer in it, is missing.
        ValueError: If a file is damaged or cannot be read; it is named.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}; expected that of a checkpoint.")
    settings = _read_settings(folder)
    path = folder / "tokenizer.json"
    if os.path.lexists(path):
        text = _read_text(path)
        try:
            return Tokenizer.from_str(text), settings, None
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"{path} holds no tokenizer ({error}). Fetch it again.") from error
    missing = [name for name in ("vocab.json", "merges.txt") if not os.path.lexists(folder / name)]
    if missing:
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(
            f"No tokenizer in {folder}: expected tokenizer.json, or vocab.json with merges.txt. "
            f"Missing: {' and '.join(missing)}; found: {found}."
        )
    prefix = bool(settings.get("add_prefix_space"))
    tokenizer, last_id = build_bpe(folder / "vocab.json", folder / "merges.txt", prefix)
    return tokenizer, settings, last_id


def _added_token(entry: str | dict[str, Any], special: bool) -> AddedToken:
    """Build an added token from its text or its entry in a settings file."""
    entry = entry if isinstance(entry, dict) else {"content": entry}
    flags = {key: bool(entry.get(key, False)) for key in ("single_word", "lstrip", "rstrip")}
    return AddedToken(entry["content"], normalized=False, special=special, **flags)


def _named_tokens(settings: dict[str, Any]) -> list[AddedToken]:
    """Return the special tokens that the settings name, in transformers' order."""
    named = [settings.get(key) for key in _NAMED_TOKENS]
    for key in _MORE_TOKENS:
        extra = settings.get(key) or []
        named += extra.values() if isinstance(extra, dict) else extra
    return [_added_token(entry, special=True) for entry in named if entry]


def _declare_added_tokens(tokenizer: Tokenizer, settings: dict[str, Any]) -> None:
    """Add the settings' table of added tokens; raise where they would not get their ids."""
    special = {token.content for token in _named_tokens(settings)}
    table = settings.get("added_tokens_decoder") or {}
    for key in sorted(table, key=int):
        index, entry = int(key), table[key]
        text = entry["content"] if isinstance(entry, dict) else entry
        if index not in tokenizer.get_added_tokens_decoder():
            is_special = text in special or (isinstance(entry, dict) and bool(entry.get("special")))
            tokenizer.add_tokens([_added_token(entry, is_special)])
        if tokenizer.token_to_id(text) != index:
            raise ValueError(
                f"The tokenizer's settings give {text!r} the id {index}, its vocabulary gives it "
                f"{tokenizer.token_to_id(text)}: are these files of two tokenizers?"
            )


def _leading_id(tokenizer: Tokenizer) -> int | None:
    """Return the id that a tokenizer.json's own post-processor puts in front, if it does."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    processed = tokenizer.encode("a", add_special_tokens=True).ids
    return processed[0] if processed[:1] != plain[:1] else None


def apply_settings(
    tokenizer: Tokenizer, settings: dict[str, Any]
) -> tuple[dict[str, int | None], bool]:
    """Make the tokens special that the settings name, and settle what goes in front of a text.

    Both arguments are changed: the tokenizer gets its added tokens, the settings the names of the
    bos, eos, unk and pad token (OPT's, where they were silent and the vocabulary has them).

    Returns:
        The ids of the four tokens, and whether the bos token goes in front of a text.
    """
    _declare_added_tokens(tokenizer, settings)
    added = tokenizer.get_added_tokens_decoder()
    leading = _leading_id(tokenizer)
    for key, default in _OPT_TOKENS.items():
        hint = settings.pop(f"{key}_id", None)
        if settings.get(key):
            continue
        # An id from config.json counts only if it is an added token's: its default is OPT's, and
        # in another vocabulary id 2 may be a letter.
        text = added[hint].content if hint in added else default
        if key == "bos_token" and leading is not None:
            text = tokenizer.id_to_token(leading)
        settings[key] = text if tokenizer.token_to_id(text) is not None else None
    known = {token.content for token in added.values() if token.special}
    tokenizer.add_special_tokens([t for t in _named_tokens(settings) if t.content not in known])
    ids = {}
    for key in _OPT_TOKENS:
        entry = settings[key]
        settings[key] = entry["content"] if isinstance(entry, dict) else entry
        ids[key] = settings[key] and tokenizer.token_to_id(settings[key])
    adds = settings.get("add_bos_token")
    if adds is None:
        is_opt = settings["bos_token"] == _OPT_TOKENS["bos_token"]
        adds = is_opt if leading is None else leading == ids["bos_token"]
    return ids, bool(adds) and ids["bos_token"] is not None


def _merge_line(merge: str | list[str]) -> str:
    """Return a merge as merges.txt writes it; tokenizer.json has both spellings."""
    return merge if isinstance(merge, str) else " ".join(merge)


def write_folder(folder: Path, tokenizer: Tokenizer, settings: dict[str, Any]) -> None:
    """Write the tokenizer's five files; an existing folder keeps what else is in it.

    They take their places together, or none does. An added_tokens.json goes: tokenizer.json has
    its tokens, and those of an earlier tokenizer would be read into this one.

    Args:
        folder: Where to write; made if it is missing.
        tokenizer: A byte-level BPE.
        settings: As in tokenizer_config.json, with `add_bos_token` and `bos_token`; stale entries
            are left out.

    Raises:
        OSError: If the folder cannot be written, naming it; its files are then as they were.
    """
    state = json.loads(tokenizer.to_str())
    front = Tokenizer(models.BPE())
    front.post_processor = processors.ByteLevel(trim_offsets=False)
    if settings["add_bos_token"]:
        bos = settings["bos_token"]
        front.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"],
            pair=[bos, "$A", bos, "$B"],
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
    state["post_processor"] = json.loads(front.to_str())["post_processor"]
    splitter = state["pre_tokenizer"] or {}
    plain = splitter.get("type") == "ByteLevel" and splitter.get("use_regex", True)
    # transformers rebuilds a GPT2Tokenizer from the vocabulary and merges alone; any other way of
    # cutting text into words has to be read from tokenizer.json, which its generic class does.
    rebuildable = plain and state["normalizer"] is None
    config = {key: value for key, value in settings.items() if key not in _STALE}
    config |= {
        "tokenizer_class": "GPT2Tokenizer" if rebuildable else "PreTrainedTokenizerFast",
        "add_prefix_space": bool(splitter.get("add_prefix_space", False)),
    }
    vocab = dict(sorted(state["model"]["vocab"].items(), key=lambda item: item[1]))
    merges = ["#version: 0.2", *map(_merge_line, state["model"]["merges"])]
    special = {key: config[key] for key in _OPT_TOKENS if config.get(key)}
    contents = {
        "tokenizer.json": json.dumps(state, ensure_ascii=False),
        "vocab.json": json.dumps(vocab, ensure_ascii=False),
        "merges.txt": "\n".join(merges) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2, ensure_ascii=False) + "\n",
    }
    try:
        with staging_folder(folder) as staging:
            for name, text in contents.items():
                (staging / name).write_text(text, encoding="utf-8", newline="\n")
            earlier = [_OLDER_FILE] if (folder / _OLDER_FILE).is_file() else []
            commit(staging, folder, list(contents), earlier)
    except OSError as error:
        raise type(error)(
            error.errno,
            f"Cannot write the tokenizer to {folder}: {error.strerror or error}. Nothing was changed",
        ) from error
