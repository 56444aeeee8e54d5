"""The command `optlens patch CLEAN CORRUPT`: which parts of the model cause its answer."""

import argparse
import json
import math
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import optlens
from optlens import metrics
from optlens.checks import InputError
from optlens.cli_tools import check_targets, read_text, screen, step
from optlens.metric_targets import as_answer
from optlens.patching import PatchResult, SweepPlan, patch_sweep
from optlens.patching.grid import axes_of
from optlens.patching.pairs import paired_tokens
from optlens.patching.sites import sites_named
from optlens.report.markup import visible
from optlens.report.sweep_facts import SweepFacts, gather_sweep
from optlens.report.sweep_terminal import text_of_sweep
from optlens.report.terminal import encodable

if TYPE_CHECKING:
    from optlens.model import OPTForCausalLM


def patch(options: argparse.Namespace) -> int:
    """Sweep over the places of two runs; print the table, write what was asked for.

    Returns:
        0, or 130 if the sweep was interrupted: what was found by then is shown and written.
    """
    site = _several(options.site, "--site")
    site = site[0] if len(site) == 1 else site
    usual = ["layer", "neuron"] if options.top_neurons is not None else _usual_axes(site)
    over = usual if options.over is None else _several(options.over, "--over")
    over = axes_of(site, over)
    check_targets({"--html": options.html, "--save": options.save})
    if options.dry_run and (options.html or options.save):
        raise ValueError("--dry-run finds nothing to write: leave out --html and --save")
    if options.clean == options.corrupt == "-":
        raise ValueError("only one of the two prompts can be read from the input")
    prompts = read_text(options.clean, "clean prompt"), read_text(options.corrupt, "corrupt prompt")
    with step(f"loading {options.model or 'the embedded demo model'}"):
        model = optlens.load(options.model, device=options.device, dtype=options.dtype)
    metric = _metric(model, *prompts, options)
    start = time.perf_counter()
    with step("planning" if options.dry_run else "patching"):
        found = _sweep(model, prompts, site, over, metric, options)
    seconds = time.perf_counter() - start
    if isinstance(found, SweepPlan):
        print(json.dumps(asdict(found), indent=1) if options.json else found)
        return 0
    _write(found, options)
    facts = gather_sweep(found)
    if options.json:
        print(json.dumps(as_json(found, facts, options, seconds), indent=1))
    else:
        _print(facts, options, seconds)
    return 0 if found.complete else 130


def as_json(
    result: PatchResult, facts: SweepFacts, options: argparse.Namespace, seconds: float
) -> dict[str, Any]:
    """Return what `--json` prints: prompts, ends, every value, the strongest, the files written.

    Numbers that were not computed, or cannot be normalized, are null.

    Args:
        result: What was found.
        facts: The same as the page shows it.
        options: What was asked for.
        seconds: What the sweep took.
    """
    (prompt,) = facts.prompts
    return {
        "optlens": optlens.__version__,
        "model": options.model or "demo",
        "fingerprint": result.metadata["model"],
        "site": result.metadata["site"],
        "direction": options.direction,
        "metric": facts.metric,
        "clean": {"tokens": prompt.tokens, "metric": _nulls(result.clean)},
        "corrupt": {"tokens": prompt.other, "metric": _nulls(result.corrupt)},
        "axes": {axis: result.labels[axis] for axis in result.axes},
        "complete": result.complete,
        "values": _nulls(facts.values.tolist()),
        "normalized": _nulls(facts.shown.tolist()) if facts.scale == "normalized" else None,
        "strongest": [
            {"place": facts.place(index), "index": index, "value": float(facts.values[index])}
            for index in facts.top
        ],
        "seconds": round(seconds, 4),
        "html": options.html and str(Path(options.html).absolute()),
        "saved": options.save and str(Path(options.save).absolute()),
    }


# --- what to sweep and measure -------------------------------------------------------------------


def _several(given: str, option: str) -> list[str]:
    """Return the words of an option, which have commas between."""
    words = [word.strip() for word in given.split(",")]
    if not all(words):
        raise ValueError(f'{option} "{given}": give names with commas between, such as layer,pos')
    return words


def _usual_axes(site: str | list[str]) -> list[str]:
    """Return what a site is swept over unless said otherwise; refuse one that does not exist."""
    sites = sites_named(site)
    if any(each.name == "embed" for each in sites):
        return ["pos"]
    return ["layer", "head" if all("head" in each.axes for each in sites) else "pos"]


