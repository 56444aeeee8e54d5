"""Recording: run a model on a prompt and keep the chosen part of what happens.

Every kept value is copied at once into a tensor laid out for the user (`[layer, head, query, key]`
and so on), so a recording holds no more than was asked for, and its size is known beforehand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optlens import allocator, checks
from optlens.attention_mask import real_tokens
from optlens.hooks import HookPoint
from optlens.interventions import Intervention, intervene, provenance
from optlens.memory import available_bytes, describe_bytes
from optlens.names import get_act_name, is_full_name, shape_of, spec_of
from optlens.recording import FINAL, WHAT, Recording, fingerprint
from optlens.selection import Selection, resolve_what, select, select_positions

if TYPE_CHECKING:
    from optlens.base import Prompt
    from optlens.config import OPTConfig
    from optlens.model import OPTForCausalLM

STORAGE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class _Slot:
    """Where one hook's value goes: `target[:, row]`, after selecting heads and positions."""

    target: Tensor
    row: int
    axes: list[str]  # of the hook's value
    filled: bool = False


def record(
    model: OPTForCausalLM,
    prompt: Prompt,
    what: str | Iterable[str] = WHAT,
    layers: Selection = None,
    heads: Selection = None,
    pos: Selection = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    prepend_bos: bool = True,
    attention_mask: Tensor | None = None,
    interventions: Intervention | Iterable[Intervention] = (),
    spans: Mapping[str, Any] | None = None,
) -> Recording:
    """Run a model on a prompt and keep what happened.

    Runs without gradients and without dropout, also if the model is in training mode, where it is
    left again. Interventions, given here or attached to the model (`model.intervene`,
    `model.hooks`), act, and what is kept is the value after them; the recording's metadata
    describes them.

    Args:
        model: The model.
        prompt: Text; a list of texts; token ids, `[pos]` or `[batch, pos]`. A list or a 2-D tensor
            gives a batch axis; a list of unequal lengths is padded on the left.
        what: Any of "attention", "residual" and "logit_lens", and hook names, in full
            ("blocks.3.attn.hook_z", or "z3") or short for all chosen layers ("z", "resid_mid").
        layers: Which blocks: a number, several, or a slice; negative from the end; None for all.
        heads: Which heads of each block, likewise.
        pos: Which positions (queries, for attention; keys are kept whole), likewise; -1 is the
            last real token. In a padded batch, numbers and slices count each prompt's real tokens,
            and must mean the same ones in all; None keeps every column, padding included.
        dtype: Store in this floating-point dtype; the model's unless given.
        device: Store here.
        prepend_bos: Whether text gets `</s>` in front.
        attention_mask: For padded token ids.
        interventions: What to change in this run: one or several of `optlens.interventions`.
        spans: Names for positions in `interventions`, as `model.intervene` takes them.

    Returns:
        The recording, on `device`.

    Raises:
        InputError: If the prompt or a selection does not fit the model, a value does not fit
            `dtype`, or an intervention on `ln_final` would be missing from the logits and the lens.
        UnknownHookError: If `what` names no hook; the nearest are suggested.
        MemoryError: If it would not fit, before running; says how much and which option helps.
        NonFiniteError: If activations become NaN or infinite, naming the first block.

    Example:
        >>> rec = record(model, "A photo of a cat", layers=[0, -1])  # doctest: +SKIP
    """
    tokens, mask = model.prepare_inputs(prompt, attention_mask, prepend_bos=prepend_bos)
    is_batch = not isinstance(prompt, str) and not (isinstance(prompt, Tensor) and prompt.ndim == 1)
    config = model.config
    wanted = resolve_what(what, config)
    dtype = _storage_dtype(dtype, model)
    chosen_layers = select(layers, config.n_layers, "layers")
    chosen_heads = select(heads, config.n_heads, "heads")
    real = real_tokens(tokens, mask)
    positions, columns = select_positions(pos, real.cpu())
    plan = _plan(wanted, config, chosen_layers, chosen_heads, tokens.shape, columns)
    if FINAL in plan:
        _check_final_norm(model)
    _check_fits(plan, dtype, device)
    if torch.device(device).type == "cpu":
        allocator.reserve(_plan_bytes(plan, dtype))

    tensors = {
        name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, _) in plan.items()
    }
    slots: dict[str, list[_Slot]] = {}
    for name, (_, rows) in plan.items():
        for row, hook in enumerate(rows):
            slot = _Slot(tensors[name], row, spec_of(hook).shape.split())
            slots.setdefault(hook, []).append(slot)
    with model.in_eval_mode(), intervene(model, interventions, spans):
        _run(model, tokens, mask, slots, chosen_heads, columns)
        facts = _metadata(model, tokens, real, wanted)

    for name in tensors:
        if name == FINAL or is_full_name(name):
            tensors[name] = tensors[name][:, 0]  # one hook is one row
    tensors |= {"tokens": tokens.to(device), "mask": real.to(device)}
    if columns is None:
        columns = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
    facts |= {"layers": chosen_layers, "heads": chosen_heads, "positions": positions}
    facts |= {"columns": columns.tolist(), "is_batch": is_batch, "dtype": str(dtype)}
    recording = Recording(tensors, facts, model)
    if "logit_lens" in wanted:
        from optlens.lens import store_lens

        store_lens(recording)
    return recording


