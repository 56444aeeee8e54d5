"""A notebook that was really executed, with views, another library's widget, and hostile outputs."""

import nbformat
from nbclient import NotebookClient

SVG = '<svg xmlns=\\"http://www.w3.org/2000/svg\\" width=\\"40\\" height=\\"30\\">'
PROSE = """\
# Heads & tails

Some *text* with $W_Q$, `code`, and a formula that cannot be drawn: $\\begin{cd} a \\end{cd}$.

$$\\frac{a}{b} = \\sum_i x_i$$

| left | right |
|---|---:|
| 1 | 2 |

- [x] done

![drawn](attachment:dot.png) ![beside](dot.png) ![elsewhere](http://127.0.0.1:9/x.png)

<script>document.title = 'run'</script><b onclick="document.title = 'run'">bold</b>
[bad](javascript:document.title='run') [good](https://example.org)"""
HOSTILE = """\
from IPython.display import HTML, SVG
HTML('''<b>kept</b><script>document.title = "run"</script><style>body { display: none }</style>
<iframe src="http://127.0.0.1:9/frame"></iframe><img src="http://127.0.0.1:9/x" onerror="document.title = 'run'">
<img src="x" onerror="document.title = 'run'"><form action="http://127.0.0.1:9/"><input></form>
<table><tr style="text-align: right;"><td style="color: red">cell</td></tr></table>''')"""
CODE = [
    """import optlens, ipywidgets, sys
rec = optlens.load().record("When Mary and John went to the store, John gave a drink to")
print("<i>printed</i>\\x1b[31m in red\\x1b[0m")
print("to stderr", file=sys.stderr)""",
    "rec.show()",
    "optlens.widgets.AttentionView(rec)",
    "ipywidgets.IntSlider(value=7)",
    "ipywidgets.VBox([optlens.widgets.LensView(rec), ipywidgets.IntSlider()])",
    "import matplotlib.pyplot as plt\nplt.plot([1, 2, 3])\nplt.show()",
    HOSTILE,
    f'SVG("{SVG}<script>document.title = 1</script><circle cx=\\"9\\" cy=\\"9\\" r=\\"9\\"/></svg>")',
    "1 / 0",
]
DOT = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJg"
    "gg=="
)


def executed() -> nbformat.NotebookNode:
    """Return the notebook after running it in a kernel of its own."""
    prose = nbformat.v4.new_markdown_cell(PROSE, attachments={"dot.png": {"image/png": DOT}})
    cells = [prose, *map(nbformat.v4.new_code_cell, CODE)]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    NotebookClient(notebook, timeout=300, allow_errors=True, coalesce_streams=True).execute()
    return notebook
