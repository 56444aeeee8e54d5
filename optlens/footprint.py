"""How many bytes an OPT's weights, KV cache and activations take, from its config alone.

Pure arithmetic, so that it answers for 175b at once. The formulas follow `optlens/model.py` line by
line: they count what its functions hold at the moment when they hold most. Tests compare them with
the tensors that are really alive; a change of the model that holds more shows there.
"""

from __future__ import annotations

from math import ceil

from optlens.config import OPTConfig

# Numbers that share one scale in 4-bit weights.
NF4_BLOCK = 64
NF4_CODES = 16
QUANTIZED = ("int8", "nf4")
# The logit lens works on so many bytes of one float32 table [positions, d_vocab] at a time.
LENS_TABLES = 4
# On the CPU, glibc keeps what is freed of smaller tensors (DEFAULT_MMAP_THRESHOLD_MAX) for reuse.
KEPT_BELOW = 32 * 2**20
_POSITION_BYTES = 8


def module_bytes(config: OPTConfig, itemsize: int, quantize: str | None = None) -> dict[str, int]:
    """Return the bytes of each part of the model that stands on one device.

    Args:
        config: The model's config.
        itemsize: Bytes of a number.
        quantize: "int8" or "nf4" for the matrices of the blocks, None for none.

    Returns:
        Module name, as in the checkpoint, -> bytes, in the order in which a forward pass meets
        them; a tied `lm_head` takes none.

    Example:
        >>> sum(module_bytes(OPTConfig.from_name("opt-175b"), 2).values())
        349208936448
    """
    d_model, embed = config.d_model, config.word_embed_proj_dim
    embedding = config.d_vocab * embed * itemsize
    parts = {
        "model.decoder.embed_tokens": embedding,
        "model.decoder.embed_positions": (config.n_ctx + 2) * d_model * itemsize,
    }
    if config.has_projection:
        parts["model.decoder.project_in"] = embed * d_model * itemsize
    block = _block_bytes(config, itemsize, quantize)
    parts |= {f"model.decoder.layers.{layer}": block for layer in range(config.n_layers)}
    if config.has_final_layer_norm:
        parts["model.decoder.final_layer_norm"] = _norm_bytes(config, itemsize)
    if config.has_projection:
        parts["model.decoder.project_out"] = embed * d_model * itemsize
    parts["lm_head"] = 0 if config.tie_word_embeddings else embedding
    return parts


def _norm_bytes(config: OPTConfig, itemsize: int) -> int:
    return 2 * config.d_model * itemsize * config.layer_norm_elementwise_affine


def _block_bytes(config: OPTConfig, itemsize: int, quantize: str | None) -> int:
    d_model, d_mlp = config.d_model, config.d_mlp
    matrices = [(d_model, d_model)] * 4 + [(d_mlp, d_model), (d_model, d_mlp)]
    biases = (5 * d_model + d_mlp) * itemsize * config.enable_bias
    weights = sum(matrix_bytes(*shape, itemsize, quantize) for shape in matrices)
    return weights + biases + 2 * _norm_bytes(config, itemsize)


def matrix_bytes(rows: int, columns: int, itemsize: int, quantize: str | None) -> int:
    """Return the bytes of a matrix as it is, or as bitsandbytes keeps it in 8 or 4 bits.

    In 8 bits it has a float32 scale for each row; in 4 bits one for each block of 64 numbers, and
    the table of the 16 numbers that codes stand for.
    """
    if quantize == "int8":
        return rows * columns + 4 * rows
    if quantize == "nf4":
        return ceil(rows * columns / 2) + 4 * ceil(rows * columns / NF4_BLOCK) + 4 * NF4_CODES
    return rows * columns * itemsize


def cache_bytes(config: OPTConfig, batch: int, pos: int, itemsize: int) -> int:
    """Return the bytes of the keys and values of all layers."""
    return 2 * config.n_layers * batch * pos * config.d_model * itemsize


def forward_bytes(config: OPTConfig, batch: int, pos: int, itemsize: int) -> int:
    """Return the most bytes that one forward pass holds beside weights and KV cache.

    That is either inside a block, where the MLP's inputs and outputs meet all that the block has
    made, or at the end, where the logits of all positions come.

    Args:
        config: The model's config.
        batch: Prompts.
        pos: Tokens of each.
        itemsize: Bytes of a number.
    """
    tokens = batch * pos * itemsize
    return max(_in_mlp(config, tokens), _at_logits(config, tokens)) + pos * _POSITION_BYTES


def _at_logits(config: OPTConfig, tokens: int) -> int:
    """Count what a forward pass holds at its end; `tokens` is their number times a number's bytes."""
    return tokens * (config.d_model + config.word_embed_proj_dim + config.d_vocab)


