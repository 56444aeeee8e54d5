"""The command `optlens export NOTEBOOK`: an executed notebook as one HTML file, its views alive."""

import argparse
import sys
from typing import Any

from optlens.report.markup import visible


def add_command(commands: Any) -> None:
    """Add the command to those of `optlens`."""
    command = commands.add_parser(
        "export",
        help="write an executed notebook as one page with living views",
        description="Write a notebook that was executed and saved with its widget state as one "
        "HTML file: text, code, outputs, and every view of optlens as it works in the notebook, "
        "without a kernel and without a network. Nothing of the notebook is run.",
    )
    command.set_defaults(run=export)
    command.add_argument("notebook", metavar="NOTEBOOK", help="the .ipynb file")
    command.add_argument(
        "-o", "--output", metavar="FILE", help="the page (default: beside it, with .html)"
    )


def export(options: argparse.Namespace) -> int:
    """Write the page; its path goes to standard output, what is to be known to standard error."""
    from optlens.widgets.export import export_notebook

    made = export_notebook(options.notebook, options.output)
    for note in made.notes:
        print(f"optlens: {visible(note)}", file=sys.stderr)
    print(made)
    return 0
