"""The command line: `optlens record`, `patch`, `generate`, `plan`, `convert`, `export` and `lab`.

What a command finds goes to standard output, what it is doing to standard error. A wrong argument,
prompt or file ends it with one message and status 2, anything unexpected with status 1; nobody is
shown a traceback.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optlens
from optlens import cli_export, cli_generate
from optlens.cli_tools import check_targets, read_text, screen, step

if TYPE_CHECKING:
    from optlens.recording import Recording
    from optlens.report.facts import Facts

DTYPES = ("auto", "float32", "float64", "bfloat16", "float16")
PAGE = "recording.html"

# What wrong input, files and machines raise; each of these says what to do about it.
EXPECTED = (ValueError, OSError, LookupError, MemoryError, RuntimeError, ArithmeticError)

EXAMPLES = """\
examples:
  optlens record "When Mary and John went to the store, John gave a drink to"
  optlens record "The capital of France is" --model facebook/opt-125m --html france.html
  optlens record "one two three one two" --json > record.json
  optlens patch "When Mary and John went to the store, John gave a drink to" \\
                "When Mary and John went to the store, Mary gave a drink to" --site z
  optlens generate "Once upon a time" --max-new-tokens 50 --stream
  optlens plan opt-30b --memory cuda:0=24GiB,cpu=64GiB
  optlens convert downloads/opt-66b opt-66b --dtype float16
  optlens export tour.ipynb -o tour.html
  optlens lab
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        arguments: the words after `optlens`; those of the process by default.

    Example:
        >>> main(["--version"])
        Traceback (most recent call last):
        SystemExit: 0
    """
    options = _parser().parse_args(arguments)
    try:
        status = options.run(options)
        sys.stdout.flush()  # a closed pipe shows here, not when Python ends
        return status
    except KeyboardInterrupt:
        print("optlens: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # the one place where an error becomes a sentence
        from optlens.report.markup import visible  # a prompt's own escapes must not act

        expected = isinstance(error, EXPECTED)
        message = str(error) or type(error).__name__
        if not expected:
            message = f"unexpected {type(error).__name__}: {message}"
        print(f"optlens: {visible(message)}", file=sys.stderr)
        return 2 if expected else 1


def record(options: argparse.Namespace) -> int:
    """Record a prompt; print the logit lens, write the page and whatever else was asked for."""
    from optlens.report import write_html
    from optlens.report.facts import gather

    if options.top_k < 1:
        raise ValueError(f"--top-k {options.top_k}: ask for at least one token")
    page = _page_path(options)
    check_targets({"--html": page, "--save": options.save})
    prompt = read_text(options.prompt)
    with step(f"loading {options.model or 'the embedded demo model'}"):
        model = optlens.load(options.model, device=options.device, dtype=options.dtype)
    with step("recording"):
        recording = model.record(prompt)
        (facts,) = gather(recording, options.top_k)
    if options.save:
        with step(f"saving {options.save}"):
            recording.save(options.save)
    if page:
        with step(f"writing {page}"):
            write_html(recording, page, options.top_k)
    if options.json:
        print(json.dumps(as_json(recording, facts, options.model, page, options.save), indent=1))
    else:
        _print_table(facts, page, options.save)
    return 0


def patch(options: argparse.Namespace) -> int:
    """Patch values between the runs of two prompts, and print where the answer comes back."""
    from optlens.cli_patch import patch

    return patch(options)


def plan(options: argparse.Namespace) -> int:
    """Print what models will take and where they would lie."""
    from optlens.cli_plan import plan

    return plan(options)


def convert(options: argparse.Namespace) -> int:
    """Write a checkpoint anew as sharded safetensors."""
    from optlens.cli_convert import convert

    return convert(options)


def lab(options: argparse.Namespace) -> int:
    """Open JupyterLab on the notebooks, or on the current folder where there are none."""
    if find_spec("jupyterlab") is None:
        raise RuntimeError(
            "JupyterLab is not installed here; bring it with: pip install 'optlens[notebooks]'"
        )
    beside = Path(optlens.__file__).resolve().parents[1] / "notebooks"
    folder = beside if any(beside.glob("*.ipynb")) else Path.cwd()
    print(f"optlens: opening JupyterLab on {folder}", file=sys.stderr)
    return subprocess.call([sys.executable, "-m", "jupyterlab", str(folder), *options.rest])


def as_json(
    recording: "Recording", facts: "Facts", model: str | None, page: str | None, saved: str | None
) -> dict[str, Any]:
    """Return what `--json` prints: tokens, next tokens, the logit lens, and the files written.

    Args:
        recording: what was recorded, for its metadata.
        facts: the same as the page shows it.
        model: the model as it was asked for; None is the demo.
        page: where the page was written, if it was.
        saved: where the recording was saved, if it was.
    """
    lens, answer = facts.lens, facts.answer
    tokens = [
        {"position": position, "id": number, "text": text}
        for position, (number, text) in enumerate(zip(facts.ids, facts.tokens, strict=True))
    ]
    rows = []
    for row, name in enumerate(lens.rows):
        top = [
            [
                {"id": int(number), "text": word, "probability": round(float(share), 6)}
                for number, word, share in zip(*cell, strict=True)
            ]
            for cell in zip(lens.ids[row], lens.words[row], lens.probs[row], strict=True)
        ]
        rows.append(
            {
                "after": name,
                "top": top,  # [pos][k]
                "entropy": [round(float(value), 6) for value in lens.entropy[row]],
                "kl": [round(float(value), 6) for value in lens.kl[row]],
                "answer_rank": int(answer.row_ranks[row]) + 1,
                "answer_probability": round(float(answer.row_probs[row]), 6),
            }
        )
    return {
        "optlens": optlens.__version__,
        "model": model or "demo",
        "fingerprint": recording.metadata["fingerprint"],
        "prompt": facts.prompt,
        "tokens": tokens,
        "next": rows[-1]["top"][-1],
        "logit_lens": rows,
        "html": page and str(Path(page).absolute()),
        "saved": saved and str(Path(saved).absolute()),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="optlens",
        description="Look inside Meta's OPT language models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"optlens {optlens.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "record",
        help="record a prompt and show its logit lens",
        description="Run a model on a prompt, print the logit lens, write a page to open in a "
        "browser: tokens, predictions, attention, residual stream.",
    )
    command.set_defaults(run=record)
    add = command.add_argument
    add("prompt", metavar="PROMPT", help="the text to run, in quotes; - reads it from input")
    add("--model", metavar="M", help="checkpoint folder or Hub id (default: the embedded demo)")
    add("--html", metavar="FILE", help=f"where to write the page (default: {PAGE})")
    add("--no-html", action="store_true", help="write no page")
    add("--save", metavar="FILE", help="keep the recording as a safetensors file")
    add("--json", action="store_true", help="print JSON alone; a page only with --html")
    add("--top-k", metavar="K", type=int, default=5, help="guesses to list (default: 5)")
    _add_placement(command)

    _add_patch(commands)
    cli_generate.add_command(commands)
    _add_plan(commands)
    _add_convert(commands)
    cli_export.add_command(commands)

    command = commands.add_parser(
        "lab",
        help="open JupyterLab on the notebooks",
        description="Open JupyterLab on the notebooks. Words after -- go to JupyterLab.",
    )
    command.set_defaults(run=lab)
    command.add_argument("rest", nargs="*", metavar="-- OPTION", help="options for JupyterLab")
    return parser


def _add_patch(commands: Any) -> None:
    """Add the parser of `optlens patch`."""
    command = commands.add_parser(
        "patch",
        help="find which parts of the model cause its answer",
        description="Run a model on two prompts of equal token length that differ in what decides "
        "the answer; write values of one run into the other, one place at a time, and print how "
        "much of the answer each brings back.",
    )
    command.set_defaults(run=patch)
    add = command.add_argument
    add("clean", metavar="CLEAN", help="the prompt with the answer asked for, in quotes")
    add("corrupt", metavar="CORRUPT", help="the same with another answer; one of them may be -")
    add("--answer", metavar="A", help="right token, as ' Mary' (default: what CLEAN predicts)")
    add("--wrong", metavar="W", help="wrong token, as ' John' (default: what CORRUPT predicts)")
    add("--site", metavar="S", default="resid_pre", help="what to patch: resid_pre (default), z, "
        "attn_out, mlp_out, ...; several with commas between")  # fmt: skip
    add("--over", metavar="AXES", help="axes: layer, pos, head, neuron, key, with commas between "
        "(default: layer,pos; layer,head for sites with heads)")  # fmt: skip
    add("--top-neurons", metavar="N", type=int, help="with the axis neuron: only the N neurons whose "
        "effect is estimated largest (axes then: layer,neuron)")  # fmt: skip
    add("--direction", default="denoise", choices=("denoise", "noise"), help="write clean values "
        "into the corrupt run (denoise, the default) or the other way round")  # fmt: skip
    add("--model", metavar="M", help="checkpoint folder or Hub id (default: the embedded demo)")
    add("--html", metavar="FILE", help="write a page to open in a browser")
    add("--save", metavar="FILE", help="keep the result as a safetensors file")
    add("--json", action="store_true", help="print JSON alone")
    add("--dry-run", action="store_true", help="say what it would cost, and stop")
    _add_placement(command)


def _add_plan(commands: Any) -> None:
    """Add the parser of `optlens plan`."""
    command = commands.add_parser(
        "plan",
        help="say what a model will take, and where it would lie",
        description="Print the bytes of weights, KV cache, activations, a recording and a patching "
        "sweep, where the model would be placed and whether it fits. Downloads and loads nothing.",
    )
    command.set_defaults(run=plan)
    add = command.add_argument
    add("model", metavar="MODEL", nargs="?",
        help="a published size such as opt-30b, or a checkpoint folder (default: all sizes)")  # fmt: skip
    add("--memory", metavar="M", help="memory of another machine, as cuda:0=24GiB,cpu=64GiB")
    add("--device", metavar="D", help="one device of this machine: cpu, cuda, cuda:1, ...")
    add("--dtype", metavar="T", default="auto", choices=DTYPES, help=", ".join(DTYPES))
    add("--quantize", choices=("int8", "nf4"), help="matrices of the blocks in 8 or 4 bits")
    add("--batch", metavar="N", type=int, default=1, help="prompts (default: 1)")
    add("--tokens", metavar="N", type=int, default=512, help="tokens of each (default: 512)")
    add("--record", metavar="WHAT", nargs="?", const="", help="count a recording, of names with "
        "commas between (default: attention,residual,logit_lens)")  # fmt: skip
    add("--sweep", metavar="SITE", nargs="?", const="resid_pre", help="count a patching sweep over "
        "layers and positions (default site: resid_pre)")  # fmt: skip
    add("--device-map", metavar="P", choices=("auto", "balanced", "stream"),
        help="judge this placement: auto, balanced or stream")  # fmt: skip
    add("--json", action="store_true", help="print JSON alone")


def _add_convert(commands: Any) -> None:
    """Add the parser of `optlens convert`."""
    command = commands.add_parser(
        "convert",
        help="turn a checkpoint into sharded safetensors",
        description="Write any checkpoint that optlens reads (safetensors, .bin, Meta's original "
        "reshard-model_part-*.pt) as sharded safetensors, with config and tokenizer. Interrupted, "
        "the same command goes on where it stopped.",
    )
    command.set_defaults(run=convert)
    add = command.add_argument
    add("src", metavar="SRC", help="checkpoint folder or Hub id")
    add("dst", metavar="DST", help="folder to write")
    add("--dtype", metavar="T", choices=DTYPES[1:],
        help=f"{', '.join(DTYPES[1:])} (default: as stored)")  # fmt: skip
    add("--shard-size", metavar="S", default="5GB", help="largest file (default: 5GB)")
    add("--revision", metavar="R", help="branch, tag or commit on the Hub")
    add("--restart", action="store_true", help="throw away an earlier conversion to DST")


def _add_placement(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--device", metavar="D", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    add("--dtype", metavar="T", default="auto", choices=DTYPES, help=", ".join(DTYPES))


def _page_path(options: argparse.Namespace) -> str | None:
    """Return where the page goes; None for nowhere."""
    if options.no_html and options.html:
        raise ValueError("--html and --no-html exclude each other")
    if options.no_html or (options.json and options.html is None):
        return None
    return PAGE if options.html is None else options.html


def _print_table(facts: "Facts", page: str | None, saved: str | None) -> None:
    from optlens.report.terminal import encodable, text_of

    here = screen()
    print(text_of(facts, here.width, here.color, here.encoding))
    if saved:
        print(encodable(f"Recording: {Path(saved).absolute()}", here.encoding))
    if page:
        print(encodable(f"Page:      {Path(page).absolute()}", here.encoding))
