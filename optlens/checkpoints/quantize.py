"""Keeping the matrices of a model's blocks in 8 or 4 bits, by bitsandbytes.

"int8" is LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339): a scale for each row, inputs quantised
likewise as they come, except the few columns of large inputs, which are multiplied in float16.
"nf4" is the 4-bit NormalFloat of QLoRA (Dettmers et al. 2023, arXiv 2305.14314): a scale for each 64
weights; products are computed in the model's dtype. Embeddings, the unembedding, LayerNorms, biases
and 350m's projections stay as they are: they are small, or everything passes through them.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from optlens.checkpoints.errors import CheckpointError
from optlens.footprint import NF4_BLOCK, QUANTIZED

# Inputs beyond this size are outliers, which LLM.int8() keeps in float16.
_OUTLIER = 6.0


def check_quantize(quantize: str | None, device_map: object) -> None:
    """Check the option before anything is downloaded or read.

    Raises:
        ValueError: If it is not one, or does not go with the placement.
        CheckpointError: If bitsandbytes is not installed.
    """
    if quantize is None:
        return
    if quantize not in QUANTIZED:
        raise ValueError(
            f"quantize={quantize!r} is not one of {', '.join(map(repr, QUANTIZED))} or None. For 16 "
            'bits, give dtype="bfloat16" or dtype="float16".'
        )
    places = device_map.values() if isinstance(device_map, dict) else [device_map]
    if any(str(place) in ("stream", "disk") for place in places):
        raise ValueError(
            f"quantize={quantize!r} keeps the weights in memory, and device_map={device_map!r} on "
            "the disk, where they are in their stored dtype. Choose one of the two."
        )
    for name in ("autograd._functions", "backends.cpu.ops"):
        logging.getLogger(f"bitsandbytes.{name}").addFilter(_says_something_new)
    try:
        importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise CheckpointError(
            f"quantize={quantize!r} needs the package bitsandbytes (0.50 or newer), which cannot "
            f"be imported: {error}. Install it with `pip install 'optlens[quantize]'`, or give "
            'dtype="bfloat16", which halves float32 without it.'
        ) from error


def _says_something_new(record: logging.LogRecord) -> bool:
    """Leave out what comes at every int8 product outside float16, and of a 4-bit kernel not used."""
    return not any(known in record.msg for known in ("inputs will be cast", "gemm_4bit_forward"))


class Quantization:
    """Replaces the linear modules of a model's blocks, each as soon as its weights are there.

    Attributes:
        no_saving: Why the model cannot be saved.
    """

    no_saving = (
        "A quantised model is not saved: its codes are bitsandbytes' own, and rounding them back "
        "would pass for the full weights. Keep the checkpoint that it was loaded from, and load "
        "that with quantize= again."
    )

    def __init__(self, kind: str, model: nn.Module) -> None:
        """Find the modules to replace in a model that has no values yet.

        Args:
            kind: "int8" or "nf4".
            model: The model, on the meta device.
        """
        self.kind = kind
        self._owners: dict[nn.Module, tuple[nn.Module, str]] = {
            child: (parent, name)
            for parent in model.decoder.layers.modules()
            for name, child in parent.named_children()
            if isinstance(child, nn.Linear)
        }

    def __str__(self) -> str:
        """Say how the weights are kept, for `model.summary()`."""
        bits = {"int8": "8 bits (LLM.int8())", "nf4": "4 bits (NF4)"}[self.kind]
        return f"the blocks' matrices in {bits} by bitsandbytes"

    def after(self, module: nn.Module) -> None:
        """Replace a module if it is one of those and has got all its weights."""
        if module not in self._owners or any(p.is_meta for p in module.parameters()):
            return
        parent, name = self._owners.pop(module)
        setattr(parent, name, _MAKERS[self.kind](module))


def _to_int8(linear: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    made = bnb.nn.Linear8bitLt(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        has_fp16_weights=False,
        threshold=_OUTLIER,
        device="meta",
    )
    device, weight = linear.weight.device, linear.weight.detach().cpu()  # quantised on the way back
    made.weight = bnb.nn.Int8Params(weight, requires_grad=False).to(device)
    made.dtype_before = weight.dtype
    made.register_forward_pre_hook(_give_a_copy)
    return _finished(made, linear)


def _give_a_copy(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
    """Keep what gradients will be taken of from bitsandbytes' hands.

    On the CPU it writes zeros over a float16 input's outliers, and the outliers back afterwards.
    """
    shared = torch.is_grad_enabled() and args[0].dtype == torch.float16
    return (args[0].clone(),) if shared else None


def _to_nf4(linear: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    made = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=linear.weight.dtype,
        compress_statistics=False,
        quant_type="nf4",
        device="meta",
    )
    # On some processors a first run would rearrange the codes for a kernel that rounds to bfloat16
    # and gives no gradient.
    made.support_avx512bf16_for_cpu = False
    device, weight = linear.weight.device, linear.weight.detach().cpu()
    made.weight = bnb.nn.Params4bit(
        weight,
        requires_grad=False,
        blocksize=NF4_BLOCK,
        compress_statistics=False,
        quant_type="nf4",
        module=made,
    ).to(device)
    return _finished(made, linear)


def _finished(made: nn.Module, linear: nn.Linear) -> nn.Module:
    if linear.bias is not None:
        made.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    return made.train(linear.training)


_MAKERS: dict[str, Callable[[nn.Linear], nn.Module]] = {"int8": _to_int8, "nf4": _to_nf4}
