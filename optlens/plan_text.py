"""Memory plans as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from optlens.memory import describe_bytes

if TYPE_CHECKING:
    from optlens.planning import MemoryPlan


def text_of_plan(plan: MemoryPlan) -> str:
    """Return a plan as a table: what it takes, where it would lie, whether it fits."""
    dtype = str(plan.dtype).removeprefix("torch.")
    quantized = f", matrices in {plan.quantize}" if plan.quantize else ""
    prompts = "1 prompt" if plan.batch == 1 else f"{plan.batch} prompts"
    lines = [f"{plan.name} in {dtype}{quantized}, {prompts} of {plan.prompt_length} tokens", ""]
    rows = [
        ("weights", plan.weights, ""),
        ("KV cache", plan.kv_cache, ""),
        ("activations", plan.activations, "one forward pass, all logits"),
    ]
    if plan.recording:
        rows.append(("recording", plan.recording, "kept"))
        rows.append(("", plan.recording_run, "while it runs"))
    if plan.sweep:
        rows.append(("patching sweep", plan.sweep, "two recorded runs and a portion of patches"))
    if plan.pinned:
        rows.append(("", plan.pinned, "buffers of pinned memory are powers of two"))
    if plan.heap:
        rows.append(("heap", plan.heap, "freed, and kept by the process for reuse"))
    lines += [f"  {what:15} {describe_bytes(n):>10}  {note}".rstrip() for what, n, note in rows]
    lines += ["", f"Placement: {plan.placement}", ""]
    for device, needed in plan.per_device.items():
        free = plan.memory.get(device)
        of = "" if free is None else f" of {describe_bytes(free)}"
        short = plan.arrangement.short.get(device)
        verdict = f": {describe_bytes(short)} too little" if short else ""
        lines.append(f"  {device:15} {describe_bytes(needed):>10}{of}{verdict}")
    if plan.fits:
        lines += ["", "It fits."]
    else:
        lines += ["", "It does not fit. Each of these would help:"]
        lines += [f"  {advice}" for advice in plan.advice]
    return "\n".join(lines)


def text_of_plans(plans: Sequence[MemoryPlan]) -> str:
    """Return a line for each plan, under a heading."""
    recorded, swept = any(p.recording for p in plans), any(p.sweep for p in plans)
    head = ["model", "dtype", "weights", "KV cache", "activations"]
    head += ["recording"] * recorded + ["sweep"] * swept + ["needed", "placement"]
    rows = [head]
    for plan in plans:
        numbers = [plan.weights, plan.kv_cache, plan.activations]
        numbers += [plan.recording] * recorded + [plan.sweep] * swept + [plan.total]
        cells = [describe_bytes(number) for number in numbers]
        where = plan.placement if plan.fits else "does not fit"
        rows.append([plan.name, str(plan.dtype).removeprefix("torch."), *cells, where])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in (0, 1, len(head) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
