"""What a neuron writes, read as tokens: which it makes likelier and which less likely.

A neuron that fires with activation `a` adds `a * w_out` to the residual stream. With the scale of the final
LayerNorm held at its value `s` in a run, that adds exactly

    a / s * ((w_out - mean(w_out)) * gain) W_U

to the logits: the neuron's direct effect, which nothing behind it takes part in. What is computed here is the
vector behind `a / s`, one number for each token of the vocabulary. Adding one number to all logits changes no
probability, so only differences between tokens mean something.

In post-LN models (350m) the stream itself passes two LayerNorms in every block. The direct path then runs
through all of those behind the neuron, each with its own gain, and `s` is the product of their scales. Without a
final LayerNorm, in pre-LN, `s` is 1 and nothing is centred.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from optlens import checks
from optlens.neurons.result import NeuronResult, labels_of
from optlens.neurons.windows import choose
from optlens.recording import fingerprint
from optlens.selection import Selection, select
from optlens.weights import effective_weight, values_of

if TYPE_CHECKING:
    from pandas import DataFrame

    from optlens.model import OPTForCausalLM

CHUNK_BYTES = 64_000_000  # of one chunk's effects, [neurons, d_vocab] in float32


@dataclass(eq=False, repr=False, kw_only=True)
class VocabularyEffect(NeuronResult):
    """The tokens that neurons promote and suppress most, by their direct effect.

    The numbers are changes of the logit for an activation of 1, times the scale of the LayerNorms
    behind the neuron.

    Attributes:
        promoted_tokens: Token ids, most promoted first, `[layer, neuron, k]`.
        promoted: The effect on each, `[layer, neuron, k]`, float32.
        suppressed_tokens: Token ids, most suppressed first, `[layer, neuron, k]`.
        suppressed: The effect on each, `[layer, neuron, k]`.
        mean: The mean effect over the vocabulary, `[layer, neuron]`, to compare with.
    """

    promoted_tokens: Tensor
    promoted: Tensor
    suppressed_tokens: Tensor
    suppressed: Tensor
    mean: Tensor

    def of(self, layer: int, neuron: int) -> tuple[list, list]:
        """Return what one neuron promotes and what it suppresses, as lists of label and effect.

        Raises:
            InputError: If the neuron is not among those that were asked for.
        """
        at = self.place(layer, neuron)
        sides = (
            (self.promoted_tokens, self.promoted),
            (self.suppressed_tokens, self.suppressed),
        )
        up, down = (
            [
                (self.label(t), e)
                for t, e in zip(ids[at].tolist(), effects[at].tolist(), strict=True)
            ]
            for ids, effects in sides
        )
        return up, down

    def to_dataframe(self) -> DataFrame:
        """Return a pandas table, a row for each neuron and token; `side` is +1 if promoted, else -1.

        Raises:
            ModuleNotFoundError: If pandas is not installed.
        """
        import pandas

        rows = [
            {"layer": layer, "neuron": neuron, "side": side, "token": label, "effect": effect}
            for layer in self.layers
            for neuron in self.neurons
            for side, tokens in zip((1, -1), self.of(layer, neuron), strict=True)
            for label, effect in tokens
        ]
        return pandas.DataFrame(rows)

    def __repr__(self) -> str:
        """Say of which neurons and how many tokens."""
        return f"{self._about()}; {self.promoted.shape[-1]} tokens promoted, as many suppressed)"


def direct_effect(model: OPTForCausalLM, layer: int, neuron: int) -> Tensor:
    """Return a neuron's direct effect on every logit, `[d_vocab]`, float32.

    Divided by the scale of the final LayerNorm in a run (`ln_final.hook_scale`; in post-LN by the
    product of the scales of all LayerNorms behind the neuron), it is the change of the logits for
    an activation of 1, with those scales held.

    Args:
        model: The model.
        layer: The block; negative from the end.
        neuron: The neuron's number in it; negative from the end.

    Raises:
        InputError: If there is no such neuron.

    Example:
        >>> import optlens
        >>> model = optlens.load()
        >>> optlens.neurons.direct_effect(model, 4, 7).shape
        torch.Size([3584])
    """
    (layer,) = select(layer, model.config.n_layers, "layer")
    chosen = select(neuron, model.config.d_mlp, "neuron")
    with torch.no_grad():
        return _effects(model, _directions(model, layer, chosen))[0].cpu()


def vocabulary_effect(
    model: OPTForCausalLM, layers: Selection = None, neurons: Selection = None, k: int = 10
) -> VocabularyEffect:
    """Find which tokens neurons promote and suppress most, by their direct effect.

    Nothing is run: this reads the weights alone, a few neurons at a time.

    Args:
        model: The model.
        layers: Which blocks: a number, several, or a slice; None for all.
        neurons: Which neurons of each, likewise.
        k: How many tokens on each side.

    Raises:
        InputError: If a selection does not fit the model, or k the vocabulary.

    Example:
        >>> import optlens
        >>> model = optlens.load()
        >>> found = optlens.neurons.vocabulary_effect(model, layers=-1, neurons=7, k=3)
        >>> promoted, suppressed = found.of(4, 7)
        >>> len(promoted), promoted[0][1] > suppressed[0][1]
        (3, True)
    """
    chosen, which = choose(model, layers, neurons)
    if not 1 <= k <= model.config.vocab_size:
        raise checks.InputError(f"k must be 1 to {model.config.vocab_size}, got {k}.")
    size = max(1, CHUNK_BYTES // (4 * model.config.vocab_size))
    parts: list[list[Tensor]] = [[], [], [], [], []]
    with torch.no_grad():
        for layer in chosen:
            for directions in _directions(model, layer, which).split(size):
                effects = _effects(model, directions)
                high, low = effects.topk(k), effects.topk(k, largest=False)
                found = (high.indices, high.values, low.indices, low.values, effects.mean(-1))
                for part, value in zip(parts, found, strict=True):
                    part.append(value.cpu())
    names = ("promoted_tokens", "promoted", "suppressed_tokens", "suppressed", "mean")
    grid = (len(chosen), len(which))
    tensors = {n: torch.cat(p).unflatten(0, grid) for n, p in zip(names, parts, strict=True)}
    shown = torch.cat([tensors["promoted_tokens"], tensors["suppressed_tokens"]])
    about = {"labels": labels_of(model, shown), "fingerprint": fingerprint(model)}
    return VocabularyEffect(layers=chosen, neurons=which, metadata=about, **tensors)


def _directions(model: OPTForCausalLM, layer: int, neurons: list[int]) -> Tensor:
    """Return what neurons write, behind all LayerNorms of the direct path, `[neuron, d_model]`."""
    decoder = model.decoder
    out = effective_weight(decoder.layers[layer].fc2)[:, neurons].T
    out = out.to(torch.promote_types(out.dtype, torch.float32))
    for norm in _norms_behind(model, layer):
        out = out - out.mean(-1, keepdim=True)
        if norm.weight is not None:
            out = out * values_of(norm, "weight").to(out.device, out.dtype)
    return out


def _norms_behind(model: OPTForCausalLM, layer: int) -> list[nn.Module]:
    """Return the LayerNorms that the stream itself passes between an MLP and the unembedding."""
    decoder = model.decoder
    if model.config.do_layer_norm_before:
        return [] if decoder.final_layer_norm is None else [decoder.final_layer_norm]
    behind = [decoder.layers[layer].final_layer_norm]
    for block in list(decoder.layers)[layer + 1 :]:
        behind += [block.self_attn_layer_norm, block.final_layer_norm]
    return behind


def _effects(model: OPTForCausalLM, directions: Tensor) -> Tensor:
    """Return directions as changes of the logits, `[neuron, d_vocab]`, float32."""
    project_out, head = model.decoder.project_out, effective_weight(model.lm_head)
    directions = directions.to(head.device)
    if project_out is not None:
        directions = directions @ effective_weight(project_out).to(directions.dtype).T
    return (directions.to(head.dtype) @ head.T).float()
