"""The logit lens: what would the model predict if it stopped after this layer?

    lens_l = softmax(unembed(h_l))

The unembedding, with the final LayerNorm computed afresh on h_l and 350m's projection where there
is one, is applied to the residual stream of every layer (nostalgebraist 2020, "interpreting GPT:
the logit lens"). The last row is the model's own prediction. Entropy and KL divergence are in nats;
KL runs from the final distribution to the lens, KL(final || lens).

A vocabulary of 50,272 makes the full table of probabilities far larger than anything else, so the
statistics are computed a few positions at a time, and only they are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optlens import checks
from optlens.recording import FINAL, LENS, NotRecordedError, Recording

if TYPE_CHECKING:
    from optlens.base import Prompt
    from optlens.model import OPTForCausalLM

# What a recording keeps of the lens, so that it can be read without the model.
STORED_TOP_K = 10
# Bytes of the working tensors of one chunk, [positions, d_vocab] in float32.
CHUNK_BYTES = 64_000_000


@dataclass
class LogitLens:
    """What each layer would predict; with a leading batch axis for a batch of prompts.

    Attributes:
        top_tokens: Most likely token ids, best first, `[layer + 1, pos, k]`.
        top_probs: Their probabilities, `[layer + 1, pos, k]`, float32.
        entropy: Of the whole distribution, in nats, `[layer + 1, pos]`.
        kl: KL(final || lens), in nats, `[layer + 1, pos]`; the last row is 0.
        labels: Names of the rows: "embed", "0", "1", ...; with sub-layers "0 mid", "0 post", ...
    """

    top_tokens: Tensor
    top_probs: Tensor
    entropy: Tensor
    kl: Tensor
    labels: list[str]
    _recording: Recording = field(repr=False)
    _rows: Tensor | None = field(repr=False, default=None)

    def rank(self, token: int | str) -> Tensor:
        """Return how many tokens each layer finds likelier than this one, `[layer + 1, pos]`.

        Args:
            token: An id, or the text of a single token, such as " Paris".
        """
        index = self._token_id(token)
        stored = self._from_stored(index)
        if stored is not None:
            return stored[0]

        def statistic(logits: Tensor) -> Tensor:
            return (logits > logits[..., index, None]).sum(-1)

        return self._map(statistic)

    def prob(self, token: int | str) -> Tensor:
        """Return the probability that each layer gives a token, `[layer + 1, pos]`."""
        index = self._token_id(token)
        stored = self._from_stored(index)
        if stored is not None:
            return stored[1]
        return self._map(lambda logits: logits.log_softmax(-1)[..., index].exp())

    def logit(self, token: int | str) -> Tensor:
        """Return the logit that each layer gives a token, `[layer + 1, pos]`; needs the model.

        Logits of one token differ between rows by what all logits share, too; the difference of two
        tokens' is what a layer says of the two.
        """
        index = self._token_id(token)
        return self._map(lambda logits: logits[..., index])

    def top_labels(self) -> list:
        """Return legible names of `top_tokens`, as nested lists of the same shape."""

        def name(ids: list | int) -> list | str:
            return [name(i) for i in ids] if isinstance(ids, list) else self._recording.label(ids)

        return name(self.top_tokens.tolist())

    def _token_id(self, token: int | str) -> int:
        config = self._recording.metadata["config"]
        if isinstance(token, str):
            return self._recording.model.to_single_token(token)
        if not 0 <= token < config["vocab_size"]:
            raise checks.InputError(
                f"Token id {token} is out of range: 0 to {config['vocab_size'] - 1}."
            )
        return int(token)

    def _from_stored(self, index: int) -> tuple[Tensor, Tensor] | None:
        """Without a model, answer from the recording's table, if it has the token everywhere."""
        if self._recording._model is not None:
            return None
        tokens, probs = (
            self._recording._get(LENS + name, "logit_lens") for name in _STATISTICS[:2]
        )
        found = tokens == index
        if not bool(found.any(-1).all()):
            raise NotRecordedError(
                f"Token {index} is not among the stored top {found.shape[-1]} at every layer and "
                "position, so this needs the model: rec.attach(model)."
            )
        return found.int().argmax(-1), (probs * found).sum(-1)

    def _map(self, statistic: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply a function of float32 logits `[n, d_vocab]` to every row and position."""
        flat = self._rows.flatten(0, -2)
        out = []
        for chunk in flat.split(_chunk_size(self._recording)):
            out.append(statistic(_logits(self._recording, chunk)).cpu())
        return torch.cat(out).view(self._rows.shape[:-1])


def logit_lens(
    model: OPTForCausalLM,
    source: Recording | Prompt,
    top_k: int = 5,
    sublayers: bool = False,
) -> LogitLens:
    """Return what each layer of a model would predict on a prompt.

    Args:
        model: The model.
        source: A recording that holds the residual stream, or a prompt to record.
        top_k: How many tokens to list.
        sublayers: Also read the stream between attention and MLP: rows "0 mid", "0 post", ...

    Raises:
        NotRecordedError: If the recording lacks what is needed, naming the `what` to add.

    Example:
        >>> lens = logit_lens(optlens.load(), "The cat sat on the")  # doctest: +SKIP
        >>> lens.top_labels()[-1][-1]  # doctest: +SKIP
    """
    if isinstance(source, Recording):
        return source.logit_lens(top_k, sublayers, model=model)
    what = ("residual", "resid_mid") if sublayers else ("residual",)
    return lens_of_recording(model.record(source, what=what), top_k, sublayers)


def lens_of_recording(recording: Recording, top_k: int = 5, sublayers: bool = False) -> LogitLens:
    """Return the lens of a recording: the stored one if it is enough, else computed."""
    vocabulary = recording.metadata["config"]["vocab_size"]
    if not 1 <= top_k <= vocabulary:
        raise checks.InputError(f"top_k must be 1 to {vocabulary}, got {top_k}.")
    stored = recording._tensors.get(LENS + "top_tokens")
    has_model = recording._model is not None
    if not sublayers and stored is not None and (top_k <= stored.shape[-1] or not has_model):
        if top_k > stored.shape[-1]:
            raise NotRecordedError(
                f"This recording was loaded without its model and stores the top "
                f"{stored.shape[-1]} of the lens, fewer than top_k={top_k}: pass model=."
            )
        statistics = [recording._get(LENS + name, "logit_lens") for name in _STATISTICS]
        top_tokens, top_probs = (s[..., :top_k] for s in statistics[:2])
        rows = recording._tensors.get("residual")
        rows = rows if rows is None or recording.is_batch else rows[0]
        return LogitLens(
            top_tokens, top_probs, *statistics[2:], recording.row_labels, recording, rows
        )
    rows, labels = _rows(recording, sublayers)
    statistics = _compute(recording, rows, top_k)
    if not recording.is_batch:
        statistics, rows = [s[0] for s in statistics], rows[0]
    return LogitLens(*statistics, labels, recording, rows)


_STATISTICS = ("top_tokens", "top_probs", "entropy", "kl")


def store_lens(recording: Recording) -> None:
    """Compute the lens of a fresh recording and keep it there."""
    rows, _ = _rows(recording, sublayers=False)
    top_k = min(STORED_TOP_K, recording.metadata["config"]["vocab_size"])
    for name, value in zip(_STATISTICS, _compute(recording, rows, top_k), strict=True):
        recording._tensors[LENS + name] = value
    tokenizer = recording.model.tokenizer
    if tokenizer is not None:
        found = recording._tensors[LENS + "top_tokens"].unique().tolist()
        recording.metadata["labels"] |= {str(token): tokenizer.display(token) for token in found}


def _rows(recording: Recording, sublayers: bool) -> tuple[Tensor, list[str]]:
    """Return the residual rows to decode, `[batch, row, pos, d_model]`, and their names."""
    if "residual" not in recording._tensors:
        recording._get("residual", "residual")  # raises, naming what to record
    post = recording._tensors["residual"]
    if not sublayers:
        return post, recording.row_labels
    recording._get("resid_mid", "resid_mid")
    mid = recording._tensors["resid_mid"]
    pairs = torch.stack([mid, post[:, 1:]], dim=2).flatten(1, 2)  # mid, post, mid, post, ...
    labels = [f"{layer} {part}" for layer in recording.layers for part in ("mid", "post")]
    return torch.cat([post[:, :1], pairs], dim=1), ["embed", *labels]


def _chunk_size(recording: Recording) -> int:
    return max(1, CHUNK_BYTES // (4 * recording.metadata["config"]["vocab_size"]))


def _logits(recording: Recording, resid: Tensor) -> Tensor:
    """Return float32 (or wider) logits of residuals `[n, d_model]`."""
    logits = recording._unembed(resid)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _compute(recording: Recording, rows: Tensor, top_k: int) -> list[Tensor]:
    """Compute the four statistics, each `[batch, row, pos, ...]`, a few positions at a time."""
    final = recording._tensors[FINAL].flatten(0, 1)  # [batch * pos, d_model]
    by_row = rows.transpose(0, 1).flatten(1, 2)  # [row, batch * pos, d_model]
    n_rows, n_places = by_row.shape[:2]
    tokens = torch.empty(n_rows, n_places, top_k, dtype=torch.long)
    probs = torch.empty(n_rows, n_places, top_k)
    entropy, kl = torch.empty(n_rows, n_places), torch.empty(n_rows, n_places)
    size = _chunk_size(recording)
    for start in range(0, n_places, size):
        chunk = slice(start, start + size)
        final_log = _logits(recording, final[chunk]).log_softmax(-1)
        final_prob = final_log.exp()
        for row in range(n_rows):
            work = _logits(recording, by_row[row, chunk])
            log = work.log_softmax(-1)
            top = log.topk(top_k)
            tokens[row, chunk] = top.indices.cpu()
            probs[row, chunk] = top.values.exp().float().cpu()
            # the tables are large: what comes next takes the logits' memory, no longer needed
            torch.special.entr(torch.exp(log, out=work), out=work)
            entropy[row, chunk] = work.sum(-1).float().cpu()
            torch.sub(final_log, log, out=work).mul_(final_prob)
            kl[row, chunk] = work.sum(-1).float().cpu()
            del work, log
    batch = rows.shape[0]
    return [s.unflatten(1, (batch, -1)).transpose(0, 1) for s in (tokens, probs, entropy, kl)]
