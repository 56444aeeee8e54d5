"""How long the views take in a real JupyterLab and as pages, and what they hold of memory.

    python benchmarks/widgets.py                     # the sizes below; needs 6 GB of main memory
    python benchmarks/widgets.py --only pages        # or explorer, short, long; several with commas
    python benchmarks/widgets.py --small             # a rehearsal on a small machine

Patterns are made up, with the shapes of real ones and in float16: what is measured is the way from a
recording to the screen. Times are medians of several runs in one browser; "painted" is the first
frame in which the large pattern is drawn, or a page's last picture. The pages are those of the demo
checkpoint's recording, opened from a file without a network. Needs JupyterLab, playwright and
Chromium, as the tests do.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent / "tests" / "widgets")]
sys.path.insert(0, str(HERE.parent))

from jupyter_lab import RUN_ALL, browser_on, open_notebook, server, write_notebook  # noqa: E402

FULL = {"short": (12, 12, 128), "long": (32, 32, 1024)}
SMALL = {"short": (4, 4, 64), "long": (8, 8, 512)}
PROMPT = "When Mary and John went to the store, John gave a drink to"

MAKE = """\
import time, torch, optlens
from optlens.recording import Recording

def made_up(layers, heads, pos):
    config = dict(num_hidden_layers=layers, num_attention_heads=heads, vocab_size=100, hidden_size=64)
    pattern = torch.empty(1, layers, heads, pos, pos, dtype=torch.float16)
    for head in pattern[0].flatten(0, 1):  # one after the other: nothing of this size in float32
        weights = torch.rand(pos, pos).tril_().pow_(8)
        head.copy_(weights / weights.sum(-1, keepdim=True))
    facts = dict(layers=list(range(layers)), heads=list(range(heads)), positions=list(range(pos)),
        columns=[list(range(pos))], is_batch=False, dtype="float16", model_dtype="float16", what=["attention"], prompts=["made up"],
        str_tokens=[["x"] * pos], labels={}, config=config)
    tensors = {"tokens": torch.arange(pos)[None] %% 97, "mask": torch.ones(1, pos).bool(),
        "attention": pattern}
    return Recording(tensors, facts)

torch.manual_seed(0)
recording = made_up(*%s)
"""
SHOW = "start = time.time()\nview = recording.show()\nview"
# 32 tokens with `</s>`, on the demo checkpoint.
EXPLORE = """import optlens
explorer = optlens.widgets.Explorer(optlens.load(), "When Mary and John went to the store, John gave a drink to \
Mary. Then Mary and John went to the park, and John gave it to")
assert len(explorer.recording.tokens) == 32
explorer"""

# Notes the time of the frame after the large pattern was drawn in the output of a cell.
WATCH = """(number) => { window.painted = null; const look = () => {
    const canvas = document.querySelector(`[data-windowed-list-index='${number}'] .ol-square canvas`);
    if (canvas && canvas.width > 1) requestAnimationFrame(() => { window.painted = Date.now(); });
    else requestAnimationFrame(look); }; look(); }"""
RUN = """async (number) => { const panel = window.jupyterapp.shell.currentWidget;
    panel.content.activeCellIndex = number; panel.content.scrollToItem(number, 'start');
    await window.jupyterapp.commands.execute('notebook:run-cell'); }"""
# Milliseconds from a click on a head to the frame after its pattern has been drawn.
CLICK = """([number, layer, head]) => new Promise((resolve) => {
    const cell = document.querySelector(`[data-windowed-list-index='${number}']`);
    const square = cell.querySelector('.ol-square'), name = cell.querySelector('.ol-attention .ol-name');
    const start = performance.now();
    cell.querySelector(`.ol-head[aria-label^='layer ${layer}, head ${head}']`).click();
    const look = () => name.textContent === `Layer ${layer}, head ${head}` && !square.classList.contains('ol-waiting')
        ? requestAnimationFrame(() => resolve(performance.now() - start)) : requestAnimationFrame(look);
    look(); })"""
# Milliseconds from a click that ablates the chosen head to the frame after the last view is a new one.
ABLATE = """([number, layer, head]) => new Promise((resolve) => {
    const cell = document.querySelector(`[data-windowed-list-index='${number}']`);
    cell.querySelector(`.ol-head[aria-label^='layer ${layer}, head ${head}']`).click();
    const old = [...cell.querySelectorAll('.ol-section')].at(-1), start = performance.now();
    cell.querySelector('[data-do=ablate]').click();
    const look = () => (old.isConnected ? requestAnimationFrame(look)
        : requestAnimationFrame(() => resolve(performance.now() - start)));
    look(); })"""
# Milliseconds of work for each movement of the mouse over the large pattern.
HOVER = """(number) => { const square = document.querySelector(`[data-windowed-list-index='${number}'] .ol-square`);
    const box = square.getBoundingClientRect(), times = [];
    for (let i = 0; i < 200; i += 1) {
        const start = performance.now();
        square.dispatchEvent(new PointerEvent('pointermove', { bubbles: true,
            clientX: box.left + (i * 37 %% 100) * box.width / 100, clientY: box.top + (i * 61 %% 100) * box.height / 100 }));
        square.offsetWidth; // lets the layout happen, as the next frame would
        times.push(performance.now() - start);
    }
    return times; }""".replace("%%", "%")
PYTHON = """async (code) => { const panel = window.jupyterapp.shell.currentWidget;
    const future = panel.sessionContext.session.kernel.requestExecute({ code });
    let said = ''; future.onIOPub = (message) => { said += message.content.text ?? ''; };
    await future.done; return Number(said); }"""
CASES = ("pages", "explorer", "short", "long")
PEAK = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)"
# Milliseconds from asking for a page to the frame after its last picture.
PAINTED = """() => new Promise((resolve) => { const look = () => {
    const canvas = document.querySelector('.ol-square canvas');
    const done = document.readyState === 'complete' && (canvas ? canvas.width > 1 : !document.querySelector('#view'));
    if (done) requestAnimationFrame(() => resolve(performance.now())); else requestAnimationFrame(look); };
    look(); })"""


def show(page: Any, repeats: int) -> list[float]:
    """Return seconds from `recording.show()` to painted, for several runs of the cell."""
    found = []
    for _ in range(repeats):
        page.evaluate(
            "window.jupyterapp.shell.currentWidget.content.widgets[1].model.clearExecution()"
        )
        page.evaluate(WATCH, 1)
        page.evaluate(RUN, 1)
        page.wait_for_function("window.painted", timeout=120_000)
        found.append(page.evaluate("window.painted") / 1000 - page.evaluate(PYTHON, "print(start)"))
    return found


def layer_changes(page: Any, layers: int, heads: int, repeats: int) -> list[float]:
    """Return milliseconds from a click on a head that is not here yet to its pattern painted."""
    found = []
    for step in range(repeats):
        layer, head = (layers - 2 - 2 * step) % layers, (4 * step) % heads
        page.locator(
            f"[data-windowed-list-index='1'] .ol-head[aria-label^='layer {layer}, head {head}']"
        ).scroll_into_view_if_needed()
        found.append(page.evaluate(CLICK, [1, layer, head]))
    return found


def browser_memory(profile: Path) -> float:
    """Return what all processes of the browser on a profile hold, in MB; shared pages count once."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(profile).encode() in (process / "cmdline").read_bytes():
                found = re.search(r"^Pss:\s+(\d+)", (process / "smaps_rollup").read_text(), re.M)
                total += int(found[1])
        except (OSError, TypeError):  # it has just ended, or has no memory of its own
            continue
    return total / 1000


