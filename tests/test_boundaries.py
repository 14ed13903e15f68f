"""The walls between the layers, seen in a fresh process and in the sources."""

import json
import re
import sys
from pathlib import Path

import pytest

from tests.processes import python

ROOT = Path(__file__).parents[1]
# what each of these loads, one after the other
STATEMENTS = {
    "kernels": "import fastsd_kernels",
    "fastsd": "import fastsd",
    "adapters": "import fastsd.adapters",
    "a call": "fastsd_kernels.group_norm_silu(torch.ones(1, 4, 2, 2), 2)",
}
_PROGRAM = """
import json, sys, torch

def packages_loaded_by(statement):
    before = set(sys.modules)
    exec(statement, globals())
    return sorted({name.partition(".")[0] for name in sys.modules.keys() - before})

loaded = {name: packages_loaded_by(statement) for name, statement in json.loads(sys.argv[1]).items()}
assert not torch.cuda.is_initialized()
assert not torch.nn.modules.module._has_any_global_hook()
assert [rule.name for rule in fastsd.registered_rules()][0] == "resnet_block"

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("diffusers", "transformers", "triton", "cuda"):
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Refuse())
try:
    fastsd.patch(torch.nn.Sequential(torch.nn.Linear(2, 2)))
except ValueError as error:
    assert "holds none" in str(error)
else:
    raise SystemExit("patched nothing without a word")
assert len(fastsd.report(torch.nn.Sequential(torch.nn.Linear(2, 2))).entries) == 1
print(json.dumps(loaded))
"""


@pytest.fixture(scope="module")
def loaded():
    """The packages that each statement loads, in a process that has torch; what needs no diffusers works without."""
    return {
        name: set(found) for name, found in json.loads(python("-c", _PROGRAM, json.dumps(STATEMENTS)).stdout).items()
    }


def test_kernels_load_no_other_layer_and_no_backend(loaded):
    assert "fastsd_kernels" in loaded["kernels"]
    assert loaded["kernels"] <= {"fastsd_kernels"} | sys.stdlib_module_names


def test_imports_are_light(loaded):
    assert "fastsd" in loaded["fastsd"]
    assert loaded["fastsd"] | loaded["adapters"] <= {"fastsd", "fastsd_kernels"} | sys.stdlib_module_names


def test_a_cpu_call_loads_no_gpu_backend(loaded):
    assert loaded["a call"].isdisjoint({"diffusers", "transformers", "triton", "cuda"})


def test_cuda_sources_include_no_torch_header():
    included = {
        header
        for source in (ROOT / "csrc" / "cuda").glob("*.cu*")
        for header in re.findall(r'#\s*include\s*[<"]([^>"]+)', source.read_text())
    }
    assert included
    assert not [header for header in included if header.startswith(("torch", "ATen", "c10"))]


def test_hugging_face_kernels_stays_importable_from_the_root():
    assert not (ROOT / "kernels" / "__init__.py").exists()
