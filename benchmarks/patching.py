"""Activation patching, against TransformerLens's patching functions.

    python benchmarks/patching.py
    python benchmarks/patching.py --skip-peer
    python benchmarks/patching.py --plot patching.png

One random float32 model of 125m's shapes, the same weights in both libraries, prompts of 15 tokens. Each
comparison alternates: a sweep of ours, then the same patches by the peer, and so on; both give the same
numbers, which is checked. TransformerLens runs one forward pass per patch, so a pair takes about a minute.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from paired import Row, alternate, clock, publish, random_tokens, true_shape_model
from process_memory import forget_peak, resident
from recording import peer

import optlens
from optlens import metrics
from optlens.linear import linear
from optlens.patching import patch_sweep

ANSWER, WRONG = 1000, 2000
METRIC = metrics.logit_diff(ANSWER, WRONG)
LENGTH = 15


def prompt_pair(first_difference: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make two prompts of random tokens, alike before a position and different from it on.

    For an IOI pair ("..., John gave the bag to" and "..., Mary gave the bag to") only one token differs.
    """
    clean, other = random_tokens(1, LENGTH), random_tokens(1, LENGTH, seed=1)
    corrupt = clean.clone()
    last = LENGTH if first_difference == 1 else first_difference + 1
    corrupt[:, first_difference:last] = other[:, first_difference:last]
    return clean, corrupt


def sweep(model: Any, clean: torch.Tensor, corrupt: torch.Tensor, site: str, over: tuple) -> Any:
    """Sweep with our engine; return the metric of every patch."""
    return patch_sweep(model, clean, corrupt, site, over, METRIC, progress=False).values


def peer_sweep(bridge: Any, clean: torch.Tensor, corrupt: torch.Tensor, site: str) -> Any:
    """Sweep with TransformerLens's own patching function; return the metric of every patch."""
    from transformer_lens import patching

    function = {
        "resid_pre": patching.get_act_patch_resid_pre,
        "z": patching.get_act_patch_attn_head_out_all_pos,
    }[site]
    _, cache = bridge.run_with_cache(clean)
    return function(
        bridge, corrupt, cache, lambda logits: logits[0, -1, ANSWER] - logits[0, -1, WRONG]
    )


def naive_sweep(
    model: Any, clean: torch.Tensor, corrupt: torch.Tensor, cells: list, **options: Any
) -> torch.Tensor:
    """Patch z with one whole forward pass for each of some (layer, head, position).

    Args:
        model: Ours or TransformerLens's.
        clean: The prompt that values come from.
        corrupt: The prompt that is patched.
        cells: Which patches.
        options: More arguments of the forward pass.
    """
    names = {layer: f"blocks.{layer}.attn.hook_z" for layer, _, _ in cells}
    _, cache = model.run_with_cache(clean, names_filter=list(names.values()))
    found = []
    for layer, head, pos in cells:

        def write(z: torch.Tensor, hook: Any, head: int = head, pos: int = pos) -> torch.Tensor:
            z[:, pos, head] = cache[hook.name][:, pos, head]
            return z

        logits = model.run_with_hooks(corrupt, fwd_hooks=[(names[layer], write)], **options)
        found.append(logits[0, -1, ANSWER] - logits[0, -1, WRONG])
    return torch.stack(found)


