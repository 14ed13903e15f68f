"""``import fastsd`` in a fresh process: light, and without effects."""

import subprocess
import sys

_IMPORT = """
import sys
import torch
before = set(sys.modules)
import fastsd
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert new <= {"fastsd", "fastsd_kernels"} | sys.stdlib_module_names, new
assert not torch.cuda.is_initialized()
assert not torch.nn.modules.module._has_any_global_hook()
assert [rule.name for rule in fastsd.registered_rules()][0] == "resnet_block"
"""

_WITHOUT_DIFFUSERS = """
import sys
import torch
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("diffusers", "transformers", "triton", "cuda"):
            raise ImportError(f"{name} is not installed")
sys.meta_path.insert(0, Refuse())
import fastsd
try:
    fastsd.patch(torch.nn.Sequential(torch.nn.Linear(2, 2)))
except ValueError as error:
    assert "holds none" in str(error)
else:
    raise SystemExit("patched nothing without a word")
assert len(fastsd.report(torch.nn.Sequential(torch.nn.Linear(2, 2))).entries) == 1
"""


def run(code):
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_import_is_light():
    run(_IMPORT)


def test_without_diffusers():
    run(_WITHOUT_DIFFUSERS)
