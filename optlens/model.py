"""OPT, from token ids to logits.

Read it top to bottom: a LayerNorm that can be looked into, attention, a block, the stack of blocks,
and the two public models. Every `self.hook_*(x)` is an identity that gives `x` a name; what the
names mean, and their shapes, stands in `optlens/names.py`.

What is peculiar about OPT (Zhang et al. 2022, arXiv 2205.01068):

* positions are learned, counted over real tokens only, and looked up two rows further down;
* the query is scaled, bias included, before the product with the keys;
* the MLP uses ReLU; the unembedding is the transposed token embedding, without a bias;
* all sizes normalise before each sub-layer, except 350m, which normalises after it, has no final
  LayerNorm, and projects its 512-wide embeddings to the residual stream and back.

Parameter names are the checkpoints', so that loading is a match of names. Left out on purpose:
checking what is given (`inputs.py`), the loss (`loss.py`), running with hooks, loading and saving
(`base.py`), generation, other architectures.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optlens import checks
from optlens.activations import ACTIVATIONS
from optlens.attention_mask import AttentionMask
from optlens.base import OPTBase
from optlens.config import OPTConfig
from optlens.hooks import HookPoint
from optlens.inputs import Inputs
from optlens.kv_cache import KVCache, undone_on_failure
from optlens.linear import Linear
from optlens.loss import LossMethods
from optlens.names import OPTIONAL
from optlens.outputs import BaseOutput, CausalLMOutput, as_asked, keep_positions
from optlens.weights import effective_bias, effective_weight

# Row 0 of the position table is never used and row 1 belongs to padding (position -1).
POSITION_OFFSET = 2


def _add_hooks(module: nn.Module, layer: int, *names: str) -> None:
    """Give a module its hook points: "attn.hook_q" becomes `module.hook_q`."""
    for name in names:
        point = HookPoint(f"blocks.{layer}.{name}", optional=name in OPTIONAL)
        setattr(module, name.rpartition(".")[2], point)


class LayerNorm(nn.LayerNorm):
    """`(x - mean) / scale * gain + bias`; takes the fused kernel unless somebody looks inside."""

    def __init__(self, config: OPTConfig, name: str) -> None:
        """Make the norm called `name` ("blocks.0.ln1", "ln_final") in hook names."""
        super().__init__(config.d_model, elementwise_affine=config.layer_norm_elementwise_affine)
        self.hook_scale = HookPoint(f"{name}.hook_scale")
        self.hook_normalized = HookPoint(f"{name}.hook_normalized")

    def forward(self, x: Tensor, shown: bool = True) -> Tensor:
        """Normalise the last axis of `x`; half precision is computed in float32.

        Args:
            x: `[..., d_model]`.
            shown: Whether the hooks fire, if somebody listens.
        """
        if not shown or not (self.hook_scale.listening or self.hook_normalized.listening):
            return super().forward(x)
        wide = x if x.dtype == torch.float64 else x.float()
        shape = self.normalized_shape
        normalized, _, inverse = torch.native_layer_norm(wide, shape, None, None, self.eps)
        scale = inverse.reciprocal()  # [batch, pos, 1]
        if self.hook_scale.edited:
            # the kernel gives the scale no gradient: add zero, which has the gradient of the scale
            slope = (wide.var(-1, correction=0, keepdim=True) + self.eps).sqrt()
            scale = scale + (slope - slope.detach())
            normalized = normalized * (scale / self.hook_scale(scale))
        else:
            self.hook_scale(scale)
        normalized = self.hook_normalized(normalized)  # [batch, pos, d_model]
        if self.weight is None:
            return normalized.to(x.dtype)
        gain, bias = self.weight.to(wide.dtype), self.bias.to(wide.dtype)
        return torch.addcmul(bias, normalized, gain).to(x.dtype)


class OPTAttention(nn.Module):
    """Causal multi-head attention: each position reads from itself and the ones before it."""

    def __init__(self, config: OPTConfig, layer: int) -> None:
        """Make the attention of block `layer`."""
        super().__init__()
        self.layer, self.n_heads, self.d_head = layer, config.n_heads, config.d_head
        self.scale = config.d_head**-0.5
        self.dropout = config.attention_dropout
        d_model, bias = config.d_model, config.enable_bias
        self.k_proj = Linear(d_model, d_model, bias=bias)
        self.v_proj = Linear(d_model, d_model, bias=bias)
        self.q_proj = Linear(d_model, d_model, bias=bias)
        self.out_proj = Linear(d_model, d_model, bias=bias)
        _add_hooks(self, layer, "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z")
        _add_hooks(self, layer, "attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_result")

    def forward(
        self,
        x_q: Tensor,
        x_k: Tensor,
        x_v: Tensor,
        mask: AttentionMask,
        cache: KVCache | None,
        want_pattern: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what attention adds, `[batch, pos, d_model]`, and the pattern if it was made."""
        q = self.hook_q(self._project(self.q_proj, x_q))  # [batch, pos, head, d_head]
        k = self.hook_k(self._project(self.k_proj, x_k))
        v = self.hook_v(self._project(self.v_proj, x_v))
        self._check_finite(q, x_q, self.hook_q)
        self._check_finite(k, x_k, self.hook_k)
        q, k, v = (q * self.scale).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        pattern = None
        if want_pattern or self.hook_attn_scores.listening or self.hook_pattern.listening:
            z, pattern = self._attend_explicitly(q, k, v, mask)
        else:
            dropout = self.dropout if self.training else 0.0
            z = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=1.0, **mask.fused)
        z = self.hook_z(z.transpose(1, 2))  # [batch, pos, head, d_head]
        out = self.out_proj(z.flatten(2))
        if self.hook_result.listening:
            out = self._sum_of_heads(z, out)
        # a pattern that nobody asked for would live on, layer for layer, beside its recording
        return out, pattern if want_pattern else None

    def _check_finite(self, value: Tensor, x: Tensor, hook: HookPoint) -> None:
        """Check queries or keys: fused attention reads scores that are all NaN as "sees nothing".

        Weights spoil every position alike, so one tells; half precision (by its narrow range) and
        hook functions can spoil any.
        """
        anywhere = value.dtype.itemsize < 4 or hook.edited or x.ndim == 4
        checked = value if anywhere else value.narrow(1, value.shape[1] - 1, 1)
        checks.finite(checked, f"the queries or keys of block {self.layer}")

    def _project(self, linear: nn.Module, x: Tensor) -> Tensor:
        """Give each head its query, key or value, `[batch, pos, head, d_head]`."""
        if x.ndim == 3:  # one stream, read by all heads
            return linear(x).unflatten(-1, (self.n_heads, self.d_head))
        weight = effective_weight(linear).to(x.dtype)  # from 8 bits it comes in float32
        per_head = weight.unflatten(0, (self.n_heads, self.d_head))
        heads = torch.einsum("bphd,hed->bphe", x, per_head)
        bias = effective_bias(linear)
        return heads if bias is None else heads + bias.unflatten(0, (self.n_heads, self.d_head))

    def _attend_explicitly(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask
    ) -> tuple[Tensor, Tensor]:
        """Compute scores, pattern and z one by one, so that each can be recorded or edited."""
        scores = self.hook_attn_scores(mask.scores(q, k))  # [batch, head, query, key]
        sees_nothing = None
        if mask.may_hide_all_keys or self.hook_attn_scores.edited:
            # softmax over nothing is 0/0, also in the gradient: such a query attends to nothing
            sees_nothing = scores.amax(-1, keepdim=True) == -torch.inf
            scores = scores.masked_fill(sees_nothing, 0.0)
        wide = torch.promote_types(scores.dtype, torch.float32)
        pattern = F.softmax(scores, dim=-1, dtype=wide).to(scores.dtype)
        if sees_nothing is not None:
            pattern = pattern.masked_fill(sees_nothing, 0.0)
        pattern = self.hook_pattern(pattern)
        return F.dropout(pattern, self.dropout, self.training) @ v, pattern

    def _sum_of_heads(self, z: Tensor, out: Tensor) -> Tensor:
        """Show what each head adds; if that is edited, the sum over heads replaces `out`."""
        weight = effective_weight(self.out_proj).to(z.dtype)
        w_o = weight.unflatten(1, (self.n_heads, self.d_head))
        result = torch.einsum("bphe,dhe->bphd", z, w_o)
        result = self.hook_result(result)  # [batch, pos, head, d_model]
        if not self.hook_result.edited:
            return out
        bias = effective_bias(self.out_proj)
        total = result.sum(2)
        return total if bias is None else total + bias