def cells_row(
    model: Any, naive: Callable, against: str, pairs: int, limit: float | None = 1 / 20
) -> Row:
    """Compare a sweep over every head at every position with one forward pass for each."""
    clean, corrupt = prompt_pair(1)
    shape = (model.config.n_layers, model.config.n_heads, LENGTH)
    cells = list(itertools.product(*map(range, shape)))
    some = cells[:: len(cells) // 60]  # the naive way takes a minute for all
    full = functools.partial(sweep, model, clean, corrupt, "z", ("layer", "head", "pos"))
    part = functools.partial(naive, clean, corrupt, some)
    same_numbers(lambda: full()[tuple(zip(*some, strict=True))], part)
    what = f"z, layer x head x pos ({len(cells)} patches)"
    row = alternate(what, against, full, part, None, pairs, warm_up=1)
    scale = len(cells) / len(some)
    row.theirs *= scale
    row.ratio, row.low, row.high = row.ratio / scale, row.low / scale, row.high / scale
    row.limit = limit
    return row


def peer_rows(model: Any, pairs: int) -> list[Row]:
    """Compare the two sweeps that everybody runs, on two kinds of prompts."""
    bridge = peer(model)
    rows = []
    cases = (
        ("differ from the first word on", 1, {"resid_pre": 1 / 20, "z": 1 / 12}),
        ("differ in a late word", 10, {"resid_pre": 1 / 60, "z": 1 / 30}),
    )
    for how, first_difference, limits in cases:
        clean, corrupt = prompt_pair(first_difference)
        for site, over in (("resid_pre", ("layer", "pos")), ("z", ("layer", "head"))):
            ours = functools.partial(sweep, model, clean, corrupt, site, over)
            theirs = functools.partial(peer_sweep, bridge, clean, corrupt, site)
            same_numbers(ours, theirs)
            what = f"{site}, {' x '.join(over)}, prompts {how}"
            rows.append(
                alternate(what, "TransformerLens 4.3", ours, theirs, limits[site], pairs, warm_up=1)
            )
    loop = functools.partial(naive_sweep, bridge)
    return [*rows, cells_row(model, loop, "TransformerLens 4.3", pairs)]


def same_numbers(ours: Callable[[], Any], theirs: Callable[[], Any]) -> None:
    """Check that both sweeps found the same, to rounding."""
    mine, other = ours(), theirs()
    error = float((mine - other.reshape(mine.shape)).abs().max() / other.abs().max())
    if error > 1e-3:
        raise AssertionError(f"The two sweeps differ by {error:.1e} of the largest value.")


def own_rows(model: Any, pairs: int) -> list[Row]:
    """Compare with one forward pass per patch, and many prompts at once with one at a time."""
    loop = functools.partial(naive_sweep, model, use_cache=False)
    last_logits = functools.partial(loop, logits_to_keep=1)
    rows = [
        cells_row(model, loop, "one forward pass each", pairs),
        cells_row(model, last_logits, "the same, last logits only", pairs, limit=None),
    ]
    many, others = random_tokens(16, LENGTH), random_tokens(16, LENGTH, seed=1)

    def one_by_one() -> None:
        for number in range(16):
            pair = many[number : number + 1], others[number : number + 1]
            sweep(model, *pair, "resid_pre", ("layer", "pos"))

    at_once = functools.partial(sweep, model, many, others, "resid_pre", ("layer", "pos"))
    batch = alternate(
        "16 pairs at once, resid_pre", "16 times one", at_once, one_by_one, 0.8, pairs, warm_up=1
    )
    return [*rows, batch]


def product_rate() -> float:
    """Measure the floating-point operations per second of a model's large products here."""
    tokens, weight = torch.randn(4096, 768), torch.randn(3072, 768)
    times = [clock(lambda: linear(tokens, weight))[0] for _ in range(10)]
    return 2 * 4096 * 768 * 3072 / statistics.median(times)


def peak_memory(budget: int) -> int:
    """Return by how many bytes a sweep under `memory_budget` makes this process grow at most."""
    model = true_shape_model()
    clean, corrupt = random_tokens(4, 64), random_tokens(4, 64, seed=1)
    model(clean, use_cache=False, logits_to_keep=1)  # what PyTorch sets up once
    before = resident("VmRSS")
    forget_peak()
    patch_sweep(model, clean, corrupt, metric=METRIC, memory_budget=budget, progress=False)
    return resident("VmHWM") - before


def peaks(budgets: tuple[int, ...]) -> list[dict[str, float]]:
    """Measure the peak under several budgets, each in a process of its own."""
    found = []
    for budget in budgets:
        command = [sys.executable, __file__, "--peak", str(budget)]
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found.append({"memory_budget": budget, "peak": int(answer.split()[-1])})
        print(
            f"memory_budget {budget / 1e6:.0f} MB  peak {found[-1]['peak'] / 1e6:.0f} MB",
            flush=True,
        )
    return found


def growth(
    lengths: tuple[int, ...], depths: tuple[int, ...], once_from: int = 256
) -> list[dict[str, float]]:
    """Measure how the cost of a patch grows with prompt length and depth, against its operations.

    Args:
        lengths: Tokens of the prompts, at 12 blocks.
        depths: Numbers of blocks, at `LENGTH` tokens.
        once_from: Prompts of so many tokens are swept once, which takes minutes and in which
            starting up does not count; shorter ones four times, of which the first warms up.

    Returns:
        For each size: tokens, layers, patches, seconds, milliseconds per patch, GFLOP per patch,
        the share of `product_rate` that was reached, and how many runs the seconds are a median of.
    """
    rate, found = product_rate(), []
    sizes = [(length, 12) for length in lengths] + [(LENGTH, depth) for depth in depths]
    for length, depth in sizes:
        torch.manual_seed(0)
        config = optlens.OPTConfig.from_name("opt-125m").to_dict() | {"num_hidden_layers": depth}
        model = optlens.OPTForCausalLM(optlens.OPTConfig.from_dict(config)).eval()
        clean, corrupt = random_tokens(1, length), random_tokens(1, length, seed=1)
        corrupt[0, 0] = clean[0, 0]
        run = functools.partial(sweep, model, clean, corrupt, "resid_pre", ("layer", "pos"))
        plan = patch_sweep(model, clean, corrupt, metric=METRIC, dry_run=True)
        times = [clock(run)[0] for _ in range(1 if length >= once_from else 4)]
        times = times[1:] or times
        seconds = statistics.median(times)
        found.append(
            {
                "tokens": length,
                "layers": depth,
                "patches": plan.patches,
                "seconds": seconds,
                "ms_per_patch": 1000 * seconds / plan.patches,
                "gflop_per_patch": plan.flops / plan.patches / 1e9,
                "share_of_product_rate": plan.flops / seconds / rate,
                "runs": len(times),
            }
        )
        print("  ".join(f"{key} {value:.4g}" for key, value in found[-1].items()), flush=True)
    return found


def draw(sizes: list[dict[str, float]], path: str) -> None:
    """Write a figure of the cost per patch against its operations, as `growth` measured them.

    Args:
        sizes: What `growth` returned.
        path: The file; its ending says which kind.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    rate = statistics.median(
        each["gflop_per_patch"] / each["ms_per_patch"] / each["share_of_product_rate"]
        for each in sizes
    )  # GFLOP per ms
    for name, of_name in (("tokens", "12 blocks"), ("layers", f"{LENGTH} tokens")):
        line = [each for each in sizes if (each["tokens"] == LENGTH) == (name == "layers")]
        points = [(each["gflop_per_patch"], each["ms_per_patch"]) for each in line]
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), "o-", label=f"number of {name}, at {of_name}")
        for each, point in zip(line, points, strict=True):
            axes.annotate(f" {each[name]}", point, va="top")
    ends = [f(each["gflop_per_patch"] for each in sizes) for f in (min, max)]
    products = [end / rate for end in ends]
    axes.plot(ends, products, "--", color="grey", label="at the rate of large matrix products")
    axes.set(xscale="log", yscale="log", xlabel="GFLOP per patch", ylabel="ms per patch")
    axes.set_title("resid_pre, layer x pos, 125m's width")
    axes.tick_params(axis="x", which="minor", labelsize=7)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=3, help="pairs per line (default 3)")
    parser.add_argument("--skip-peer", action="store_true", help="leave out TransformerLens")
    parser.add_argument("--skip-own", action="store_true", help="only TransformerLens")
    parser.add_argument("--skip-growth", action="store_true", help="leave out other sizes")
    parser.add_argument("--plot", metavar="FILE", help="draw the cost of a patch at all sizes")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plot and args.skip_growth:
        parser.error("--plot shows the sizes that --skip-growth leaves out")
    torch.set_grad_enabled(False)
    if args.peak:
        print(peak_memory(args.peak))
        return
    model = true_shape_model()
    rows = [] if args.skip_peer else peer_rows(model, args.pairs)
    rows += [] if args.skip_own else own_rows(model, args.pairs)
    sizes = [] if args.skip_growth else growth((16, 32, 64, 128, 256), (4, 8, 24))
    if args.plot:
        draw(sizes, args.plot)
    memory = [] if args.skip_growth else peaks((200_000_000, 400_000_000, 1_000_000_000))
    publish("patching", rows, growth=sizes, memory=memory)


if __name__ == "__main__":
    main()