def _metric(
    model: "OPTForCausalLM", clean: str, corrupt: str, options: argparse.Namespace
) -> metrics.Metric:
    """Make the logit difference of the two answers; those not given are what the runs predict."""
    (tokens, others), _ = paired_tokens(model, clean, corrupt)
    if torch.equal(tokens, others):
        raise InputError("the two prompts are the same, so there is nothing to patch")
    with model.in_eval_mode(), torch.no_grad():
        ends = [
            model(ids, use_cache=False, logits_to_keep=1).logits[0, -1] for ids in (tokens, others)
        ]
    answer = _answer(model, options.answer, "--answer", ends[0])
    wrong = _answer(model, options.wrong, "--wrong", ends[1])
    if answer == wrong:
        raise InputError(
            f"--answer and --wrong are the same token, {as_answer(model, answer)!r}, so their "
            "difference is 0 throughout: name another for one of them"
        )
    return metrics.logit_diff(*(as_answer(model, token) for token in (answer, wrong)))


def _answer(model: "OPTForCausalLM", given: str | None, option: str, logits: torch.Tensor) -> int:
    """Return the id of an answer.

    A word without its space is rarely meant as it stands: of `Mary` and ` Mary`, where both are
    tokens, the one is taken that the model finds likelier, and it is said which.

    Args:
        model: The model.
        given: The answer's text; None for the likeliest token.
        option: Which option it came from.
        logits: After the prompt that the answer belongs to, `[d_vocab]`.
    """
    if given is None:
        token = int(logits.argmax())
        print(f"optlens: {option}: {as_answer(model, token)!r}, the prediction", file=sys.stderr)
        return token
    if not given.strip():
        raise ValueError(
            f'{option} "{given}": give the token that is to come next, such as " Mary"'
        )
    spellings = [given] if given[:1].isspace() else [given, f" {given}"]
    ids = {text: model.tokenizer.encode(text, prepend_bos=False) for text in spellings}
    single = [text for text, tokens in ids.items() if len(tokens) == 1]
    if not single:
        pieces = " and ".join(
            f"{text!r} is {len(tokens)} tokens "
            f"({' | '.join(model.tokenizer.display_tokens(tokens))})"
            for text, tokens in ids.items()
        )
        first = model.tokenizer.decode(ids[spellings[-1]][:1])
        hint = f"; try its first, {first!r}" if first.strip() else ""
        raise InputError(f"{option}: {pieces}; the metric reads a single token{hint}")
    best = max(single, key=lambda text: float(logits[ids[text][0]]))
    if best != given:
        print(f"optlens: {option} {given!r}: taken as {best!r}", file=sys.stderr)
    return ids[best][0]


def _sweep(
    model: "OPTForCausalLM",
    prompts: tuple[str, str],
    site: str | list[str],
    over: list[str],
    metric: metrics.Metric,
    options: argparse.Namespace,
) -> PatchResult | SweepPlan:
    with warnings.catch_warnings(record=True) as said:
        warnings.filterwarnings("ignore", message="Interrupted")  # said below, with the result
        found = patch_sweep(
            model,
            *prompts,
            site,
            over,
            metric,
            options.direction,
            top_neurons=options.top_neurons,
            progress=sys.stderr.isatty(),
            dry_run=options.dry_run,
        )
    for each in said:
        print(f"optlens: {each.message}", file=sys.stderr)
    return found


# --- what comes out ------------------------------------------------------------------------------


def _write(result: PatchResult, options: argparse.Namespace) -> None:
    if not result.complete:
        print("optlens: interrupted; what was found by then follows", file=sys.stderr)
    if options.save:
        with step(f"saving {options.save}"):
            result.save(options.save)
    if options.html:
        with step(f"writing {options.html}"):
            result.to_html(options.html)


def _print(facts: SweepFacts, options: argparse.Namespace, seconds: float) -> None:
    here = screen()
    print(text_of_sweep(facts, here.width, here.color, here.encoding))
    done = facts.values.size - facts.missing
    print(f"{done:,} patches in {seconds:.2f} s")
    for name, path in (("Result", options.save), ("Page", options.html)):
        if path:
            print(
                encodable(f"{name + ':':<10} {visible(str(Path(path).absolute()))}", here.encoding)
            )


def _nulls(values: Any) -> Any:
    """Return nested lists with None for what JSON has no number for."""
    if isinstance(values, list):
        return [_nulls(value) for value in values]
    return values if math.isfinite(values) else None
