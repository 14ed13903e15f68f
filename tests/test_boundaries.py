"""The walls between the layers, each seen in a fresh process or in the sources."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def packages_loaded_by(statement: str) -> set[str]:
    """Top-level packages that ``statement`` loads in a process that has torch."""
    program = (
        "import json, sys, torch; before = set(sys.modules)\n"
        f"{statement}\nprint(json.dumps([*sys.modules.keys() - before]))"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    return {name.partition(".")[0] for name in json.loads(output)}


def test_kernels_load_no_other_layer_and_no_backend():
    loaded = packages_loaded_by("import fastsd_kernels")
    assert "fastsd_kernels" in loaded
    assert loaded.isdisjoint({"diffusers", "transformers", "triton", "cuda", "fastsd"})


def test_a_cpu_call_loads_no_gpu_backend():
    loaded = packages_loaded_by("import fastsd_kernels; fastsd_kernels.group_norm_silu(torch.ones(1, 4, 2, 2), 2)")
    assert loaded.isdisjoint({"diffusers", "triton", "cuda"})


def test_cuda_sources_include_no_torch_header():
    included = {
        header
        for source in (ROOT / "csrc" / "cuda").iterdir()
        for header in re.findall(r'#\s*include\s*[<"]([^>"]+)', source.read_text())
    }
    assert included
    assert not [header for header in included if header.startswith(("torch", "ATen", "c10"))]


def test_hugging_face_kernels_stays_importable_from_the_root():
    assert not (ROOT / "kernels" / "__init__.py").exists()
