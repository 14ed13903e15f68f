"""AddressSanitizer and UBSan over the CPU extension and over CUDA kernels on the host; see :mod:`.sanitized`."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from tests.artefacts import ROOT, artefact, digest
from tests.contract.sanitized import PLANTED
from tests.harness import host

FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1"


def sanitized_extension() -> Path:
    sources = sorted(path for path in [*(ROOT / "csrc/cpu").iterdir(), ROOT / "setup.py"] if path.is_file())
    compiler = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    name = digest(compiler, sys.version, torch.__version__, FLAGS, *((p.name, p.read_text()) for p in sources))
    return artefact("cpu", f"{name}.so", _build)


def _build(to: Path) -> None:
    folders = [f"--build-lib={to.parent}/lib", f"--build-temp={to.parent}/objects"]
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", *folders],
        cwd=ROOT,
        env=os.environ | {"FASTSD_EXTRA_CFLAGS": FLAGS, "MAX_JOBS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    built = list((to.parent / "lib/fastsd_kernels").glob("_cpu*.so"))
    assert built, done.stdout + done.stderr  # setup.py goes on without the extension
    shutil.move(built[0], to)


def run(request, *arguments) -> str:
    environment = host.sanitizer_environment()
    standard = subprocess.run(["g++", "-print-file-name=libstdc++.so"], capture_output=True, text=True, check=True)
    environment["LD_PRELOAD"] += f":{standard.stdout.strip()}"
    full = ["--full"] if request.config.getoption("--full") else []
    done = subprocess.run(
        [sys.executable, "-m", "tests.contract.sanitized", *map(str, arguments), *full],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


def cases_that_were_right(output: str) -> int:
    return int(re.search(r"^right: (\d+)$", output, re.MULTILINE)[1])


def test_cpu_extension(request):
    output = run(request, "cpu", sanitized_extension())
    assert cases_that_were_right(output) > 500
    for mistake in PLANTED:
        assert f"{mistake} caught" in output
    assert output.count("ERROR: AddressSanitizer: heap-buffer-overflow") == len(PLANTED)


def test_cuda_kernels_on_the_host(request):
    assert cases_that_were_right(run(request, "host")) > 50
