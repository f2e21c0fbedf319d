"""The tests of tools that want an environment of their own, each run in one: the examples of five calibration tools, and MLflow's logger.

    python benchmarks/environments.py                       all of them: environments below build/environments, then a table
    python benchmarks/environments.py --only mct aimet      some of them

CI skips these tests (its environment has none of the tools, and some pin what others refuse). Here each tool gets a fresh environment with
Reverie as it stands in this clone, and the test that CI skips: an example has to run and to keep the accuracy, MLflow has to give back
what was logged. An environment that is there is used again; its packages are installed in what it lacks. 0.6 to 3 GB each.
"""

import argparse
import os
import re
import subprocess
import sys
import time
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "environments"
RIVALS = ROOT / "benchmarks" / "rivals"
# The CPU build; a range would pull gigabytes of CUDA.
COMMON = ["torch==2.13.0", "-e", f"{ROOT}[onnx,digits,test]"]
EXAMPLE = "tests/formats/test_examples.py"


@dataclass(frozen=True)
class Tool:
    """A tool and the test that needs it.

    Args:
        package: Whose version is shown.
        packages: What pip installs beside `COMMON`.
        test: File, and the words that choose its tests.
        instead: What has to take the place of what the packages brought.
    """

    package: str
    packages: tuple[str, ...]
    test: tuple[str, str]
    instead: tuple[str, ...] = ()


TOOLS = {
    "aimet": Tool("aimet-torch", ("-r", str(RIVALS / "aimet.txt")), (EXAMPLE, "calibrate_aimet")),
    "mct": Tool("model_compression_toolkit", ("-r", str(RIVALS / "mct.txt")), (EXAMPLE, "calibrate_mct")),
    "modelopt": Tool("nvidia-modelopt", ("nvidia-modelopt[onnx]",), (EXAMPLE, "calibrate_modelopt")),
    "tflite": Tool("tensorflow", ("tensorflow",), (EXAMPLE, "calibrate_tflite")),
    # Its OpenCV wants a screen's libraries.
    "ultralytics": Tool(
        "ultralytics",
        ("ultralytics>=8.4", "torchvision==0.28.0", "openvino", "nncf"),
        (EXAMPLE, "calibrate_ultralytics"),
        ("opencv-python-headless",),
    ),
    "mlflow": Tool("mlflow", ("mlflow",), ("tests/loggers/test_loggers.py", "mlflow")),
}


def prepared(name: str, tool: Tool) -> Path:
    """The Python of the tool's environment."""
    folder = BUILD / name
    python = folder / "bin" / "python"
    # One that an earlier call left half-way is completed.
    venv.create(folder, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, *COMMON, *tool.packages], check=True, stdout=sys.stderr)
    if tool.instead:
        subprocess.run([*pip, "--force-reinstall", "--no-deps", *tool.instead], check=True, stdout=sys.stderr)
    return python


def tried(name: str, tool: Tool) -> str:
    """The row of a tool: its version, what came out of its tests, and how long they took."""
    python = prepared(name, tool)
    file, chosen = tool.test
    began = time.perf_counter()
    done = subprocess.run(
        # What the tool's own libraries warn of is not ours. Types are not checked: tools trace networks with values that stand for tensors.
        [
            python,
            "-m",
            "pytest",
            "-q",
            "-n0",
            "-rs",
            "-W",
            "ignore",
            "-o",
            "addopts=--import-mode=importlib",
            file,
            "-k",
            chosen,
        ],
        cwd=ROOT,
        env=os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - began
    (BUILD / f"{name}.txt").write_text(done.stdout + done.stderr)
    last = next(
        (line for line in reversed(done.stdout.splitlines()) if re.search(r"passed|failed|skipped|error", line)), "nothing"
    )
    shown = subprocess.run([python, "-m", "pip", "show", tool.package], capture_output=True, text=True, check=False).stdout
    version = re.search(r"^Version: (.*)$", shown, re.MULTILINE)
    outcome = re.sub(r"^=+ | in [\d.:() s]+=*$|, \d+ deselected", "", last).strip()
    return (
        f"| {tool.package} {version[1] if version else 'unknown'} | `pytest {file} -k {chosen}` | {outcome} | {seconds:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TOOLS, default=list(TOOLS))
    chosen = parser.parse_args().only
    BUILD.mkdir(parents=True, exist_ok=True)
    print("| tool | test | outcome | seconds |\n|---|---|---|---|")
    for name in chosen:
        try:
            print(tried(name, TOOLS[name]), flush=True)
        except subprocess.CalledProcessError as error:
            print(
                f"| {TOOLS[name].package} | its environment could not be made: pip ended with {error.returncode} | | |",
                flush=True,
            )


if __name__ == "__main__":
    main()
