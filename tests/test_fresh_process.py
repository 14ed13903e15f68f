"""What holds in another process: files that need no fastsd, files that need it, and what was done before its import."""

import json
import pickle

import diffusers
import pytest
import torch

import fastsd
from tests.compress.models import PLANS, trained
from tests.compress.models import build as build_sd
from tests.compress.models import call as call_sd
from tests.fixtures import one_thread  # noqa: F401
from tests.patching import models
from tests.processes import python

_WITHOUT_FASTSD = """
import json, pickle, sys
import diffusers, torch

folder, found = sys.argv[1], {}
try:
    diffusers.DiffusionPipeline.from_pretrained(folder + "/pipeline", local_files_only=True)
except Exception as error:
    found["pipeline"] = str(error)

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("fastsd", "fastsd_kernels"):
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Refuse())
with open(folder + "/patched", "rb") as file:
    model = pickle.load(file)
inputs, expected = torch.load(folder + "/expected")
with torch.no_grad():
    found["patched"] = torch.equal(model(**inputs).sample, expected)
whole = torch.load(folder + "/whole", weights_only=False)
read = diffusers.UNet2DConditionModel.from_pretrained(folder + "/stock", local_files_only=True)
found["stock"] = all(map(torch.equal, whole.state_dict().values(), read.state_dict().values()))
found["loaded"] = [name for name in sys.modules if name.split(".")[0].startswith("fastsd")]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def without_fastsd(tmp_path_factory):
    """What a process finds that cannot import fastsd, and its warnings."""
    folder = tmp_path_factory.mktemp("files")
    with torch.no_grad():
        model = models.build()
        inputs = {
            "sample": torch.randn(2, 4, 16, 16),
            "timestep": torch.tensor(5),
            "encoder_hidden_states": torch.randn(2, 7, 8),
        }
        torch.save((inputs, model(**inputs).sample), folder / "expected")
    (folder / "patched").write_bytes(pickle.dumps(fastsd.patch(model)))
    small = fastsd.compress(build_sd(), "bk-sdm-small")
    small.save_pretrained(folder / "stock")
    torch.save(small, folder / "whole")
    mixing = fastsd.compress(build_sd(), "a-sdm")
    diffusers.DDIMPipeline(unet=mixing, scheduler=diffusers.DDIMScheduler()).save_pretrained(folder / "pipeline")
    done = python("-c", _WITHOUT_FASTSD, folder)
    return json.loads(done.stdout) | {"warnings": done.stderr}


@pytest.mark.parametrize("which", ["patched", "stock"])
def test_files_of_stock_models_need_no_fastsd(without_fastsd, which):
    """Row 6 of the compatibility matrix: a pickle of a patched model; and what a compression leaves stock."""
    assert without_fastsd[which] is True
    assert without_fastsd["loaded"] == []
    assert "not expected" not in without_fastsd["warnings"]  # what diffusers says of entries that it does not know


def test_a_pipeline_is_not_loaded_without_this_library(without_fastsd):
    """diffusers names what has to be imported."""
    assert "import fastsd.compress.model" in without_fastsd["pipeline"]


_WITH_FASTSD = """
import json, os, sys, warnings
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

right, calls, found = AttnProcessor2_0.__call__, [], {}
def own(self, *args, **kwargs):
    calls.append(1)
    return right(self, *args, **kwargs)
AttnProcessor2_0.__call__ = own

import fastsd
from tests.compress.models import call as call_sd
from tests.patching.models import assert_as_stock, build, call

with torch.no_grad():
    model = build()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fastsd.patch(model, gri=fastsd.GRI(4, 2))
    call(model)
    found["overwritten"] = [len(calls), len(model.attn_processors), *{str(w.message) for w in caught}]
    AttnProcessor2_0.__call__ = right

    model = build()
    stock = call(model)
    fastsd.patch(model)
    child = os.fork()
    assert_as_stock(call(model), stock)
    fastsd.unpatch(model)
    assert torch.equal(call(model), stock)
    if child == 0:
        os._exit(0)
    found["forked"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    for folder in sys.argv[1:]:
        model = fastsd.load(folder)
        torch.save((type(model).__name__, call_sd(model)), folder + "/result.pt")
print(json.dumps(found))
"""
SAVED = ("bk-sdm-tiny", "a-sdm", "bypassed", "experts")


@pytest.fixture(scope="module")
def with_fastsd(tmp_path_factory):
    """What another process finds, and the compressed models that it has loaded, beside what was saved."""
    folder, expected = tmp_path_factory.mktemp("saved"), {}
    for name in SAVED:
        small = trained(fastsd.compress(build_sd(), PLANS.get(name, name)))
        small.save_pretrained(folder / name)
        expected[name] = type(small).__name__, call_sd(small)
    found = json.loads(python("-c", _WITH_FASTSD, *(folder / name for name in SAVED)).stdout)
    loaded = {name: torch.load(folder / name / "result.pt", weights_only=True) for name in SAVED}
    return found, {name: (expected[name], loaded[name]) for name in SAVED}


def test_a_processor_that_was_overwritten_before_the_import(with_fastsd):
    calls, processors, warning = with_fastsd[0]["overwritten"]
    assert calls == processors
    assert "AttnProcessor2_0" in warning


def test_row_14_fork(with_fastsd):
    """A process and its child go on with the model that was patched before."""
    assert with_fastsd[0]["forked"] == 0


@pytest.mark.parametrize("name", SAVED)
def test_saved_and_loaded(with_fastsd, name):
    (class_name, expected), (loaded_class, loaded) = with_fastsd[1][name]
    assert loaded_class == class_name
    assert torch.equal(loaded, expected)
