"""How long `reverie --help` takes, as a whole process.

python benchmarks/startup.py
"""

import statistics
import subprocess
import sys
import time


def main() -> None:
    """Prints median and range of ten runs after one to warm up."""
    seconds = []
    for _ in range(11):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "reverie", "--help"], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - began)
    counted = seconds[1:]
    print(
        f"reverie --help: median {statistics.median(counted):.2f} s, {min(counted):.2f} to {max(counted):.2f} s in {len(counted)} runs"
    )


if __name__ == "__main__":
    main()
