"""A real JupyterLab with a real browser on it, as the tests and the benchmark of the widgets use it.

Every folder that Jupyter would read or write is a fresh one, so no setting of the user is touched or
matters. `expose_app_in_browser` gives the page `jupyterapp`, by which notebooks are run without
clicking through menus that change with each release.
"""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import browser_pages
import nbformat

ROOT = Path(__file__).resolve().parents[2]
MISSING = [*browser_pages.MISSING, *([] if find_spec("jupyterlab") else ["jupyterlab"])]

RUN_ALL = """async () => { const app = window.jupyterapp, panel = app.shell.currentWidget;
    await panel.context.ready; await panel.sessionContext.ready;
    await app.commands.execute('notebook:run-all-cells'); }"""
# What Python prints for an expression, asked while no cell runs.
EVALUATE = """async (code) => { const panel = window.jupyterapp.shell.currentWidget;
    const future = panel.sessionContext.session.kernel.requestExecute({ code, silent: false });
    let said = ''; future.onIOPub = (message) => {
        if (message.content.text) said += message.content.text;
        if (message.content.evalue) said += message.content.ename + ': ' + message.content.evalue; };
    await future.done; return said.trim(); }"""


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """Run JupyterLab on a folder; gives its address with a token to fill in by `address.format(path)`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(8)
    own = folder / ".jupyter"
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    names += ("JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    settings = own / "JUPYTERLAB_SETTINGS_DIR"
    # A question about news would lie over what is to be seen; widgets are not saved by default.
    _set(settings / "@jupyterlab/apputils-extension/notification", fetchNews="false")
    _set(settings / "@jupyter-widgets/jupyterlab-manager/plugin", saveState=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {name: str(own / name) for name in names} | {"PYTHONPATH": path}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--port={port}", "--ip=127.0.0.1", f"--IdentityProvider.token={token}"]
    command += ["--LabApp.expose_app_in_browser=True", f"--ServerApp.root_dir={folder}"]
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with (own / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            _wait(f"http://127.0.0.1:{port}/api/status?token={token}", process, own / "log")
            yield f"http://127.0.0.1:{port}/lab/tree/{{}}?token={token}&reset"
        finally:
            process.terminate()
            process.wait(30)


def _set(plugin: Path, **values: Any) -> None:
    plugin.parent.mkdir(parents=True)
    plugin.with_suffix(".jupyterlab-settings").write_text(json.dumps(values))


def _wait(url: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(300):
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(f"JupyterLab did not start: {log.read_text()[-2000:]}")


def write_notebook(path: Path, *cells: str) -> None:
    """Write a notebook of code cells."""
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source) for source in cells],
        metadata={"kernelspec": {"display_name": "P", "language": "python", "name": "python3"}},
    )
    nbformat.write(notebook, path)


@contextmanager
def browser_on(folder: Path) -> Iterator[Any]:
    """Open a browser of its own, with a fresh profile in a folder."""
    from playwright.sync_api import sync_playwright

    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    quiet += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_playwright() as play:
        context = play.chromium.launch_persistent_context(
            str(folder), executable_path=browser_pages.CHROMIUM, headless=True, args=quiet,
            viewport={"width": 1500, "height": 1000},
        )  # fmt: skip
        yield context
        context.close()


def open_notebook(context: Any, address: str, name: str) -> Any:
    """Open a notebook in a new page that collects complaints and addresses asked for."""
    page = context.new_page()
    page.complaints, page.asked = [], []
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(address.format(name))
    page.wait_for_function("window.jupyterapp && window.jupyterapp.shell.currentWidget?.context")
    return page
