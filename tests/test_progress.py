"""Progress bars: shown, hidden by their caller, hidden by the environment."""

import os
import subprocess
import sys

import pytest

from optlens.progress import progress_bar

DRAW = "from optlens.progress import progress_bar; bar = progress_bar(3, True); bar.update(2)"


def test_a_bar_that_is_not_shown_writes_nothing(capsys):
    with progress_bar(3, False) as bar:
        bar.update(2)
    assert bar.disable
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("disabled", "seen"), [({}, True), ({"TQDM_DISABLE": "1"}, False)])
def test_the_environment_hides_bars(disabled, seen):
    kept = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    command = [sys.executable, "-c", DRAW]
    drawn = subprocess.run(
        command, env=kept | disabled, capture_output=True, text=True, check=True
    ).stderr
    assert ("2/3" in drawn) == seen
