"""The command `optlens plan [MODEL]`: what a model will take, before it is there."""

import argparse
import json
from typing import Any

from optlens.cli_tools import screen
from optlens.config import SIZES
from optlens.plan_text import text_of_plans
from optlens.planning import MemoryPlan
from optlens.planning import plan as make_plan
from optlens.report.terminal import encodable


def plan(options: argparse.Namespace) -> int:
    """Print the plan of a model, or a line for every published size."""
    if options.memory is not None and options.device is not None:
        raise ValueError("--memory and --device exclude each other")
    if options.model is not None:
        made = _plan(options.model, options)
        print(json.dumps(made.to_dict(), indent=1) if options.json else _shown(str(made)))
        return 0
    plans = [_plan(f"opt-{size}", options) for size in SIZES]
    if options.json:
        print(json.dumps([each.to_dict() for each in plans], indent=1))
    else:
        print(_shown(text_of_plans(plans)))
    return 0


def _plan(model: str, options: argparse.Namespace) -> MemoryPlan:
    record = options.record
    if record is not None:
        record = [word.strip() for word in record.split(",")] if record else True
    return make_plan(
        model,
        device=options.device if options.memory is None else _memory(options.memory),
        dtype=options.dtype,
        quantize=options.quantize,
        batch=options.batch,
        prompt_length=options.tokens,
        record=record,
        sweep=options.sweep,
        device_map=options.device_map,
    )


def _memory(text: str) -> dict[str, Any]:
    """Read a list of devices and sizes."""
    memory = {}
    for entry in text.split(","):
        device, equals, size = entry.strip().partition("=")
        if not (device and equals and size):
            raise ValueError(
                f'--memory "{text}": give devices and sizes, as cuda:0=24GiB,cpu=64GiB'
            )
        memory[device] = size
    return memory


def _shown(text: str) -> str:
    return encodable(text, screen().encoding)
