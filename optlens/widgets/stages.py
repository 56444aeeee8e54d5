"""The stages of a forward pass as the architecture view draws them: which tensor, by which formula.

Names, shapes and meanings come from `optlens.names`, the lines of code from the source, sizes and
numbers from a run. What stands here is each stage's name in the drawing, its formula in words for
the variant at hand, and the weights that it uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from optlens.names import BLOCK, BLOCK_PREFIX, EMBEDDING, FINAL_NORM

if TYPE_CHECKING:
    from optlens.config import OPTConfig
    from optlens.model import OPTForCausalLM

# A block's own copies of its inputs: what `hook_resid_pre` and `hook_resid_mid` show already.
COPIES = {"hook_q_input", "hook_k_input", "hook_v_input", "hook_mlp_in"}


@dataclass(frozen=True)
class Stage:
    """Describe one tensor of the forward pass; in blocks, of every block.

    Attributes:
        key: its name here: a hook's name without the block, or a module's.
        label: its name in the drawing.
        axes: names of its axes without the batch.
        meaning: what it holds.
        formula: how it is computed, in words.
        weights: paths of the modules whose weights it uses, `{layer}` standing for the block.
        hook: whether a hook sees it; else it is the output of the module `key`.
        in_block: whether every block has one.
    """

    key: str
    label: str
    axes: list[str]
    meaning: str
    formula: str
    weights: tuple[str, ...] = ()
    hook: bool = True
    in_block: bool = False

    def name(self, layer: int | None) -> str:
        """Return the full hook name in a block, or the module's name."""
        return (BLOCK_PREFIX.format(layer=layer) if self.in_block else "") + self.key


def stages_of(config: OPTConfig) -> list[Stage]:
    """Return the stages of a variant of OPT, those of a block once.

    Example:
        >>> from optlens import OPTConfig
        >>> [stage.label for stage in stages_of(OPTConfig())][:3]
        ['token embedding', 'position embedding', 'resid_pre']
    """
    formulas, weights = _formulas(config), _weights(config)
    found = []
    if config.has_projection:
        axes, meaning = ["pos", "d_embed"], "token embedding, before project_in"
        formula = "row of W_E for each token"
        found.append(
            Stage("embed_tokens", "token embedding", axes, meaning, formula, hook=False,
                  weights=("decoder.embed_tokens",))
        )  # fmt: skip
    specs = [*EMBEDDING, *BLOCK, *(FINAL_NORM if config.has_final_layer_norm else ())]
    for spec in specs:
        if spec.name in COPIES:
            continue
        found.append(
            Stage(
                spec.name,
                _label(spec.name, config),
                spec.shape.split()[1:],
                spec.meaning,
                formulas[spec.name],
                weights.get(spec.name, ()),
                in_block=spec in BLOCK,
            )
        )
    if config.has_projection:
        axes, meaning = ["pos", "d_embed"], "what the unembedding reads"
        formula = f"{_end(config)} W_project_out"
        found.append(
            Stage("project_out", "project_out", axes, meaning, formula, hook=False,
                  weights=("decoder.project_out",))
        )  # fmt: skip
    tied = ", the token embedding transposed" if config.tie_word_embeddings else ""
    read = "project_out" if config.has_projection else _end(config)
    found.append(
        Stage("lm_head", "logits", ["pos", "d_vocab"], "a score for every token that may come next",
              f"{read} W_U{tied}", hook=False, weights=("lm_head",))
    )  # fmt: skip
    return found


def module_of(model: OPTForCausalLM, path: str, layer: int | None) -> nn.Module:
    """Return a module by its path from the model, "decoder.layers.{layer}.fc1"."""
    found: Any = model
    for name in path.format(layer=layer).split("."):
        found = found[int(name)] if name.isdecimal() else getattr(found, name)
    return found


def weights_of(
    model: OPTForCausalLM, stage: Stage, layer: int | None
) -> list[tuple[str, list[int]]]:
    """Return name and shape of each weight that a stage uses, matrices as they multiply.

    Returns:
        "q_proj.weight" and `[out, in]`, say; of quantised weights the shape of the matrix.
    """
    found = []
    for path in stage.weights:
        module, name = module_of(model, path, layer), path.rpartition(".")[2]
        for kind in ("weight", "bias"):
            value = getattr(module, kind, None)
            if value is None:
                continue
            matrix = kind == "weight" and hasattr(module, "out_features")
            shape = [module.out_features, module.in_features] if matrix else list(value.shape)
            found.append((f"{name}.{kind}", shape))
    return found


