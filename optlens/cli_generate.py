"""The command `optlens generate PROMPT`: write on from a prompt and print the text."""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import TYPE_CHECKING, Any

import optlens
from optlens.cli_tools import read_text, step

if TYPE_CHECKING:
    from optlens.generation import Generation
    from optlens.model import OPTForCausalLM


def add_command(commands: Any) -> None:
    """Add the command to those of `optlens`."""
    command = commands.add_parser(
        "generate",
        help="write on from a prompt",
        description="Print the prompt and what the model makes of it: the likeliest tokens, or a "
        "sample with --temperature, --top-k, --top-p or --seed.",
    )
    command.set_defaults(run=generate)
    add = command.add_argument
    add("prompt", metavar="PROMPT", help="the text to go on from, in quotes; - reads it from input")
    add(
        "--max-new-tokens", metavar="N", type=int, default=50, help="how many at most (default: 50)"
    )
    add("--model", metavar="M", help="checkpoint folder or Hub id (default: the embedded demo)")
    add("--stream", action="store_true", help="print each piece as soon as it is written")
    add("--seed", metavar="S", type=int, help="sample, beginning with this seed")
    add("--temperature", metavar="T", type=float, help="sample; below 1 for the likely")
    add("--top-k", metavar="K", type=int, help="sample among the K likeliest")
    add("--top-p", metavar="P", type=float, help="sample among the likeliest that sum to P")
    add("--num-beams", metavar="B", type=int, default=1, help="search with B beams")
    add("--stop", metavar="TEXT", action="append", help="end with this text; may be repeated")
    add("--device", metavar="D", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    add("--dtype", metavar="T", default="auto", help="auto, float32, float64, bfloat16, float16")


def generate(options: argparse.Namespace) -> int:
    """Print the text; what kind of text it is, and its seed, go to standard error."""
    from optlens.cli import DTYPES

    if options.dtype not in DTYPES:
        raise ValueError(f"--dtype {options.dtype}: choose one of {', '.join(DTYPES)}")
    prompt = read_text(options.prompt)
    with step(f"loading {options.model or 'the embedded demo model'}"):
        model = optlens.load(options.model, device=options.device, dtype=options.dtype)
    names = ("max_new_tokens", "seed", "temperature", "top_k", "top_p", "num_beams")
    asked = {name: getattr(options, name) for name in names}
    asked["stop_strings"] = options.stop
    if options.stream:
        result = _print_pieces(model, prompt, asked)
    else:
        with step("writing"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Interrupted after")  # the last line says it
            result = model.generate(prompt, return_dict=True, **asked)
        print(_encodable(result.texts[0]))
    seed = "" if result.seed is None else f"; seed {result.seed}"
    count = len(result.new_tokens[0])
    print(f"optlens: {count} new tokens, end: {result.finish_reasons[0]}{seed}", file=sys.stderr)
    return 130 if result.partial else 0


def _print_pieces(model: OPTForCausalLM, prompt: str, asked: dict[str, Any]) -> Generation:
    """Print a text while it is written; an interrupt ends it."""
    stream = model.stream(prompt, **asked)
    print(_encodable(prompt), end="", flush=True)
    try:
        for piece in stream:
            print(_encodable(piece), end="", flush=True)
    except KeyboardInterrupt:
        pass  # the end of the line, and the count, follow
    print()
    return stream.result


def _encodable(text: str) -> str:
    """Return a text that the terminal can print."""
    from optlens.report.terminal import encodable

    return encodable(text, sys.stdout.encoding or "ascii")
