"""A model's weights under the names and shapes that interpretability papers use.

Checkpoints store `q_proj.weight [d_model, d_model]`; papers write `W_Q[layer, head]`. The properties
here rearrange, and read every matrix through `effective_weight`, so that a LoRA adapter's update is
part of what they show. Most are copies: changing one does not change the model. `W_E`, `W_pos` and
`W_U` are too large to copy at every look, so without an adapter or 350m's projections they are the
model's own memory, and an edit in place edits the model; clone before you write into one.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from optlens.quantized import dequantized_weight, is_quantized


def effective_weight(module: nn.Module) -> Tensor:
    """Return the matrix by which a linear module multiplies, `[out, in]`, or an embedding's table.

    For a plain layer that is its weight; for one wrapped by PEFT's LoRA it is the base weight plus
    the active adapters' updates; for a quantised one, the numbers that its codes stand for; and for
    one that is streamed from disk, a copy that is read there.

    Raises:
        TypeError: If the module is none of these.
    """
    if is_quantized(module):
        return dequantized_weight(module)
    if isinstance(module, nn.Linear | nn.Embedding) and not hasattr(module, "base_layer"):
        if module.weight.is_floating_point():
            return values_of(module, "weight")
    updates = [module.get_delta_weight(name) for name in _active_adapters(module)]
    return sum(updates, effective_weight(module.base_layer))


def effective_bias(module: nn.Module) -> Tensor | None:
    """Return the bias `[out]` that a linear module adds, or None; adapters as above."""
    if not hasattr(module, "base_layer"):
        return None if module.bias is None else values_of(module, "bias")
    bias = effective_bias(module.base_layer)
    for name in _active_adapters(module):
        if module.lora_bias[name]:
            bias = bias + module.lora_B[name].bias * module.scaling[name]
    return bias


def values_of(module: nn.Module, name: str) -> Tensor:
    """Return a parameter, or a copy of what a place holder stands for."""
    parameter = getattr(module, name)
    if hasattr(parameter, "read"):  # streamed from disk
        return parameter.read()
    if parameter.is_meta and hasattr(module, "_hf_hook"):  # offloaded by accelerate
        from accelerate.utils import align_module_device

        with align_module_device(module):
            return getattr(module, name).detach().clone()
    return parameter


def _active_adapters(module: nn.Module) -> list[str]:
    """Return the names of the LoRA adapters whose update a layer adds in its forward pass."""
    is_lora = hasattr(module, "base_layer") and hasattr(module, "lora_A")
    if is_lora and (module.merged or module.disable_adapters):
        return []
    names = {*module.lora_A, *module.lora_embedding_A} if is_lora else set()
    active = [name for name in module.active_adapters if name in names] if is_lora else []
    if not is_lora or any(name in module.lora_variant for name in active):
        raise TypeError(
            f"Cannot read the weight of a {type(module).__module__}.{type(module).__name__}; "
            "optlens knows nn.Linear, nn.Embedding, bitsandbytes' 8- and 4-bit layers, and plain LoRA "
            "layers of PEFT around them. For other adapters, call PEFT's merge_and_unload() first."
        )
    return active


class WeightProperties:
    """The weight properties of a model; a mixin that reads `self.decoder` and `self.lm_head`."""

    def _stack(self, path: str, pattern: str) -> Tensor:
        heads = {"head": self.config.n_heads} if "head " in pattern else {}
        modules = [layer.get_submodule(path) for layer in self.decoder.layers]
        matrices = [effective_weight(module).to(self.device) for module in modules]
        return torch.stack([rearrange(m, pattern, **heads) for m in matrices])

    def _stack_bias(self, path: str, pattern: str = "d -> d") -> Tensor:
        heads = {"head": self.config.n_heads} if "head " in pattern else {}
        biases = []
        for layer in self.decoder.layers:
            module = layer.get_submodule(path)
            bias = effective_bias(module)
            if bias is None:
                weight = effective_weight(module)
                bias = weight.new_zeros(weight.shape[0])
            biases.append(rearrange(bias.to(self.device), pattern, **heads))
        return torch.stack(biases)

    @property
    def W_E(self) -> Tensor:
        """Token embedding, `[d_vocab, d_model]`; 350m's `project_in` is folded in.

        Without that projection this is the model's own table, not a copy.
        """
        table = effective_weight(self.decoder.embed_tokens)
        if self.decoder.project_in is None:
            return table
        return table @ effective_weight(self.decoder.project_in).T.to(table.device)

    @property
    def W_pos(self) -> Tensor:
        """Position embedding, `[n_ctx, d_model]`; the table's two rows for padding are dropped.

        This is a view into the model's own table, not a copy.
        """
        return effective_weight(self.decoder.embed_positions)[2:]

    @property
    def W_U(self) -> Tensor:
        """Unembedding, `[d_model, d_vocab]`; 350m's `project_out` is folded in.

        Without that projection this is a view of the model's own matrix, not a copy.
        """
        head = effective_weight(self.lm_head).T
        if self.decoder.project_out is None:
            return head
        return effective_weight(self.decoder.project_out).T.to(head.device) @ head

    @property
    def b_U(self) -> Tensor:
        """Unembedding bias, `[d_vocab]`: zeros, as no OPT has one."""
        return self.decoder.embed_tokens.weight.new_zeros(self.config.d_vocab)

    @property
    def W_Q(self) -> Tensor:
        """Query weights, `[layer, head, d_model, d_head]`."""
        return self._stack("self_attn.q_proj", "(head d_head) d_model -> head d_model d_head")

    @property
    def W_K(self) -> Tensor:
        """Key weights, `[layer, head, d_model, d_head]`."""
        return self._stack("self_attn.k_proj", "(head d_head) d_model -> head d_model d_head")

    @property
    def W_V(self) -> Tensor:
        """Value weights, `[layer, head, d_model, d_head]`."""
        return self._stack("self_attn.v_proj", "(head d_head) d_model -> head d_model d_head")

    @property
    def W_O(self) -> Tensor:
        """Attention output weights, `[layer, head, d_head, d_model]`."""
        return self._stack("self_attn.out_proj", "d_model (head d_head) -> head d_head d_model")

    @property
    def W_in(self) -> Tensor:
        """MLP input weights, `[layer, d_model, d_mlp]`."""
        return self._stack("fc1", "d_mlp d_model -> d_model d_mlp")

    @property
    def W_out(self) -> Tensor:
        """MLP output weights, `[layer, d_mlp, d_model]`."""
        return self._stack("fc2", "d_model d_mlp -> d_mlp d_model")

    @property
    def b_Q(self) -> Tensor:
        """Query biases, `[layer, head, d_head]`."""
        return self._stack_bias("self_attn.q_proj", "(head d_head) -> head d_head")

    @property
    def b_K(self) -> Tensor:
        """Key biases, `[layer, head, d_head]`."""
        return self._stack_bias("self_attn.k_proj", "(head d_head) -> head d_head")

    @property
    def b_V(self) -> Tensor:
        """Value biases, `[layer, head, d_head]`."""
        return self._stack_bias("self_attn.v_proj", "(head d_head) -> head d_head")

    @property
    def b_O(self) -> Tensor:
        """Attention output biases, `[layer, d_model]`."""
        return self._stack_bias("self_attn.out_proj")

    @property
    def b_in(self) -> Tensor:
        """MLP input biases, `[layer, d_mlp]`."""
        return self._stack_bias("fc1")

    @property
    def b_out(self) -> Tensor:
        """MLP output biases, `[layer, d_model]`."""
        return self._stack_bias("fc2")