def _end(config: OPTConfig) -> str:
    gained = " × gain + bias" if config.layer_norm_elementwise_affine else ""
    return f"(normalized{gained})" if config.has_final_layer_norm else "last resid_post"


def _label(name: str, config: OPTConfig) -> str:
    if name == "hook_embed":
        return "project_in" if config.has_projection else "token embedding"
    if name == "hook_pos_embed":
        return "position embedding"
    if name.startswith("ln"):
        norm, _, kind = name.partition(".hook_")
        norm = norm.replace("ln_final", "final LN")
        return f"{norm} scale" if kind == "scale" else norm
    return name.rpartition("hook_")[2].replace("attn_scores", "scores")


def _formulas(config: OPTConfig) -> dict[str, str]:
    """Return for each hook how its tensor is computed, in this variant."""
    pre = config.do_layer_norm_before
    bias = (lambda name: f" + {name}") if config.enable_bias else (lambda name: "")
    norms = ("ln1(resid_pre)", "ln2(resid_mid)") if pre else ("resid_pre", "resid_mid")
    summed = ("resid_pre + attn_out", "resid_mid + mlp_out")
    normed = ("resid_pre", "resid_mid") if pre else summed
    gained = "; × gain + bias comes after" if config.layer_norm_elementwise_affine else ""
    scale = "√(variance of {} over d_model + ε)"
    centred = "({0} − its mean) ÷ scale"
    found = {
        "hook_embed": "row of W_E for each token" + " × W_project_in" * config.has_projection,
        "hook_pos_embed": "row of W_pos for each position, counted over real tokens",
        "hook_resid_pre": "token + position embedding; from block 1 on, what the block before left",
        "attn.hook_attn_scores": "q · k ÷ √d_head for every query and key; −∞ where a key is in the future",
        "attn.hook_pattern": "softmax of the scores over keys: each row adds up to 1",
        "attn.hook_z": "sum over keys of pattern × v",
        "attn.hook_result": "z W_O, each head by itself",
        "hook_attn_out": f"sum over heads of z W_O{bias('b_O')}",
        "hook_resid_mid": summed[0] if pre else f"ln1({summed[0]})",
        "mlp.hook_pre": f"{norms[1]} W_in{bias('b_in')}",
        "mlp.hook_post": f"{config.act_fn}(pre), number by number",
        "hook_mlp_out": f"post W_out{bias('b_out')}",
        "hook_resid_post": summed[1] if pre else f"ln2({summed[1]})",
    }
    for letter in "qkv":
        found[f"attn.hook_{letter}"] = (
            f"{norms[0]} W_{letter.upper()}{bias(f'b_{letter.upper()}')}, for each head"
        )
    of = {"blocks.ln1": normed[0], "blocks.ln2": normed[1], "ln_final": "the last resid_post"}
    for name, given in of.items():
        given = f"({given})" if "+" in given else given
        key = name.removeprefix("blocks.")
        found[f"{key}.hook_scale"] = scale.format(given)
        found[f"{key}.hook_normalized"] = centred.format(given) + gained
    return found


def _weights(config: OPTConfig) -> dict[str, tuple[str, ...]]:
    """Return for each hook the modules whose weights its tensor is computed with."""
    block, attention = "decoder.layers.{layer}.", "decoder.layers.{layer}.self_attn."
    projected = config.has_projection
    return {
        "hook_embed": (f"decoder.{'project_in' if projected else 'embed_tokens'}",),
        "hook_pos_embed": ("decoder.embed_positions",),
        "attn.hook_q": (f"{attention}q_proj",),
        "attn.hook_k": (f"{attention}k_proj",),
        "attn.hook_v": (f"{attention}v_proj",),
        "hook_attn_out": (f"{attention}out_proj",),
        "ln1.hook_normalized": (f"{block}self_attn_layer_norm",),
        "ln2.hook_normalized": (f"{block}final_layer_norm",),
        "mlp.hook_pre": (f"{block}fc1",),
        "hook_mlp_out": (f"{block}fc2",),
        "ln_final.hook_normalized": ("decoder.final_layer_norm",),
    }
