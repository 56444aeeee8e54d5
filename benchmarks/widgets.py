"""How long the views take in a real JupyterLab, and what they hold of the browser's memory.

    python benchmarks/widgets.py                     # the sizes below; needs 6 GB of main memory
    python benchmarks/widgets.py --small             # a rehearsal on a small machine

Patterns are made up, with the shapes of real ones: what is measured is the way from a recording to
the screen. Times are medians of several runs in one browser; "painted" is the first frame in which
the large pattern is drawn. Needs JupyterLab, playwright and Chromium, as the tests do.
"""

from __future__ import annotations

import argparse
import json
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

MAKE = """\
import time, torch, optlens
from optlens.recording import Recording

def made_up(layers, heads, pos):
    config = dict(num_hidden_layers=layers, num_attention_heads=heads, vocab_size=100, hidden_size=64)
    pattern = torch.rand(1, layers, heads, pos, pos).tril_().pow_(8)
    pattern /= pattern.sum(-1, keepdim=True)
    facts = dict(layers=list(range(layers)), heads=list(range(heads)), positions=list(range(pos)),
        columns=[list(range(pos))], is_batch=False, what=["attention"], prompts=["made up"],
        str_tokens=[["x"] * pos], labels={}, config=config)
    tensors = {"tokens": torch.arange(pos)[None] %% 97, "mask": torch.ones(1, pos).bool(),
        "attention": pattern}
    return Recording(tensors, facts)

torch.manual_seed(0)
SHORT, LONG = made_up(*%(short)s), made_up(*%(long)s)
"""
SHOW = "start = time.time()\nview = %s.show()\nview"

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
PYTHON = """async () => { const panel = window.jupyterapp.shell.currentWidget;
    const future = panel.sessionContext.session.kernel.requestExecute({ code: 'print(start)' });
    let said = ''; future.onIOPub = (message) => { said += message.content.text ?? ''; };
    await future.done; return Number(said); }"""


def show(page: Any, number: int, repeats: int) -> list[float]:
    """Return seconds from `rec.show()` to painted, for several runs of a cell."""
    found = []
    for _ in range(repeats):
        page.evaluate(
            "(number) => window.jupyterapp.shell.currentWidget.content.widgets[number].model.clearExecution()",
            number,
        )
        page.evaluate(WATCH, number)
        page.evaluate(RUN, number)
        page.wait_for_function("window.painted", timeout=120_000)
        found.append(page.evaluate("window.painted") / 1000 - page.evaluate(PYTHON))
    return found


def layer_changes(page: Any, number: int, layers: int, heads: int, repeats: int) -> list[float]:
    """Return milliseconds from a click on a head that is not here yet to its pattern painted."""
    found = []
    for step in range(repeats):
        layer, head = (layers - 2 - 2 * step) % layers, (4 * step) % heads
        page.locator(
            f"[data-windowed-list-index='{number}'] .ol-head[aria-label^='layer {layer}, head {head}']"
        ).scroll_into_view_if_needed()
        found.append(page.evaluate(CLICK, [number, layer, head]))
    return found


def measure(sizes: dict[str, tuple[int, int, int]], repeats: int) -> dict[str, Any]:
    """Run everything once in a fresh server and browser; return the figures."""
    results: dict[str, Any] = {"sizes": sizes}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cells = (MAKE % sizes, SHOW % "SHORT", SHOW % "LONG")
        write_notebook(folder / "views.ipynb", *cells)
        with server(folder) as address, browser_on(folder / "profile") as browser:
            page = open_notebook(browser, address, "views.ipynb")
            page.evaluate(RUN_ALL)
            page.wait_for_function(
                "document.querySelectorAll('.ol-square').length > 0", timeout=300_000
            )
            for key, number in (("short", 1), ("long", 2)):
                layers, heads, _ = sizes[key]
                results[f"{key}: show() to painted, s"] = show(page, number, repeats)
                page.wait_for_timeout(2000)  # small pictures that are still on their way
                results[f"{key}: one movement of the mouse, ms"] = page.evaluate(HOVER, number)
                results[f"{key}: another layer, ms"] = layer_changes(
                    page, number, layers, heads, repeats
                )
            page.request_gc()
            used = page.evaluate("performance.memory.usedJSHeapSize") / 1e6
            results["browser: JavaScript heap at the end, MB"] = [used]
    return results


def main() -> None:
    """Print a line for each figure, and write all samples to `benchmarks/results/widgets.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="small sizes, two repeats")
    options = parser.parse_args()
    results = measure(SMALL if options.small else FULL, 2 if options.small else 5)
    print("layers, heads, tokens:", results["sizes"])
    for name, values in results.items():
        if name != "sizes":
            print(f"{name:44} median {statistics.median(values):9.2f}   largest {max(values):9.2f}")
    (HERE / "results").mkdir(exist_ok=True)
    path = HERE / "results" / "widgets.json"
    path.write_text(json.dumps(results, indent=1))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