def block_bytes(config: OPTConfig, batch: int, pos: int, itemsize: int) -> int:
    """Return the most bytes that a forward pass holds inside a block; arguments as there."""
    return _in_mlp(config, batch * pos * itemsize)


def forward_heap_bytes(config: OPTConfig, batch: int, pos: int, itemsize: int) -> int:
    """Return what a process on the CPU holds more when logits come: memory that blocks have freed.

    The C library gives large tensors back to the system, and keeps what was freed of smaller ones
    for others to use. Logits are too large to lie there, so the memory of a block's tensors is
    still in the process, empty, when they are at their most.

    Args:
        config: The model's config.
        batch: Prompts.
        pos: Tokens of each.
        itemsize: Bytes of a number.
    """
    tokens = batch * pos * itemsize
    if tokens * config.d_vocab < KEPT_BELOW:
        return 0
    last = _at_logits(config, tokens)
    kept = sum(
        count * tokens * width for count, width in _in_block(config) if tokens * width < KEPT_BELOW
    )
    return max(0, last + kept - max(_in_mlp(config, tokens), last))


def lens_heap_bytes(
    config: OPTConfig, batch: int, pos: int, itemsize: int, chunk_bytes: int
) -> int:
    """Return what a process on the CPU holds more while it computes a stored logit lens.

    Of half precision, logits come in that before they are widened; the memory stays, see
    `forward_heap_bytes`.

    Args:
        config: The model's config.
        batch: Prompts.
        pos: Tokens of each.
        itemsize: Bytes of a number.
        chunk_bytes: As for `lens_bytes`.
    """
    narrow = _lens_positions(config, batch, pos, chunk_bytes) * config.d_vocab * itemsize
    # widened they must be large, or they would take that memory themselves
    return narrow if itemsize < 4 and narrow < KEPT_BELOW <= narrow // itemsize * 4 else 0


def recording_run_bytes(
    config: OPTConfig,
    batch: int,
    pos: int,
    itemsize: int,
    patterns: bool,
    heads: int = 0,
    results: bool = False,
) -> int:
    """Return the most bytes that the run of a recording holds beside weights and what it keeps.

    Args:
        config: The model's config.
        batch: Prompts.
        pos: Tokens of each.
        itemsize: Bytes of a number.
        patterns: Whether attention scores or patterns are recorded, which are then computed.
        heads: How many heads of them are chosen, where not all are.
        results: Whether `hook_result` is recorded.
    """
    tokens = batch * pos * itemsize
    stream = tokens * config.d_model
    norm = stream if config.do_layer_norm_before else 0
    made = [_in_mlp(config, tokens)]
    mask = 0
    if patterns:
        square = batch * config.n_heads * pos * pos * itemsize
        mask = pos * pos * (itemsize + 1)
        # The softmax of half precision is computed on a float32 copy.
        wide = 4 * batch * config.n_heads * pos * pos if itemsize < 4 else 0
        made += [norm + 6 * stream + square, norm + 5 * stream + 2 * square]
        made += [norm + 4 * stream + square + 2 * wide]
        made += [norm + 4 * stream + 2 * square + square * heads // config.n_heads]
    if results:
        made += [norm + (6 + config.n_heads) * stream]
    return max(made) + mask + pos * _POSITION_BYTES


def lens_bytes(
    config: OPTConfig, batch: int, pos: int, itemsize: int, rows: int, chunk_bytes: int
) -> int:
    """Return the most bytes that computing a stored logit lens holds beside what it keeps.

    Args:
        config: The model's config.
        batch: Prompts.
        pos: Tokens of each.
        itemsize: Bytes of a number.
        rows: Residual streams that it reads.
        chunk_bytes: Bytes of one float32 table of logits that it works on at a time.
    """
    positions = _lens_positions(config, batch, pos, chunk_bytes)
    tables = LENS_TABLES * positions * config.d_vocab * max(4, itemsize)
    gathered = rows * batch * pos * config.d_model * itemsize if batch > 1 else 0
    return tables + gathered


def kept_lens_bytes(batch: int, pos: int, rows: int, top_k: int) -> int:
    """Return the bytes of a stored logit lens: tokens and probabilities, entropy and KL."""
    return rows * batch * pos * (top_k * (8 + 4) + 4 + 4)


def _lens_positions(config: OPTConfig, batch: int, pos: int, chunk_bytes: int) -> int:
    return min(batch * pos, max(1, chunk_bytes // (4 * config.d_vocab)))


def _in_block(config: OPTConfig) -> list[tuple[int, int]]:
    """Count the tensors alive at the end of an MLP: how many, and their columns."""
    streams = 7 if config.do_layer_norm_before else 6
    return [(streams, config.d_model), (2, config.d_mlp)]


def _in_mlp(config: OPTConfig, tokens: int) -> int:
    """Count the bytes alive at the end of an MLP: `tokens` is bytes a column."""
    return tokens * sum(count * width for count, width in _in_block(config))
