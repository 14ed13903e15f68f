"""Compressed models in folders: bitwise there and back, and nothing half-loaded."""

import json
import shutil
import subprocess
import sys

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import fastsd
from fastsd import models
from fastsd.compress import RECIPES
from fastsd.compress.storage import PLAN_FILE, WEIGHTS_FILE
from tests.compress.models import PLANS, SMALL_SD, build, call, config_of, for_recipe, trained

_LOAD = """
import sys, torch
import fastsd
from tests.compress.models import call
torch.set_num_threads(int(sys.argv[1]))  # another number rounds otherwise
for folder in sys.argv[2:]:
    model = fastsd.load(folder)
    torch.save((type(model).__name__, call(model)), folder + "/result.pt")
"""


def test_every_recipe_and_plan_in_a_fresh_process(tmp_path):
    expected = {}
    for name in (*RECIPES, *PLANS):
        small = trained(fastsd.compress(for_recipe(name), PLANS.get(name, name)))
        small.save_pretrained(tmp_path / name)
        expected[name] = type(small).__name__, call(small)
    folders = (str(tmp_path / name) for name in expected)
    subprocess.run([sys.executable, "-c", _LOAD, str(torch.get_num_threads()), *folders], check=True)
    for name, (class_name, result) in expected.items():
        loaded_class, loaded = torch.load(tmp_path / name / "result.pt", weights_only=True)
        assert loaded_class == class_name, name
        assert torch.equal(loaded, result), name


@pytest.mark.parametrize("name", ["bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny", "ssd-1b", "vega"])
def test_what_stock_can_say_is_stock(tmp_path, name):
    small = fastsd.compress(for_recipe(name), name)
    small.save_pretrained(tmp_path)
    assert not (tmp_path / PLAN_FILE).exists()
    stock = diffusers.UNet2DConditionModel.from_pretrained(tmp_path, local_files_only=True)
    assert type(stock) is diffusers.UNet2DConditionModel
    assert torch.equal(call(stock.eval()), call(small))


@pytest.mark.parametrize("name", ["a-sdm", "bypassed", "transformer", "experts"])
def test_stock_loading_of_what_it_cannot_say_fails(tmp_path, name):
    fastsd.compress(build(), PLANS.get(name, name)).save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"config.json"):
        diffusers.UNet2DConditionModel.from_pretrained(tmp_path, local_files_only=True)


@pytest.fixture
def folder(tmp_path):
    fastsd.compress(build(), "a-sdm").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_dtype_and_class_method(folder):
    half = fastsd.load(folder, dtype=torch.float16)
    assert half.dtype == torch.float16
    assert half.compression.plan.name == "a-sdm"
    same = fastsd.CompressedUNet2DConditionModel.from_pretrained(folder)
    assert torch.equal(call(same), call(fastsd.load(folder)))
    assert not same.training


def test_saving_again_takes_the_place_of_what_was_there(folder):
    other = trained(fastsd.load(folder))
    other.save_pretrained(folder)
    assert torch.equal(call(fastsd.load(folder)), call(other))
    assert sorted(path.name for path in folder.iterdir()) == sorted([PLAN_FILE, WEIGHTS_FILE])


def test_saving_otherwise_is_refused(folder, tmp_path):
    small = fastsd.load(folder)
    for given in ({"safe_serialization": False}, {"variant": "fp16"}, {"push_to_hub": True}):
        with pytest.raises(ValueError, match="safetensors without a variant"):
            small.save_pretrained(tmp_path / "other", **given)
    small.conv_in = torch.nn.Conv2d(5, 8, 3, padding=1)
    with pytest.raises(fastsd.CheckpointError, match=r"conv_in.weight should be \(8, 4, 3, 3\), and is \(8, 5, 3, 3\)"):
        small.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other" / PLAN_FILE).exists()


def edited(folder, **changes):
    path = folder / PLAN_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def signed(folder, change):
    """A change by somebody who knows how files are signed."""
    from fastsd.compress.storage import _digest

    path = folder / PLAN_FILE
    data = json.loads(path.read_text())
    del data["sha256"]
    change(data)
    path.write_text(json.dumps(data | {"sha256": _digest(data)}))


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def lacks_a_tensor(folder):
    state = load_file(folder / WEIGHTS_FILE)
    del state["conv_in.bias"]
    save_file(state, folder / WEIGHTS_FILE)


