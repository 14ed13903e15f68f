"""What is compiled for a gate, and everything that its machine code depends on."""

import functools
import pickle
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from fastsd_kernels import cuda_runtime
from tests.artefacts import artefact, digest, preprocessed


class Compiled(NamedTuple):
    cubin: bytes
    dynamic_shared_bytes: int = 0


class Unit:
    """One variant of one source; its cubin may have several kernels."""

    backend: ClassVar[str]

    def sees(self, target: str) -> tuple[Any, ...]:
        """All that a cubin for ``target`` is made from: values whose ``repr`` says all of them, on every machine."""
        raise NotImplementedError

    def compile(self, target: str) -> Compiled:
        """Compiled anew."""
        raise NotImplementedError

    def digest(self, target: str) -> str:
        return digest(self.backend, target, *self.sees(target))

    def compiled(self, target: str) -> Compiled:
        """Compiled once, and kept between runs."""

        def make(path: Path) -> None:
            path.write_bytes(pickle.dumps(self.compile(target)))

        return pickle.loads(artefact("cubin", f"{self.digest(target)}.pickle", make).read_bytes())


@dataclass(frozen=True)
class Cuda(Unit):
    """A source of ``csrc/cuda``, and macros as :func:`fastsd_kernels.cuda_runtime.compile_cubin` takes them."""

    backend: ClassVar[str] = "cuda"
    source: str
    defines: tuple[str, ...] = ()

    def sees(self, target: str) -> tuple[Any, ...]:
        options = cuda_runtime._options(self.source, target, self.defines).as_bytes("nvrtc")
        # of the folders it is the headers that count, which the preprocessed source has in it
        kept = sorted(option for option in options if not option.startswith(b"--include-path"))
        return nvrtc_version(), kept, _preprocessed(self.source, self.defines, target, cuda_runtime._source_folder())

    def compile(self, target: str) -> Compiled:
        return Compiled(cuda_runtime.compile_cubin(self.source, target, self.defines))


def nvrtc_version() -> str:
    return "NVRTC {}.{}".format(*import_module("cuda.bindings.nvrtc").nvrtcVersion()[1:])


@functools.cache
def _preprocessed(source: str, defines: tuple[str, ...], target: str, _folder: Path) -> str:
    """The device branch of ``source`` as a digest: no comments, no paths, and nothing of the host's own compiler."""
    architecture = int("".join(filter(str.isdigit, target))) * 10
    flags = ["-std=c++17", "-undef", "-nostdinc", "-D__CUDACC__", "-D__CUDACC_RTC__", f"-D__CUDA_ARCH__={architecture}"]
    flags += (f"-D{define}" for define in defines)
    flags += (f"-I{folder}" for folder in cuda_runtime._include_path())
    # compilers break lines differently where comments were
    return digest(preprocessed(f'#include "{source}"', flags).split())