class OPTDecoderLayer(nn.Module):
    """One block: attention, then an MLP, each adding to the residual stream."""

    def __init__(self, config: OPTConfig, layer: int) -> None:
        """Make block `layer`."""
        super().__init__()
        self.pre_ln, self.dropout = config.do_layer_norm_before, config.dropout
        self.self_attn = OPTAttention(config, layer)
        self.activation = ACTIVATIONS[config.activation_function]
        self.self_attn_layer_norm = LayerNorm(config, f"blocks.{layer}.ln1")
        self.fc1 = Linear(config.d_model, config.d_mlp, bias=config.enable_bias)
        self.fc2 = Linear(config.d_mlp, config.d_model, bias=config.enable_bias)
        self.final_layer_norm = LayerNorm(config, f"blocks.{layer}.ln2")
        _add_hooks(self, layer, "hook_resid_pre", "hook_resid_mid", "hook_resid_post")
        _add_hooks(self, layer, "hook_q_input", "hook_k_input", "hook_v_input", "hook_mlp_in")
        _add_hooks(self, layer, "mlp.hook_pre", "mlp.hook_post", "hook_attn_out", "hook_mlp_out")

    def forward(
        self, x: Tensor, mask: AttentionMask, cache: KVCache | None, want_pattern: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the residual stream after this block, and its pattern if it was made."""
        resid_pre = self.hook_resid_pre(x)  # [batch, pos, d_model]
        inputs = self._attention_inputs(resid_pre)
        attn_out, pattern = self.self_attn(*inputs, mask, cache, want_pattern)
        attn_out = self.hook_attn_out(F.dropout(attn_out, self.dropout, self.training))
        resid_mid = resid_pre + attn_out
        if not self.pre_ln:
            resid_mid = self.self_attn_layer_norm(resid_mid)
        resid_mid = self.hook_resid_mid(resid_mid)

        mlp_in = self.hook_mlp_in(resid_mid)
        if self.pre_ln:
            mlp_in = self.final_layer_norm(mlp_in)
        pre = self.hook_pre(self.fc1(mlp_in))  # [batch, pos, d_mlp]
        post = self.hook_post(self.activation(pre))
        mlp_out = self.hook_mlp_out(F.dropout(self.fc2(post), self.dropout, self.training))
        resid_post = resid_mid + mlp_out
        if not self.pre_ln:
            resid_post = self.final_layer_norm(resid_post)
        return self.hook_resid_post(resid_post), pattern

    def _attention_inputs(self, resid_pre: Tensor) -> list[Tensor]:
        """Return what queries, keys and values are made of: one stream, or one for each head."""
        norm = self.self_attn_layer_norm
        own: list[Tensor | None] = [None, None, None]
        for i, hook in enumerate((self.hook_q_input, self.hook_k_input, self.hook_v_input)):
            if hook.listening:
                per_head = resid_pre.unsqueeze(2).expand(-1, -1, self.self_attn.n_heads, -1)
                per_head = hook(per_head)  # [batch, pos, head, d_model]
                if hook.edited:  # ln1's own hooks stay with the shared stream
                    own[i] = norm(per_head, shown=False) if self.pre_ln else per_head
        shared = norm(resid_pre) if self.pre_ln else resid_pre  # [batch, pos, d_model]
        return [shared if x is None else x for x in own]


class OPTDecoder(nn.Module):
    """Embeddings, the stack of blocks, and the final LayerNorm and projection."""

    def __init__(self, config: OPTConfig) -> None:
        """Make all layers of an OPT but the unembedding."""
        super().__init__()
        d_model, embed_dim = config.d_model, config.word_embed_proj_dim
        self.layerdrop = config.layerdrop
        self.embed_tokens = nn.Embedding(config.vocab_size, embed_dim, config.pad_token_id)
        self.embed_positions = nn.Embedding(config.n_ctx + POSITION_OFFSET, d_model)
        project = config.has_projection
        self.project_in = Linear(embed_dim, d_model, bias=False) if project else None
        self.project_out = Linear(d_model, embed_dim, bias=False) if project else None
        self.layers = nn.ModuleList(
            OPTDecoderLayer(config, layer) for layer in range(config.n_layers)
        )
        self.final_layer_norm = (
            LayerNorm(config, "ln_final") if config.has_final_layer_norm else None
        )
        self.hook_embed = HookPoint("hook_embed")
        self.hook_pos_embed = HookPoint("hook_pos_embed")

    def embed(self, inputs: Inputs) -> Tensor:
        """Return the residual stream that the first block reads, `[batch, pos, d_model]`."""
        tokens = self.embed_tokens(inputs.tokens) if inputs.embeds is None else inputs.embeds
        if self.project_in is not None:
            tokens = self.project_in(tokens)
        positions = self.embed_positions(inputs.position_ids + POSITION_OFFSET).expand_as(tokens)
        return self.hook_embed(tokens) + self.hook_pos_embed(positions)

    def finish(self, resid: Tensor) -> Tensor:
        """Apply the final LayerNorm and `project_out`, where this model has them."""
        if self.final_layer_norm is not None:
            resid = self.final_layer_norm(resid)
        hidden = resid if self.project_out is None else self.project_out(resid)
        checks.finite(hidden, "the final LayerNorm or projection")
        return hidden

    def forward(
        self, inputs: Inputs, want_patterns: bool = False, want_stream: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
        """Run embeddings and blocks.

        Returns:
            The residual stream after the last block; the patterns, if wanted; what each block was
            given, if wanted.
        """
        now = self.hook_embed.now
        now.positions, now.seen = inputs.position_ids, inputs.mask.n_key - inputs.mask.n_query
        resid = self.embed(inputs) if inputs.residual is None else inputs.residual
        checks.finite(resid, "the embedding" if inputs.residual is None else "the given residual")
        patterns, stream = [], []
        for layer in inputs.blocks:
            if want_stream:
                stream.append(resid)
            if self.training and self.layerdrop > 0 and torch.rand(()) < self.layerdrop:
                continue
            resid, pattern = self.layers[layer](resid, inputs.mask, inputs.cache, want_patterns)
            checks.finite(resid, f"block {layer}")
            patterns.append(pattern)
        return (
            resid,
            tuple(patterns) if want_patterns else None,
            tuple(stream) if want_stream else None,
        )


class OPTModel(OPTBase):
    """An OPT without the unembedding; the counterpart of transformers' `OPTModel`.

    Example:
        >>> model = OPTModel(OPTConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4))
        >>> model.eval()(torch.tensor([[2, 100, 101]])).last_hidden_state.shape
        torch.Size([1, 3, 64])
    """

    def __init__(self, config: OPTConfig) -> None:
        """Make a model with random weights, drawn as transformers draws them."""
        super().__init__(config)
        self.decoder = OPTDecoder(config)
        self.finish_init()

    def forward(
        self,
        input_ids: Tensor | str | list[str] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        return_dict: bool | None = None,
    ) -> BaseOutput | Tensor | tuple:
        """Run the model; arguments and output as in transformers, and as `OPTForCausalLM` has them."""
        checks.stopped_run(
            stop_at_layer,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        with undone_on_failure(past_key_values):
            inputs = self.complete_inputs(
                input_ids,
                attention_mask,
                position_ids,
                past_key_values,
                inputs_embeds,
                use_cache,
                start_at_layer,
                stop_at_layer,
            )
            resid, patterns, stream = self.decoder(inputs, output_attentions, output_hidden_states)
            if stop_at_layer is not None:
                return resid
            hidden = self.decoder.finish(resid)
        stream = (*stream, hidden) if output_hidden_states else None
        return as_asked(BaseOutput(hidden, inputs.cache, stream, patterns), return_dict)


class OPTForCausalLM(OPTBase, LossMethods):
    """An OPT that predicts the next token; the counterpart of transformers' `OPTForCausalLM`.

    Example:
        >>> model = OPTForCausalLM(OPTConfig(num_hidden_layers=2, hidden_size=64,
        ...                                  num_attention_heads=4)).eval()
        >>> model(torch.tensor([[2, 100, 101]])).logits.shape
        torch.Size([1, 3, 50272])
    """

    takes_return_type = True

    def __init__(self, config: OPTConfig) -> None:
        """Make a model with random weights, drawn as transformers draws them."""
        super().__init__(config)
        self.model = OPTModel(config)
        self.model._config = self._config  # one config for both, and for nobody else
        self.lm_head = Linear(config.word_embed_proj_dim, config.vocab_size, bias=False)
        self.finish_init()

    @property
    def decoder(self) -> OPTDecoder:
        """Embeddings and blocks."""
        return self.model.decoder

    def tie_weights(self) -> None:
        """Make the unembedding the token embedding, if the config ties them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.decoder.embed_tokens.weight

    def unembed(self, resid: Tensor) -> Tensor:
        """Turn a residual stream `[..., d_model]` into logits `[..., d_vocab]`.

        That is the final LayerNorm (computed afresh on what is given), `project_out` and the
        unembedding, each where this model has it: the map the logit lens applies to every layer.
        """
        return self._logits(self.decoder.finish(resid))

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self.lm_head(hidden)
        # a weight that is not finite spoils its logit everywhere, so one position tells
        last = logits.narrow(1, logits.shape[1] - 1, 1) if logits.ndim == 3 else logits
        checks.finite(last, "the unembedding")
        return logits

    def forward(
        self,
        input_ids: Tensor | str | list[str] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_type: str | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutput | Tensor | tuple:
        """Run the model.

        Args:
            input_ids: Token ids `[batch, pos]` or `[pos]`; or text, or a list of texts; with
                `start_at_layer`, a residual stream `[batch, pos, d_model]`.
            attention_mask: Ones for real tokens and zeros for padding, `[batch, pos]`, cached
                tokens included. Without it every token counts as real, padding ids too.
            position_ids: `[batch, pos]`; counted over real tokens unless given.
            past_key_values: A `KVCache` of the tokens before these.
            inputs_embeds: `[batch, pos, word_embed_proj_dim]` instead of `input_ids`.
            labels: `[batch, pos]` token ids for the loss; -100 is ignored.
            use_cache: Whether to return `past_key_values`; the config's value unless given.
            logits_to_keep: Compute logits for the last so many positions (0: all), or for the
                positions that an index tensor names.
            output_attentions: Return the patterns.
            output_hidden_states: Return what each block reads, and the last hidden state.
            return_type: "logits", "loss" (mean next-token cross-entropy of the prompt, in nats) or
                "both" for plain tensors; None for an output object.
            start_at_layer: Take `input_ids` as the residual stream that this block reads.
            stop_at_layer: Return the residual stream that this block would read.
            return_dict: False gives the output's fields as a tuple.

        Raises:
            InputError: If the input does not fit the model, saying what would.
            NonFiniteError: If activations become NaN or infinite, naming the first block (CPU).
        """
        checks.stopped_run(
            stop_at_layer,
            labels=labels,
            logits_to_keep=logits_to_keep,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_type=return_type,
        )
        with undone_on_failure(past_key_values):
            inputs = self.complete_inputs(
                input_ids,
                attention_mask,
                position_ids,
                past_key_values,
                inputs_embeds,
                use_cache,
                start_at_layer,
                stop_at_layer,
            )
            self.check_loss_request(return_type, labels, inputs, logits_to_keep)
            resid, patterns, stream = self.decoder(inputs, output_attentions, output_hidden_states)
            if stop_at_layer is not None:
                return resid
            hidden = self.decoder.finish(resid)
            logits = self._logits(keep_positions(hidden, logits_to_keep))
            loss = self.requested_loss(return_type, labels, logits, inputs)
        stream = (*stream, hidden) if output_hidden_states else None
        output = CausalLMOutput(loss, logits, inputs.cache, stream, patterns)
        return as_asked(output, return_dict, return_type)
