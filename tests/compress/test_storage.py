"""Compressed models in folders: bitwise there and back, and nothing half-loaded."""

import errno
import hashlib
import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import fastsd
from fastsd import models
from fastsd.compress.storage import PLAN_FILE, WEIGHTS_FILE
from tests.combinations import long
from tests.compress.models import EVERYTHING, PLANS, SMALL_SD, SMALLEST, build, call, shared, trained

STOCK_WEIGHTS = "diffusion_pytorch_model.safetensors"
STOCK_INDEX = f"{STOCK_WEIGHTS}.index.json"


@pytest.mark.parametrize("name", ["bk-sdm-tiny", "vega", *long("bk-sdm-base", "bk-sdm-small", "ssd-1b")])
def test_what_stock_can_say_is_stock(tmp_path, name):
    small = fastsd.compress(shared(name), name)
    small.save_pretrained(tmp_path)
    assert not (tmp_path / PLAN_FILE).exists()
    stock = diffusers.UNet2DConditionModel.from_pretrained(tmp_path, local_files_only=True)
    assert type(stock) is diffusers.UNet2DConditionModel
    assert torch.equal(call(stock.eval()), call(small))


@pytest.mark.parametrize("name", ["a-sdm", "bypassed", *long("transformer", "experts")])
def test_stock_loading_of_what_it_cannot_say_fails(tmp_path, name):
    fastsd.compress(shared(), PLANS.get(name, name)).save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"config.json"):
        diffusers.UNet2DConditionModel.from_pretrained(tmp_path, local_files_only=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A compressed model and a stock one, to be copied."""
    folder = tmp_path_factory.mktemp("saved")
    unet = build(SMALLEST)
    fastsd.compress(unet, EVERYTHING).save_pretrained(folder / "compressed")
    unet.save_pretrained(folder / "stock", max_shard_size="100KB")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved / "compressed", tmp_path / "model")


@pytest.fixture
def stock(saved, tmp_path):
    return shutil.copytree(saved / "stock", tmp_path / "stock")


def test_dtype_and_class_method(folder):
    half = fastsd.load(folder, dtype=torch.float16)
    assert half.dtype == torch.float16
    assert half.compression.plan == EVERYTHING
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


@pytest.mark.parametrize("failing", ["weights", "plan"])
def test_a_full_disk_leaves_what_was_there(folder, monkeypatch, failing):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = trained(fastsd.load(folder))

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if failing == "weights":
            patch.setattr("safetensors.torch.save_file", full)
        else:
            patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space left"):
            other.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    other.save_pretrained(folder)
    assert torch.equal(call(fastsd.load(folder)), call(other))


def test_a_stock_model_saved_over_a_compressed_one(tmp_path):
    fastsd.compress(shared(), "a-sdm").save_pretrained(tmp_path / "unet")
    fastsd.compress(shared(), "bk-sdm-small").save_pretrained(tmp_path / "unet")
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDIMPipeline"}')
    both = r"got fastsd_plan\.json of the one and config\.json of the other"
    with pytest.raises(fastsd.CheckpointError, match=both):
        fastsd.load(tmp_path / "unet")
    with pytest.raises(fastsd.CheckpointError, match=both):
        fastsd.CompressedUNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    for folder in (tmp_path, tmp_path / "unet"):
        with pytest.raises(fastsd.CheckpointError, match=both):
            models.load(str(folder))


def test_a_compressed_model_saved_over_a_stock_one(tmp_path):
    small = fastsd.compress(shared(), "a-sdm")
    for there in ("config.json", STOCK_WEIGHTS, STOCK_INDEX, "diffusion_pytorch_model.fp16.bin"):
        (tmp_path / there).write_text("{}")
        with pytest.raises(fastsd.CheckpointError, match=f"expected no stock model .* got {there}: remove"):
            small.save_pretrained(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [there]
        (tmp_path / there).unlink()


def test_saving_what_is_no_compressed_model(tmp_path):
    with pytest.raises(fastsd.CheckpointError, match=r"expected one that fastsd\.compress has made"):
        fastsd.CompressedUNet2DConditionModel(**SMALL_SD).save_pretrained(tmp_path / "new")
    tied = fastsd.compress(shared(), "a-sdm")
    tied.conv_norm_out.bias = tied.conv_norm_out.weight
    with pytest.raises(fastsd.CheckpointError, match=r"conv_norm_out.bias is conv_norm_out.weight: give it a copy"):
        tied.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dtype", ["float16", "auto", torch.int8], ids=str)
def test_what_is_no_dtype(folder, stock, dtype):
    for place in (folder, stock):
        with pytest.raises(TypeError, match=f"dtype: expected a floating-point torch.dtype, or None; got '?{dtype}"):
            fastsd.load(place, dtype=dtype)


@pytest.mark.parametrize(
    "option",
    [{"variant": "fp16"}, {"output_loading_info": True}, {"device_map": "auto"}, {"device_map": {"conv_in": 0}}],
)
def test_the_class_method_refuses_what_it_cannot_do(folder, option):
    with pytest.raises(ValueError, match=f"got .*{option.get('variant', next(iter(option.values())))}"):
        fastsd.CompressedUNet2DConditionModel.from_pretrained(folder, **option)


@pytest.mark.parametrize("device_map", ["cpu", torch.device("cpu"), {"": "cpu"}])
def test_the_class_method_with_one_device(folder, device_map):
    loaded = fastsd.CompressedUNet2DConditionModel.from_pretrained(folder, device_map=device_map, variant=None)
    assert loaded.device.type == "cpu"


def test_the_class_method_says_what_else_loads(tmp_path):
    build().save_pretrained(tmp_path)
    for place, says in (
        (tmp_path, "holds a stock model, which fastsd.load"),
        ("owner/name", "models of a hub are for"),
    ):
        with pytest.raises(fastsd.CheckpointError, match=says):
            fastsd.CompressedUNet2DConditionModel.from_pretrained(place)


def test_what_a_model_was_before_that(tmp_path):
    small = fastsd.compress(fastsd.compress(shared(), "bk-sdm-base"), PLANS["transformer"])
    assert small.compression.before.plan.name == "bk-sdm-base"
    small.save_pretrained(tmp_path)
    loaded = fastsd.load(tmp_path).compression
    assert (loaded.plan, loaded.before.plan) == (small.compression.plan, small.compression.before.plan)


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


def to_int8(folder):
    """By somebody who knows how files are signed."""
    state = load_file(folder / WEIGHTS_FILE)
    save_file({name: value.to(torch.int8) for name, value in state.items()}, folder / WEIGHTS_FILE)
    digest = hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()
    signed(folder, lambda data: data.update(weights_sha256=digest))


def many_digits(folder):
    plan = json.dumps(json.loads((folder / PLAN_FILE).read_text()) | {"format": None})
    (folder / PLAN_FILE).write_text(plan.replace("null", "1" * 5000, 1))


DAMAGES = {
    "no_weights": (lambda f: (f / WEIGHTS_FILE).unlink(), "no such file"),
    "no_plan": (lambda f: (f / PLAN_FILE).unlink(), "expected a folder with fastsd_plan.json or config.json"),
    "deep_plan": (lambda f: (f / PLAN_FILE).write_text("[" * 200_000), "expected a plan as JSON"),
    "huge_plan": (lambda f: (f / PLAN_FILE).write_text(" " * (2 << 20)), "at most 1048576 bytes"),
    "many_digits": (many_digits, "expected a plan as JSON"),
    "other_format": (lambda f: edited(f, format="version 9"), "got 'version 9'"),
    "more_keys": (lambda f: edited(f, more=1), "expected the keys format"),
    "empty_weights": (lambda f: cut(f / WEIGHTS_FILE, 0), "expected a safetensors file"),
    "flipped_bit": (lambda f: flip(f / WEIGHTS_FILE, -1000), "it has changed since"),
    "lacks_a_tensor": (lacks_a_tensor, r"conv_in.bias should be \(8,\), and is absent"),
    "signed_layers": (
        lambda f: signed(f, lambda d: d["base_config"].update(layers_per_block=10**6)),
        "got layers_per_block=1000000",
    ),
    "signed_int8": (to_int8, "expected floating-point weights; .* is I8"),
    "signed_width": (lambda f: signed(f, lambda d: d["base_config"].update(in_channels=2**40)), "got in_channels="),
    "signed_other_model": (
        lambda f: signed(f, lambda d: d["base_config"].update(cross_attention_dim=16)),
        r"should be \(8, 16\), and is \(8, 8\)",
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


@pytest.mark.parametrize("name", ["bk-sdm-tiny", *long("bk-sdm-base", "bk-sdm-small")])
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
    unet.conv_in.float()
    unet.mid_block.bfloat16()
    unet.save_pretrained(tmp_path / "one")
    unet.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    assert (tmp_path / "many" / STOCK_INDEX).exists()
    for name in ("one", "many"):
        # what is not loaded says nothing of what is
        build(in_channels=5).half().save_pretrained(tmp_path / name, variant="fp16")
        unet.save_config(tmp_path / name)
        save_file({"step": torch.tensor(3)}, tmp_path / name / "a.safetensors")
        loaded = fastsd.load(tmp_path / name)
        state = loaded.state_dict()
        assert {key: value.dtype for key, value in state.items()} == {k: v.dtype for k, v in unet.state_dict().items()}
        assert all(torch.equal(state[key], value) for key, value in unet.state_dict().items())
        assert type(loaded) is diffusers.UNet2DConditionModel
        assert not loaded.training
        assert {value.dtype for value in fastsd.load(tmp_path / name, dtype=torch.float16).parameters()} == {
            torch.float16
        }


def test_a_stock_model_is_the_one_that_diffusers_loads(stock):
    """diffusers takes the files of an index before a single one."""
    expected = diffusers.UNet2DConditionModel.from_pretrained(stock, local_files_only=True)
    build(in_channels=5).save_pretrained(stock.parent / "other")
    shutil.copy(stock.parent / "other" / STOCK_WEIGHTS, stock)
    for loaded in (fastsd.load(stock), models.load(str(stock))):
        assert torch.equal(call(loaded), call(expected))
        assert dict(loaded.config) == dict(expected.config) | {"_name_or_path": loaded.config["_name_or_path"]}
    first, *_ = sorted(stock.glob("*-of-*.safetensors"))
    save_file({name: value[:1] for name, value in load_file(first).items()}, first)
    build().save_pretrained(stock.parent / "good")
    shutil.copy(stock.parent / "good" / STOCK_WEIGHTS, stock)
    for load in (fastsd.load, lambda folder: models.load(str(folder))):
        with pytest.raises(fastsd.CheckpointError, match=r"expected weights of the model that config\.json"):
            load(stock)


def test_stock_buffers_that_are_not_saved(tmp_path):
    unet = build(down_block_types=("KDownBlock2D",) * 4, up_block_types=("KUpBlock2D",) * 4)
    unsaved = dict(unet.named_buffers())
    assert unsaved
    assert not unsaved.keys() & unet.state_dict().keys()
    unet.save_pretrained(tmp_path)
    loaded = dict(fastsd.load(tmp_path).named_buffers())
    assert all(torch.equal(loaded[name], buffer) for name, buffer in unsaved.items())


def indexed(change):
    def spoil(folder):
        index = json.loads((folder / STOCK_INDEX).read_text())
        change(index, "conv_out.bias")
        (folder / STOCK_INDEX).write_text(json.dumps(index))

    return spoil


def only(name):
    def spoil(folder):
        for path in folder.glob("diffusion*"):
            path.unlink()
        (folder / name).write_bytes(b"")

    return spoil


STOCK_DAMAGES = {
    "nonsense_config": (
        lambda f: (f / "config.json").write_text('{"_class_name": "UNet2DConditionModel", "down_block_types": [3]}'),
        "expected a UNet2DConditionModel that can be built",
    ),
    "absurd_config": (
        lambda f: (f / "config.json").write_text('{"_class_name": "UNet2DConditionModel", "layers_per_block": 100000}'),
        "expected numbers, names and short lists; got layers_per_block=100000",
    ),
    "index_of_numbers": (indexed(lambda d, name: d["weight_map"].update({name: 3})), "expected metadata and a weight"),
    "index_elsewhere": (
        indexed(lambda d, name: d["weight_map"].update({name: "../x.safetensors"})),
        "to files beside it",
    ),
    "index_names_another_file": (
        indexed(lambda d, name: d["weight_map"].update({name: d["weight_map"]["conv_in.bias"]})),
        "expected the file of each tensor",
    ),
    "no_shard": (lambda f: next(f.glob("*-of-*")).unlink(), f"the weights that {STOCK_INDEX} names; there is no such"),
    "empty_weights": (only(STOCK_WEIGHTS), "expected a safetensors file"),
    "only_a_variant": (
        only("diffusion_pytorch_model.fp16.safetensors"),
        f"expected {STOCK_WEIGHTS} or .*; there is diffusion_pytorch_model.fp16.safetensors",
    ),
    "only_pickled": (only("diffusion_pytorch_model.bin"), "there is diffusion_pytorch_model.bin"),
    "no_weights": (lambda f: [path.unlink() for path in f.glob("diffusion*")], "there is no weights"),
}


@pytest.mark.parametrize("damage", STOCK_DAMAGES)
def test_damaged_stock_folders(stock, damage):
    spoil, says = STOCK_DAMAGES[damage]
    spoil(stock)
    for load in (fastsd.load, lambda folder: models.load(str(folder))):
        with pytest.raises(fastsd.CheckpointError, match=says):
            load(stock)


def test_folders_of_other_models(tmp_path):
    with pytest.raises(fastsd.CheckpointError, match="there is neither"):
        fastsd.load(tmp_path)
    models.load("tiny").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderKL"}))
    with pytest.raises(
        fastsd.CheckpointError, match="expected the configuration of a UNet2DConditionModel; got that of 'Au"
    ):
        fastsd.load(tmp_path)


def test_names_of_models_find_compressed_folders(folder):
    assert torch.equal(call(models.load(str(folder))), call(fastsd.load(folder)))


def test_a_pipeline_with_a_compressed_unet(tmp_path):
    small = fastsd.compress(shared(), "a-sdm")
    diffusers.DDIMPipeline(unet=small, scheduler=diffusers.DDIMScheduler()).save_pretrained(tmp_path)
    for given in ({}, {"unet": fastsd.load(tmp_path / "unet")}):
        loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path, **given, local_files_only=True)
        assert torch.equal(call(loaded.unet), call(small))
    assert torch.equal(call(models.denoiser(models.load(str(tmp_path)))), call(small))


def test_from_pipe():
    """diffusers carries over the U-Nets of exactly the stock class; docs/compression.md says what to write."""
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=4)
    small = fastsd.compress(shared(), "a-sdm")
    pipe = diffusers.StableDiffusionPipeline(
        vae, None, None, small, diffusers.DDIMScheduler(), None, None, requires_safety_checker=False
    )
    with pytest.raises(ValueError, match=r"expected .*'unet'"):
        diffusers.StableDiffusionPipeline.from_pipe(pipe)
    assert diffusers.StableDiffusionPipeline.from_pipe(pipe, unet=pipe.unet).unet is small
    assert diffusers.AutoPipelineForImage2Image.from_pipe(pipe).unet is small