DAMAGES = {
    "no_weights": (lambda f: (f / WEIGHTS_FILE).unlink(), "no such file"),
    "no_plan": (lambda f: (f / PLAN_FILE).unlink(), "expected a folder with fastsd_plan.json or config.json"),
    "cut_plan": (lambda f: cut(f / PLAN_FILE, 500), "expected a plan as JSON"),
    "empty_plan": (lambda f: cut(f / PLAN_FILE, 0), "expected a plan as JSON"),
    "binary_plan": (lambda f: (f / PLAN_FILE).write_bytes(b"\xff\xfe\x00"), "expected a plan as JSON"),
    "deep_plan": (lambda f: (f / PLAN_FILE).write_text("[" * 200_000), "expected a plan as JSON"),
    "huge_plan": (lambda f: (f / PLAN_FILE).write_text(" " * (2 << 20)), "at most 1048576 bytes"),
    "list": (lambda f: (f / PLAN_FILE).write_text("[]"), "expected the format .* got 'list'"),
    "other_format": (lambda f: edited(f, format="version 9"), "got 'version 9'"),
    "more_keys": (lambda f: edited(f, more=1), "expected the keys format"),
    "edited_plan": (lambda f: edited(f, plan={}), "it has changed since"),
    "cut_weights": (lambda f: cut(f / WEIGHTS_FILE, 5000), "expected a safetensors file"),
    "empty_weights": (lambda f: cut(f / WEIGHTS_FILE, 0), "expected a safetensors file"),
    "flipped_bit": (lambda f: flip(f / WEIGHTS_FILE, -1000), "it has changed since"),
    "lacks_a_tensor": (lacks_a_tensor, r"conv_in.bias should be \(8,\), and is absent"),
    "signed_no_plan": (
        lambda f: signed(f, lambda d: d.update(plan=3)),
        "plan: expected an object with the keys removed",
    ),
    "signed_path": (
        lambda f: signed(f, lambda d: d["plan"]["removed"].append("../x")),
        "expected paths such as.*'../x'",
    ),
    "signed_gri": (lambda f: signed(f, lambda d: d["plan"]["gri"].update(window=-1)), "gri: window: expected"),
    "signed_argument": (lambda f: signed(f, lambda d: d["base_config"].update(code="x")), "base_config: .*got code"),
    "signed_layers": (
        lambda f: signed(f, lambda d: d["base_config"].update(layers_per_block=10**6)),
        "got layers_per_block=1000000",
    ),
    "signed_width": (lambda f: signed(f, lambda d: d["base_config"].update(in_channels=2**40)), "got in_channels="),
    "signed_other_model": (
        lambda f: signed(f, lambda d: d["base_config"].update(cross_attention_dim=16)),
        r"should be \(8, 16\), and is \(8, 8\)",
    ),
    "signed_nonsense": (
        lambda f: signed(f, lambda d: d["base_config"].update(down_block_types=["Nothing"] * 4)),
        "expected a configuration and a plan that suit",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders(folder, damage):
    spoil, says = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(fastsd.CheckpointError, match=says):
        fastsd.load(folder)


def test_a_plan_beside_the_weights_of_another_model(folder, tmp_path):
    fastsd.compress(build(block_out_channels=(8, 16, 32, 64)), "a-sdm").save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / WEIGHTS_FILE, folder / WEIGHTS_FILE)
    with pytest.raises(fastsd.CheckpointError, match="expected the weights of its plan"):
        fastsd.load(folder)


@pytest.mark.parametrize("name", ["bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny"])
def test_the_full_models_configuration_beside_pruned_weights(tmp_path, name):
    """diffusers loads such a folder, fills it up with random layers and draws noise."""
    unet = build()
    unet.save_config(tmp_path)
    small = fastsd.compress(unet, name)
    small.save_pretrained(tmp_path / "right")
    shutil.copy(tmp_path / "right" / "diffusion_pytorch_model.safetensors", tmp_path)
    with pytest.raises(
        fastsd.CheckpointError, match=rf"the weights are those of {name}: write \{{.*into config.json"
    ) as error:
        fastsd.load(tmp_path)
    changes = json.loads(str(error.value).partition("write ")[2].rpartition(" into")[0])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    assert torch.equal(call(fastsd.load(tmp_path)), call(small))


def test_weights_of_nothing_that_is_known(tmp_path):
    build().save_config(tmp_path)
    build(in_channels=5).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "diffusion_pytorch_model.safetensors", tmp_path)
    with pytest.raises(fastsd.CheckpointError, match=r"\(8, 5, 3, 3\) in the file; take the config.json"):
        fastsd.load(tmp_path)


def test_stock_folders_load_as_they_are(tmp_path):
    unet = build().half()
    unet.save_pretrained(tmp_path / "one")
    unet.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    assert (tmp_path / "many" / "diffusion_pytorch_model.safetensors.index.json").exists()
    for name in ("one", "many"):
        loaded = fastsd.load(tmp_path / name)
        assert loaded.dtype == torch.float16
        assert all(torch.equal(loaded.state_dict()[key], value) for key, value in unet.state_dict().items())
    with pytest.raises(fastsd.CheckpointError, match="there is neither"):
        fastsd.load(tmp_path)
    cut(tmp_path / "one" / "diffusion_pytorch_model.safetensors", 2000)
    with pytest.raises(fastsd.CheckpointError, match=r"expected .*safetensors file"):
        fastsd.load(tmp_path / "one")


def test_names_of_models_find_compressed_folders(folder):
    assert torch.equal(call(models.load(str(folder))), call(fastsd.load(folder)))


def test_a_pipeline_with_a_compressed_unet(tmp_path):
    small = fastsd.compress(build(), "a-sdm")
    diffusers.DDIMPipeline(unet=small, scheduler=diffusers.DDIMScheduler()).save_pretrained(tmp_path)
    for given in ({}, {"unet": fastsd.load(tmp_path / "unet")}):
        loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path, **given, local_files_only=True)
        assert torch.equal(call(loaded.unet), call(small))
    assert torch.equal(call(models.denoiser(models.load(str(tmp_path)))), call(small))


def test_plans_as_json():
    config = config_of(build(SMALL_SD))
    for plan in (*PLANS.values(), fastsd.compress(build(), "a-sdm").compression.plan):
        assert fastsd.Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert json.loads(json.dumps(config)) is not None


def test_a_pipeline_is_not_loaded_without_this_library(tmp_path):
    """diffusers names what has to be imported."""
    small = fastsd.compress(build(), "a-sdm")
    diffusers.DDIMPipeline(unet=small, scheduler=diffusers.DDIMScheduler()).save_pretrained(tmp_path)
    program = "import diffusers, sys; diffusers.DiffusionPipeline.from_pretrained(sys.argv[1], local_files_only=True)"
    child = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=False)
    assert child.returncode != 0
    assert "import fastsd.compress.model" in child.stderr