def estimate_bytes(
    config: OPTConfig,
    pos: int,
    batch: int = 1,
    what: str | Iterable[str] = WHAT,
    layers: Selection = None,
    heads: Selection = None,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Return how many bytes `record` would keep for a prompt of `pos` tokens.

    Example:
        >>> from optlens import OPTConfig
        >>> estimate_bytes(OPTConfig(), pos=512, what="attention")  # 12 * 12 * 512 * 512 * 4
        150994944
    """
    wanted = resolve_what(what, config)
    chosen_layers = select(layers, config.n_layers, "layers")
    chosen_heads = select(heads, config.n_heads, "heads")
    plan = _plan(wanted, config, chosen_layers, chosen_heads, (batch, pos), None)
    return _plan_bytes(plan, dtype)


# ------------------------------------------------------------------------------ what to keep

Plan = dict[str, tuple[tuple[int, ...], list[str]]]


def _plan(
    wanted: list[str],
    config: OPTConfig,
    layers: list[int],
    heads: list[int],
    shape: tuple[int, ...],
    columns: Tensor | None,
) -> Plan:
    """Lay out the tensors to fill: name to shape and to the hooks that fill its rows.

    A name of the result is "attention", "residual", `FINAL`, a short or a full hook name.
    """
    batch, pos = shape
    rows: dict[str, list[str]] = {}
    if "attention" in wanted:
        rows["attention"] = [get_act_name("pattern", layer) for layer in layers]
    last = get_act_name("resid_post", config.n_layers - 1)
    if "residual" in wanted or "logit_lens" in wanted:
        after = [get_act_name("resid_post", layer) for layer in layers]
        rows["residual"] = [get_act_name("resid_pre", 0), *after]
        rows[FINAL] = [last]
    for name in wanted:
        if is_full_name(name):
            rows[name] = [name]
        elif name not in WHAT:
            rows[name] = [get_act_name(name, layer) for layer in layers]
    n_pos = pos if columns is None else columns.shape[1]
    sizes = {"pos": n_pos, "query": n_pos, "head": len(heads)}
    plan: Plan = {}
    for name, hooks in rows.items():
        full = shape_of(hooks[0], config, batch, pos)
        axes = spec_of(hooks[0]).shape.split()
        inner = [sizes.get(axis, n) for axis, n in zip(axes, full, strict=True)]
        plan[name] = ((inner[0], len(hooks), *inner[1:]), hooks)
    return plan


def _plan_bytes(plan: Plan, dtype: torch.dtype) -> int:
    return sum(torch.Size(shape).numel() for shape, _ in plan.values()) * dtype.itemsize


def _check_fits(plan: Plan, dtype: torch.dtype, device: torch.device | str) -> None:
    needed, free = _plan_bytes(plan, dtype), available_bytes(device)
    if free is not None and needed > free:
        allocator.release()  # what the process itself holds ready counts as free
        free = available_bytes(device)
    if free is not None and needed > free:
        largest = max(plan, key=lambda name: torch.Size(plan[name][0]).numel())
        smaller = " or dtype=torch.float16" if dtype.itemsize > 2 else ""
        raise MemoryError(
            f"This recording would take {describe_bytes(needed)}, but {device} has "
            f"{describe_bytes(free)} free. Most of it is {largest!r}: choose fewer layers=, heads= "
            f"or pos=,{smaller} or leave it out of what=."
        )


def _storage_dtype(dtype: torch.dtype | None, model: OPTForCausalLM) -> torch.dtype:
    if dtype is not None and dtype not in STORAGE:
        raise checks.InputError(
            f"dtype={dtype!r} cannot hold activations; store them in one of "
            f"{', '.join(map(str, STORAGE))}."
        )
    return model.dtype if dtype is None else dtype


def _check_final_norm(model: OPTForCausalLM) -> None:
    """Refuse interventions behind the residual stream, from which logits and lens are computed."""
    edited = [n for n, p in model.hook_dict.items() if n.startswith("ln_final") and p.editors]
    if edited:
        raise checks.InputError(
            f"A hook function is attached to {edited[0]!r}, but a recording's logits and lens are "
            "computed from its residual stream without it. Remove it; or leave 'residual' and "
            "'logit_lens' out of what=, and take the logits from model.run_with_hooks."
        )


# ------------------------------------------------------------------------------------ running


def _run(
    model: OPTForCausalLM,
    tokens: Tensor,
    mask: Tensor | None,
    slots: dict[str, list[_Slot]],
    heads: list[int],
    columns: Tensor | None,
) -> None:
    """Run the blocks, and what comes after them only if it is listened to; fill the slots."""
    points = model.match_hooks(list(slots))
    all_heads = heads == list(range(model.config.n_heads))
    chosen_heads = None if all_heads else torch.tensor(heads, device=model.device)
    sums: dict[int, Tensor] = {}
    infinite: dict[str, tuple[Tensor, Tensor]] = {}  # as computed, and as stored

    def keep(value: Tensor, hook: HookPoint) -> None:
        for slot in slots[hook.name]:
            part = value
            for axis, name in enumerate(slot.axes):
                if name == "head" and chosen_heads is not None:
                    part = part.index_select(axis, chosen_heads.to(value.device))
                elif name in ("pos", "query") and columns is not None:
                    part = _take_positions(part, axis, columns.to(value.device))
            kept = slot.target[:, slot.row].copy_(part)
            slot.filled = True
            if torch.finfo(kept.dtype).max < torch.finfo(part.dtype).max:
                infinite[hook.name] = (part.isinf().sum(), kept.isinf().sum())

    def probe(value: Tensor, hook: HookPoint) -> None:
        sums[hook.layer()] = value.sum(dtype=torch.float32)

    # on the CPU the model itself watches for values that are not finite
    watched = (
        []
        if model.device.type == "cpu"
        else [get_act_name("resid_post", layer) for layer in range(model.config.n_layers)]
    )
    with torch.no_grad(), model.recorders(points, keep):
        with model.recorders([model.hook_dict[name] for name in watched], probe):
            resid = model(
                tokens, attention_mask=mask, use_cache=False, stop_at_layer=model.config.n_layers
            )
        if any(name.startswith("ln_final") for name in slots):
            model.decoder.finish(resid)
    if sums:
        checks.finite_layers(list(sums.values()), [f"block {layer}" for layer in sums])
    _check_kept(slots, infinite)


def _check_kept(slots: dict[str, list[_Slot]], infinite: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Check that every slot was filled, and with what was computed."""
    silent = [name for name, places in slots.items() if not all(slot.filled for slot in places)]
    if silent:
        raise RuntimeError(
            f"Nothing was computed at {', '.join(map(repr, silent[:3]))}: was a layer of the model "
            "replaced by one without hooks? Leave it out with layers= or what=."
        )
    for name, (computed, stored) in infinite.items():
        if int(computed) != int(stored):
            dtype = slots[name][0].target.dtype
            raise checks.InputError(
                f"The values at {name!r} do not fit in {dtype}, whose largest is "
                f"{torch.finfo(dtype).max:.5g}; store them in dtype=torch.float32"
                + (" or torch.bfloat16." if dtype == torch.float16 else ".")
            )


def _take_positions(value: Tensor, axis: int, columns: Tensor) -> Tensor:
    """Select columns `[batch, n]` along an axis, each prompt its own."""
    index_shape = [columns.shape[0], *[1] * (value.ndim - 1)]
    index_shape[axis] = columns.shape[1]
    size = list(value.shape)
    size[axis] = columns.shape[1]
    return value.gather(axis, columns.view(index_shape).expand(size))


def _metadata(
    model: OPTForCausalLM, tokens: Tensor, real: Tensor, what: list[str]
) -> dict[str, Any]:
    """Say where a recording comes from."""
    tokenizer = model.tokenizer
    ids = tokens.tolist()
    unpadded = [row[keep].tolist() for row, keep in zip(tokens, real, strict=True)]
    if tokenizer is None:
        texts = [[f"⟨{token}⟩" for token in row] for row in ids]
        prompts = ["".join(f"⟨{token}⟩" for token in row) for row in unpadded]
        labels = {}
    else:
        texts = [tokenizer.to_str_tokens(row) for row in ids]
        prompts = [tokenizer.decode(row) for row in unpadded]
        labels = {str(token): tokenizer.display(token) for row in ids for token in row}
    edited = [name for name, point in model.hook_dict.items() if point.edited]
    return {
        "what": what,
        "prompts": prompts,
        "str_tokens": texts,
        "labels": labels,
        "config": model.config.to_dict(),
        "fingerprint": fingerprint(model),
        "model_dtype": str(model.dtype),
        "versions": {"optlens": _version(), "torch": torch.__version__},
        "seed": torch.initial_seed(),
        "edited_hooks": edited,
        "interventions": provenance(model),
    }


@cache  # a search through the installed packages
def _version() -> str:
    try:
        return version("optlens")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"
