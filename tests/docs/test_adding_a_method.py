"""The page on adding a method, to the letter: in a copy of the sources, its files are written and its commands run."""

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/adding_a_method.md"
PARTS = re.compile(r"<!-- (?:file: (?P<file>[\w./]+)|run) -->\n```\w+\n(?P<text>.*?)\n```", re.DOTALL)


@pytest.mark.slow
def test_the_method_of_the_page_works(tmp_path):
    for module, extra in (("sklearn", "digits"), ("onnxscript", "onnx"), ("ruff", "dev")):
        pytest.importorskip(module, reason=f"{module} is not installed (extra {extra!r})")
    copy = tmp_path / "copy"
    for name in ("src", "tests", "docs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "mkdocs.yml"):
        shutil.copy(ROOT / name, copy)
    (tmp_path / "bin").mkdir()
    for name, words in {"reverie": "-m reverie", "python": "", "ruff": "-m ruff"}.items():
        command = tmp_path / "bin" / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        command.chmod(command.stat().st_mode | stat.S_IXUSR)
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(copy / "src"),
        "OMP_NUM_THREADS": "1",
        "PYTEST_ADDOPTS": "",
    }
    said = []
    for part in PARTS.finditer(PAGE.read_text()):
        if part["file"]:
            assert not (copy / part["file"]).exists()
            (copy / part["file"]).write_text(part["text"] + "\n")
            continue
        words = ["bash", "-euo", "pipefail", "-c", part["text"]]
        done = subprocess.run(words, cwd=copy, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{part['text']}\n{done.stdout}{done.stderr}"
        said.append(done.stdout)
    _, tested, used = said
    # The page's own test, conformance for the new name, and the layout: none of them was told of it.
    assert int(re.search(r"(\d+) passed", tested)[1]) >= 9 and "failed" not in tested
    assert re.search(r"^sigma\s+width=4.0", used, re.MULTILINE)
    assert 'method = "sigma"\nwidth = 5.0' in (copy / "runs/sigma/recipe.toml").read_text()
