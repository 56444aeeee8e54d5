"""pyproject.toml is the list of what optlens needs; environment.yml says the same to conda."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]

# conda-forge's names where they differ from the names on the Python package index
CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base", "zlib-ng": "python-zlib-ng"}


def split(requirement: str) -> tuple[str, str]:
    """Split `"einops>=0.7"` into its name and its version range."""
    name, versions = re.fullmatch(r"([A-Za-z0-9_.-]+)\s*(.*)", requirement).groups()
    return name, versions.replace(" ", "")


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def conda_requirements() -> dict[str, str]:
    listed = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    return dict(split(entry) for entry in listed if isinstance(entry, str) and entry != "pip")


def test_conda_environment_names_the_same_packages_and_ranges():
    wanted = project()["dependencies"] + project()["optional-dependencies"]["notebooks"]
    expected = {CONDA_NAMES.get(name, name): versions for name, versions in map(split, wanted)} | {
        "python": project()["requires-python"]
    }
    assert conda_requirements() == expected


def test_conda_environment_installs_optlens_itself():
    listed = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    assert {"pip": ["--editable ."]} in listed


def test_core_ranges_have_no_ceiling():
    """A ceiling in a library keeps its users from newer releases that would work."""
    capped = [entry for entry in project()["dependencies"] if "<" in entry or "==" in entry]
    assert capped == []


def test_version_is_the_same_everywhere():
    import optlens

    assert optlens.__version__ == project()["version"]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_another_choice_of_torch_is_installed_again(tmp_path):
    def plan(*settings: str) -> str:
        command = ["make", "--dry-run", f"VENV={tmp_path}", *settings, "demo"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return "\n".join(line for line in done.stdout.splitlines() if not line.startswith("echo"))

    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pip").touch()
    assert re.search('pip install .*"torch==', plan())
    for mark in re.findall(r"touch (\S+)", plan()):
        Path(mark).touch()
    assert "pip install" not in plan()
    assert '"torch<2.9"' in plan("TORCH=torch<2.9")
    index = "https://download.pytorch.org/whl/cpu"
    assert f'--index-url "{index}" "torch==' in plan(f"TORCH_INDEX={index}")


def test_makefile_installs_a_torch_that_the_range_admits():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    default = re.search(r"^TORCH \?= torch==(\d+)\.(\d+)", makefile, re.MULTILINE)
    lowest = re.search(r"torch>=(\d+)\.(\d+)", " ".join(project()["dependencies"]))
    assert tuple(map(int, default.groups())) >= tuple(map(int, lowest.groups()))
