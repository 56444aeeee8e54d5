"""Comparing the tensors of a checkpoint with the parameters of a model, before reading any.

Every difference is an error that names the tensors and says what usually lies behind it.
"""

from __future__ import annotations

from torch import nn

from optlens.checkpoints.errors import CheckpointError, listing
from optlens.checkpoints.layout import canonical
from optlens.checkpoints.read import Weights
from optlens.config import OPTConfig

EMBEDDING, HEAD = "decoder.embed_tokens.weight", "lm_head.weight"
TASK_HEADS = frozenset({"score.weight", "qa_outputs.weight", "qa_outputs.bias"})

Places = dict[str, list[tuple[nn.Module, str]]]

# Part of an unexpected tensor's name -> what it is a sign of.
_SIGNS = {
    "qkv_proj": "This is Meta's original metaseq format in a file of another; name it reshard.pt.",
    "flat_param": "These are flattened shards; merge them with metaseq's scripts/reshard_fsdp.py.",
    "qweight": "These weights are quantised; load the model that they were made from.",
    "lora_": "This is a model with a PEFT adapter; merge the adapter and save the result.",
    "base_layer": "This is a model with a PEFT adapter; merge the adapter and save the result.",
    "transformer.h.": "This is a GPT-2 style model; optlens reads OPT models only.",
    "model.layers.": "This is a LLaMA style model; optlens reads OPT models only.",
    "score.": (
        "This is a sequence classifier; load it with OPTForSequenceClassification, or with OPTModel "
        "for all but its head."
    ),
    "qa_outputs.": (
        "This is a question answerer; load it with OPTForQuestionAnswering, or with OPTModel for "
        "all but its head."
    ),
}


def places_of(model: nn.Module) -> Places:
    """Return canonical parameter name -> where it stands; a tied parameter has several places."""
    places: Places = {}
    name_of: dict[int, str] = {}
    for module_name, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = name_of.setdefault(id(parameter), canonical(f"{module_name}.{attribute}"))
            places.setdefault(name, []).append((module, attribute))
    return places


def match(places: Places, weights: Weights, config: OPTConfig) -> dict[str, str]:
    """Say which stored tensor fills which parameter.

    Args:
        places: The model's parameters.
        weights: The checkpoint's tensors.
        config: The checkpoint's config.

    Returns:
        Canonical parameter name -> canonical name of the stored tensor. They differ only for tied
        embeddings that were saved under the name of the unembedding. A task head that the
        checkpoint lacks altogether is not among them: it is yet to be trained.

    Raises:
        CheckpointError: If a tensor is missing, unexpected, misshapen or not floating point.
    """
    stored = {name: name for name in places}
    if config.tie_word_embeddings and EMBEDDING not in weights.specs and HEAD in weights.specs:
        stored[EMBEDDING] = HEAD
    own_head = TASK_HEADS & places.keys()
    if own_head.isdisjoint(weights.specs):
        stored = {name: at for name, at in stored.items() if name not in own_head}
    missing = [name for name, at in stored.items() if at not in weights.specs]
    # An unembedding is no part of a model without one; and tied, it repeats the embedding.
    ignored = set() if HEAD in places else {HEAD}
    if HEAD not in places and len(places[EMBEDDING]) == 1:
        ignored |= TASK_HEADS - own_head  # nor is the head of another task
    used = set(stored.values()) | ignored
    unexpected = [name for name in weights.specs if name not in used]
    if missing or unexpected:
        raise CheckpointError(_difference(missing, unexpected, weights))
    for name in stored:
        module, attribute = places[name][0]
        _check_tensor(weights, stored[name], tuple(getattr(module, attribute).shape))
        if len(places[name]) > 1 and HEAD in weights.specs:
            _check_tensor(weights, HEAD, tuple(getattr(module, attribute).shape))
    return stored


def _check_tensor(weights: Weights, name: str, expected: tuple[int, ...]) -> None:
    shape, dtype = weights.specs[name]
    if shape != expected and name in TASK_HEADS:
        raise CheckpointError(
            f"{weights.where(name)} is a head of {shape[0]} outputs, but {expected[0]} are asked "
            f"for (its shape is {list(shape)}, expected {list(expected)}). Leave out num_labels "
            "and id2label to load it as it is; for a new head, load an OPTModel, save that, and "
            "start from there."
        )
    if shape != expected:
        raise CheckpointError(
            f"{weights.where(name)} has shape {list(shape)}, but config.json asks for "
            f"{list(expected)}. Config and weights belong to different models, or the config was "
            "edited; use the config.json that came with these weights."
        )
    if dtype is None:
        raise CheckpointError(
            f"{weights.where(name)} does not hold floating point numbers that optlens reads "
            "(float32, float16, bfloat16, float64). If these weights are quantised, load the "
            "model that they were made from."
        )


def _difference(missing: list[str], unexpected: list[str], weights: Weights) -> str:
    """Describe a difference in names, with the likely reason."""
    said = []
    if missing:
        said.append(f"lacks {_tensors(missing)} that the model has ({listing(missing)})")
    if unexpected:
        found = listing([weights.stored_name(name) for name in unexpected])
        said.append(f"holds {_tensors(unexpected)} that the model has not ({found})")
    files = listing([path.name for path in weights.layout.files], limit=2)
    text = f"{weights.layout.folder} ({files}) {' and '.join(said)}."
    return f"{text} {_reason(missing, unexpected)}"


def _tensors(names: list[str]) -> str:
    return "1 tensor" if len(names) == 1 else f"{len(names)} tensors"


def _reason(missing: list[str], unexpected: list[str]) -> str:
    for sign, reason in _SIGNS.items():
        if any(sign in name for name in unexpected):
            return reason
    final_norm = {"decoder.final_layer_norm.weight", "decoder.final_layer_norm.bias"}
    if missing and set(missing) <= final_norm:
        return (
            "The first uploads of some OPTs lacked the final LayerNorm; take a newer revision. "
            "Only if the model was trained without it, set _remove_final_layer_norm to true in "
            "config.json."
        )
    if missing == [HEAD]:
        return (
            "config.json says that the unembedding is a matrix of its own (tie_word_embeddings is "
            "false); if it is the embedding, set tie_word_embeddings to true."
        )
    if all(name.endswith(".bias") for name in missing + unexpected):
        return "Check enable_bias in config.json; Galactica's first configs say false."
    return (
        "Config and weights belong to different models, or the file is incomplete; download or "
        "save both again."
    )
