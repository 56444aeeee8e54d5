"""Loading a model: from a folder or a Hub id to modules that hold their weights.

The model is built on the meta device, where tensors have shapes but no memory, and each parameter
is then put in place as its tensor is read, so that nothing is ever held twice. A tensor that
already has the wanted dtype stays mapped from its file and costs no copy; one that is converted
costs its own size. What the files lack, or have too much, is an error before anything is read.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from optlens.checkpoints.config_file import read_config
from optlens.checkpoints.device_map import (
    DeviceMap,
    check_device_map,
    dispatch,
    resolve,
    units_of,
)
from optlens.checkpoints.empty import empty_model
from optlens.checkpoints.errors import CheckpointError, listing
from optlens.checkpoints.hub import locate
from optlens.checkpoints.layout import METASEQ_TOKENIZER, find_layout
from optlens.checkpoints.matching import EMBEDDING, HEAD, Places, match, places_of
from optlens.checkpoints.placement import choose_dtype, parse_device, parse_dtype, weight_bytes
from optlens.checkpoints.quantize import Quantization, check_quantize
from optlens.checkpoints.read import Weights
from optlens.checkpoints.readers import read_tensors
from optlens.checkpoints.streaming import stream
from optlens.config import OPTConfig
from optlens.progress import progress_bar
from optlens.tokenizer import OPTTokenizer

Model = TypeVar("Model", bound=nn.Module)

# A folder with one of these means to have a tokenizer.
_TOKENIZERS = ("tokenizer.json", "vocab.json", "merges.txt")


def load_model(
    cls: type[Model],
    source: str | os.PathLike,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    progress: bool = True,
    device_map: DeviceMap = None,
    quantize: str | None = None,
    config_fields: Mapping[str, Any] | None = None,
) -> Model:
    """Load a checkpoint in Hugging Face format, or Meta's original files.

    On the CPU, weights that are stored in the wanted dtype stay mapped from their files: loading
    costs no copy, and several processes share them. Such a file may be replaced or deleted while
    the model lives (saving a model does that), but must not be overwritten in place.

    Args:
        cls: `OPTForCausalLM`, `OPTModel`, or a model with a task head. A head that the checkpoint
            lacks is drawn at random, and a warning says so.
        source: A local folder, or a Hub id such as "facebook/opt-125m", which is downloaded once,
            to the cache of `huggingface_hub`. A folder wins where both exist.
        device: Where the weights go; "auto" is the GPU if there is one, else the CPU.
        dtype: A floating dtype or its name; "auto" is the stored dtype on a GPU, and on the CPU
            float32, or the stored dtype (with a warning) where float32 does not fit. LayerNorms and
            softmaxes are computed in float32 at least. Products of float32 on a GPU are in full
            float32, unless you ask PyTorch for TF32, as
            `torch.set_float32_matmul_precision("high")` does: optlens leaves that as it is.
        revision: Branch, tag or commit on the Hub, such as "refs/pr/1".
        progress: Show progress bars for downloads, and for loading that takes long.
        device_map: None keeps all weights on `device`. "stream" leaves the blocks on the disk and
            reads each when a run reaches it, the next one while it computes: any size runs in the
            memory of two blocks and the embeddings, without gradients (safetensors only). "auto"
            and "balanced" divide the blocks among all GPUs and, where they are full, the CPU;
            a dict says where module names go, such as `{"": 0, "decoder.layers.11": "cpu"}`, also
            "disk". These need the package accelerate.
        quantize: "int8" or "nf4" keep the blocks' matrices in 8 or 4 bits, by the package
            bitsandbytes; embeddings, LayerNorms and biases stay in `dtype`.
        config_fields: Fields of the config to set to something else than what is stored.

    Returns:
        The model in eval mode; its `tokenizer` is None if the checkpoint has none.

    Raises:
        CheckpointError: If the checkpoint cannot be found, is incomplete or damaged, is not an
            OPT's, or does not fit into memory.
        ValueError: If `device` or `dtype` is not one.

    Example:
        >>> from optlens import OPTForCausalLM
        >>> model = load_model(OPTForCausalLM, "facebook/opt-125m")  # doctest: +SKIP
    """
    target_device, target_dtype = parse_device(device), parse_dtype(dtype)
    check_device_map(device_map, device)
    check_quantize(quantize, device_map)
    folder = locate(source, revision, progress)
    config = read_config(folder)
    for field, value in (config_fields or {}).items():
        setattr(config, field, value)
    read_tokenizer = cache(partial(_read_tokenizer, folder, config))
    with _no_garbage_collection():
        weights = Weights(find_layout(folder), compare_later=True)
        model, places, stored = build_and_match(cls, config, weights)
        new = {name: places.pop(name) for name in list(places) if name not in stored}
        if device_map not in (None, "stream"):
            devices, target_device, target_dtype = resolve(
                device_map, places, stored, weights, config, target_dtype, quantize
            )
            device_map = devices or "stream"
            check_quantize(quantize, device_map)
        quantization = None if quantize is None else Quantization(quantize, model)
        fill = partial(_fill, places, stored, weights, progress, quantization, read_tokenizer)
        if device_map == "stream":
            stream(model, places, stored, weights, target_device, target_dtype, str(source))
        elif device_map is not None:
            device_of = {p: device_map[unit] for unit, ps in units_of(places).items() for p in ps}
            fill(device_of, target_dtype)
        else:
            target_dtype = choose_dtype(
                target_dtype,
                target_device,
                stored=weights.specs[stored[EMBEDDING]].dtype,
                size=lambda dtype: weight_bytes(places, dtype, quantize),
                name=str(source),
                mapped=quantize is None and not weights.merges,
            )
            fill(dict.fromkeys(places, target_device), target_dtype)
            model.placement = quantization
        if new:
            _draw_head(new, model, source)
        if isinstance(device_map, Mapping):
            device_map |= {unit: device_map["decoder.embed_tokens"] for unit in units_of(new)}
            model.placement = dispatch(
                model, device_map, places, stored, weights, target_dtype, quantization
            )
        model.tokenizer = read_tokenizer()
        weights.finish_checks()
    return model.eval()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Switch Python's collector off for a while.

    A model is thousands of small objects, none of them garbage. Their number makes the collector
    search everything that PyTorch has imported, twice or more, for as long as loading 125m takes.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def build_and_match(
    cls: type[Model], config: OPTConfig, weights: Weights
) -> tuple[Model, Places, dict[str, str]]:
    """Make the model without memory, and match its parameters with the stored tensors.

    Args:
        cls: `OPTForCausalLM`, `OPTModel`, or a model with a task head.
        config: The checkpoint's config; corrected where its unembedding is not tied after all.
        weights: The checkpoint's tensors.

    Returns:
        The model, its parameters' places, and which stored tensor fills which parameter; a task
        head that the checkpoint lacks is filled by none.

    Raises:
        CheckpointError: If config and tensors do not fit together.
    """
    model = empty_model(cls, config)
    places = places_of(model)
    tied_here = len(places[EMBEDDING]) > 1
    if tied_here and _has_a_head_of_its_own(weights):
        weights.finish_checks()  # damage would look like this, too
        warnings.warn(
            f"{weights.where(HEAD)} differs from the embedding, although config.json says that "
            "they are tied; using it as it is, with tie_word_embeddings=False.",
            stacklevel=4,
        )
        config.tie_word_embeddings = False
        model = empty_model(cls, config)
        places = places_of(model)
    return model, places, match(places, weights, config)


def _has_a_head_of_its_own(weights: Weights) -> bool:
    """Say whether there is an unembedding beside the embedding, with other values."""
    embedding_spec, head_spec = weights.specs.get(EMBEDDING), weights.specs.get(HEAD)
    if embedding_spec is None or head_spec is None or embedding_spec.shape != head_spec.shape:
        return False  # absent; or misshapen, which matching reports
    if embedding_spec.dtype != head_spec.dtype:
        return True
    embedding, head = weights.tensor(EMBEDDING), weights.tensor(HEAD)
    same_memory = embedding.data_ptr() == head.data_ptr()
    # As bytes, since NaN would differ from itself.
    same = same_memory or torch.equal(_as_bytes(embedding), _as_bytes(head))
    del embedding, head
    weights.release()
    return not same


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _fill(
    places: Places,
    stored: dict[str, str],
    weights: Weights,
    progress: bool,
    quantization: Quantization | None,
    meanwhile: Callable[[], object],
    device_of: Mapping[str, torch.device | str],
    dtype: torch.dtype,
) -> None:
    """Read every tensor that does not stay on the "disk", and put it where it belongs.

    `meanwhile` is called here while others convert, or afterwards.
    """
    parameter_of = {name: p for p, name in stored.items() if device_of[p] != "disk"}
    wanted = {name: (device_of[p], dtype) for name, p in parameter_of.items()}
    # The delay keeps the bar away from loads that are over before anyone could read it.
    total = sum(map(weights.n_bytes, parameter_of))
    look = {"desc": "Loading weights", "unit": "B", "unit_scale": True, "delay": 1}
    with progress_bar(total, progress, **look) as bar:

        def put(name: str, tensor: Tensor) -> None:
            at = places[parameter_of[name]]
            _put(at, tensor)
            if quantization is not None:
                quantization.after(at[0][0])
            bar.update(weights.n_bytes(name))

        # Readers ahead of the quantisation would have unquantised matrices wait for it in memory.
        n_readers = None if quantization is None else 1
        read_tensors(weights, wanted, put, n_readers, meanwhile)


def _put(at: list[tuple[nn.Module, str]], tensor: Tensor) -> None:
    """Make `tensor` the parameter at all of its places, one object for all of them."""
    module, attribute = at[0]
    requires_grad = getattr(module, attribute).requires_grad
    parameter = nn.Parameter(tensor, requires_grad=requires_grad)
    for module, attribute in at:
        module._parameters[attribute] = parameter  # it is a parameter already, without values


def _draw_head(places: Places, model: nn.Module, source: str | os.PathLike) -> None:
    """Give a task head the random weights that a new model would have, and say so."""
    for name, at in places.items():
        module, attribute = at[0]
        drawn = torch.zeros(getattr(module, attribute).shape)  # on the CPU: one seed, one head
        if name.endswith("weight"):
            drawn.normal_(std=model.config.init_std)
        _put(at, drawn.to(device=model.device, dtype=model.dtype))
    warnings.warn(
        f"{source} has no head for an {type(model).__name__}, so a new one was drawn at random "
        f"({listing(list(places))}). Train the model before you read its answers.",
        stacklevel=4,
    )


def _read_tokenizer(folder: Path, config: OPTConfig) -> OPTTokenizer | None:
    """Return the folder's tokenizer, None when it has no files of one."""
    original = [folder / name for name in METASEQ_TOKENIZER]
    # A dangling link means to be one, too; the tokenizer says what is wrong with it.
    is_usual = any(os.path.lexists(folder / name) for name in _TOKENIZERS)
    if not is_usual and not all(path.exists() for path in original):
        return None
    try:
        if not is_usual:
            tokenizer = OPTTokenizer.from_files(*original)
            tokenizer.check_rows(config.vocab_size)
            return tokenizer
        return OPTTokenizer.from_folder(folder, n_rows=config.vocab_size)
    except (ValueError, FileNotFoundError) as error:
        raise CheckpointError(
            f"The tokenizer in {folder} cannot be read: {error} To load the "
            "model without a tokenizer, remove its tokenizer files."
        ) from error
