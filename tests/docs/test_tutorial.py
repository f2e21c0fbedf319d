"""The tutorial, to the letter: its blocks are run in their order, in an empty folder, and the page's promises hold."""

import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/tutorial.md"


def blocks(page: Path, mark: str) -> list[tuple[str, str]]:
    """Language and text of the blocks below `<!-- mark -->`."""
    return re.findall(rf"<!-- {mark} -->\n```(\w+)\n(.*?)\n```", page.read_text(), re.DOTALL)


def test_the_tutorial_installs_what_the_readme_installs():
    ((_, install),) = blocks(PAGE, "install")
    assert install in (ROOT / "README.md").read_text()


def test_every_block_of_the_tutorial_is_run_or_an_installation():
    fences = re.findall(r"^```\w+$", PAGE.read_text(), re.MULTILINE)
    assert len(fences) == len(blocks(PAGE, "run")) + len(blocks(PAGE, "install")) + len(blocks(PAGE, "activate"))


@pytest.mark.slow
def test_the_tutorial_ends_with_a_four_bit_file_that_reads_a_digit(tmp_path):
    for module, extra in (("sklearn", "digits"), ("onnxruntime", "onnx"), ("onnxscript", "onnx")):
        pytest.importorskip(module, reason=f"{module} is not installed (extra {extra!r})")
    command = tmp_path / "bin" / "reverie"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m reverie "$@"\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    work = tmp_path / "work"
    work.mkdir()
    said = []
    for language, block in blocks(PAGE, "run"):
        interpreter = {"sh": ["bash", "-euo", "pipefail"], "python": [sys.executable, "-W", "error"]}[language]
        # The Python block has no Reverie to import, and the rest finds it where this test does.
        source = "" if language == "python" else str(ROOT / "src")
        environment = {
            "PATH": f"{command.parent}:/usr/bin:/bin",
            "PYTHONPATH": source,
            "OMP_NUM_THREADS": "1",
            "HOME": str(tmp_path),
        }
        done = subprocess.run([*interpreter, "-c", block], cwd=work, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
        said.append(done.stdout)
        assert "import reverie" not in block
    inspected, quantized, listed, verified, answered = said
    assert re.search(r"batch-norm matching\s+yes", inspected)
    right = re.search(r"exported \(ONNX Runtime\)\s+([\d.]+) %", quantized)
    assert right is not None and float(right[1]) > 98
    # Every file that the page's table names is there.
    named = re.findall(r"^\| (`[\w./]+`.*?) \|", PAGE.read_text(), re.MULTILINE)
    files = re.findall(r"`([\w./]+)`", " ".join(named))
    assert len(files) >= 7
    for name in files:
        assert (work / "runs/digits-w4a8" / name).exists(), name
        assert name.partition("/")[0] in listed
    assert re.search(r"network\.onnx\s+onnxruntime .* holds", verified)
    assert answered == "the file says 0, the label is 0\n"
