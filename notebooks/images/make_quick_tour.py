"""Draw the pictures of the README again, from the page that `optlens record` writes.

    python notebooks/images/make_quick_tour.py

Records the README's prompt with the embedded model, opens the page in Chromium in the light and in
the dark theme, and photographs it: `quick_tour.png` and `quick_tour-dark.png` beside this script.
Needs playwright and a Chromium on the path.
"""

import io
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # draw with the optlens of this folder

import optlens  # noqa: E402

PROMPT = "When Mary and John went to the store, John gave a drink to"
WIDTH = 1180
# The README shows what there is to see; the words that explain it stay on the page.
ARRANGEMENT = """
nav, #tokens, #next, #residual, #provenance, footer, #attention details, .quiet, .choose { display: none }
header { padding-top: 2rem; padding-bottom: 0 }
main section { margin-top: 1.75rem }
#attention { padding-bottom: 2rem }
"""


def main() -> None:
    """Write both pictures."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("No chromium on the path; on Debian: sudo apt-get install --yes chromium")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        optlens.load().record(PROMPT).to_html(page)
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            for theme, name in (("light", "quick_tour.png"), ("dark", "quick_tour-dark.png")):
                photograph(browser, page, theme, HERE / name)
            browser.close()


def photograph(browser, page: Path, theme: str, target: Path) -> None:
    """Write one picture of the page in one theme."""
    tab = browser.new_page(
        viewport={"width": WIDTH, "height": 800}, color_scheme=theme, device_scale_factor=1.5
    )
    tab.goto(page.as_uri())
    tab.add_style_tag(content=ARRANGEMENT)
    shot = Image.open(io.BytesIO(tab.screenshot(full_page=True)))
    tab.close()
    # 256 colours are enough for a flat page, if the rare ones among them are kept too.
    small = shot.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1)
    small.save(target, optimize=True)
    print(f"{target.name}: {target.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