def measure_lab(size: tuple[int, int, int], repeats: int) -> dict[str, list[float]]:
    """Show one recording in a fresh server, kernel and browser; return the figures."""
    layers, heads, _ = size
    results: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_notebook(folder / "views.ipynb", MAKE % (size,), SHOW)
        with server(folder) as address, browser_on(folder / "profile") as browser:
            page = open_notebook(browser, address, "views.ipynb")
            empty = browser_memory(folder / "profile")
            page.evaluate(RUN_ALL)
            page.wait_for_selector(".ol-square", timeout=90_000)
            results["show() to painted, s"] = show(page, repeats)
            page.wait_for_timeout(2000)  # small pictures that are still on their way
            results["one movement of the mouse, ms"] = page.evaluate(HOVER, 1)
            results["another layer, ms"] = layer_changes(page, layers, heads, repeats)
            page.request_gc()
            used = page.evaluate("performance.memory.usedJSHeapSize") / 1e6
            results["JavaScript heap at the end, MB"] = [used]
            results["browser before the notebook was run, MB"] = [empty]
            results["browser at the end, MB"] = [browser_memory(folder / "profile")]
            results["largest size of the kernel, MB"] = [page.evaluate(PYTHON, PEAK)]
    return results


def measure_explorer(repeats: int) -> dict[str, list[float]]:
    """Return milliseconds from a click on Ablate to all views of the new run, head after head."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_notebook(folder / "views.ipynb", "import time", EXPLORE)
        with server(folder) as address, browser_on(folder / "profile") as browser:
            page = open_notebook(browser, address, "views.ipynb")
            page.evaluate(RUN_ALL)
            page.locator(".ol-iv-writer").first.wait_for(timeout=90_000)
            page.wait_for_timeout(1000)
            found = []
            for step in range(2 * repeats):
                found.append(page.evaluate(ABLATE, [1, step % 5, (3 * step) % 8]))
                page.wait_for_timeout(300)
    return {"a head ablated, all views, ms": found}


def opened(browser: Any, path: Path) -> float:
    """Return milliseconds from asking for a page to painted, in a new tab."""
    page = browser.new_page()
    page.goto(path.as_uri(), wait_until="commit")
    painted = page.evaluate(PAINTED)
    page.close()
    return painted


def measure_pages(repeats: int) -> dict[str, list[float]]:
    """Open pages of the demo recording from files, each time in a fresh browser profile."""
    import optlens

    recording = optlens.load().record(PROMPT)
    results: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pages = {"rec.to_html()": recording, "rec.show().to_html()": recording.show()}
        with browser_on(folder / "profile") as browser:
            browser.set_offline(True)
            for number, (key, source) in enumerate(pages.items()):
                path = folder / f"{number}.html"
                source.to_html(path)
                results[f"{key}: size, MB"] = [path.stat().st_size / 1e6]
                results[f"{key}: painted, ms"] = [opened(browser, path) for _ in range(repeats)]
    return results


def main() -> None:
    """Print a line for each figure, and write all samples to `benchmarks/results/widgets.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="small sizes, two repeats")
    parser.add_argument("--only", default=",".join(CASES), help="some of these")
    options = parser.parse_args()
    sizes, repeats = (SMALL, 2) if options.small else (FULL, 5)
    path = HERE / "results" / f"widgets{'-small' if options.small else ''}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in options.only.split(","):
        if name in ("pages", "explorer"):
            measure = measure_pages if name == "pages" else measure_explorer
            results[name] = measure(repeats)
        else:
            results[name] = {"layers, heads, tokens": sizes[name]} | measure_lab(
                sizes[name], repeats
            )
        print(name, *results[name].pop("layers, heads, tokens", ()))
        for figure, values in results[name].items():
            median, most = statistics.median(values), max(values)
            print(f"  {figure:40} median {median:9.2f}   largest {most:9.2f}", flush=True)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
