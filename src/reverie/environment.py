"""What, besides recipe, network, images and seed, decides the bytes of a result: versions, the processor's instructions, threads.

A run began in one environment. Its bytes are promised for that one only, so a run that goes on in another says what changed. What
is noted and never refused is `platform`: the system's kernel and C library, which are updated under a run and round nothing.
"""

import platform
from collections.abc import Mapping
from importlib import metadata

import torch

_LIBRARIES = ("reverie", "torch", "numpy", "scipy", "pillow", "safetensors", "onnx", "onnxruntime", "openvino")
_NOTED_ONLY = {"platform"}


def environment() -> dict[str, str | int]:
    """Versions, platform, instruction set and thread count of this process."""
    found: dict[str, str | int] = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    # PyTorch has other kernels for each set of instructions, which sum in another order.
    instructions = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return found | {"platform": platform.platform(), "instructions": instructions, "threads": torch.get_num_threads()}


def changes(there: Mapping[str, str | int], here: Mapping[str, str | int]) -> list[str]:
    """What of `there`, the environment that a run began in, is otherwise `here`: such as `torch 2.13.1 instead of 2.13.0`."""
    names = [name for name in {**there, **here} if name not in _NOTED_ONLY and there.get(name) != here.get(name)]
    return [f"{name} {here.get(name, 'missing')} instead of {there.get(name, 'none')}" for name in names]
