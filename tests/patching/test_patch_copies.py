"""Row 6 of the compatibility matrix: copies, pickles and saved files of a patched model are those of a stock one."""

import copy
import io
import json
import pickle

import diffusers
import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

import fastsd
from tests.patching.models import NAMES, assert_as_stock, blocks, build, call, norm_count, op_calls


def assert_stock(model):
    assert all(type(block) is ResnetBlock2D for block in blocks(model))
    assert not any("_fastsd" in vars(module) for module in model.modules())


def _pickle(protocol, model):
    return pickle.loads(pickle.dumps(model, protocol))


def _torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: _pickle(None, model),
    "pickle_0": lambda model: _pickle(0, model),
    "pickle_1": lambda model: _pickle(1, model),
    "pickle_5": lambda model: _pickle(5, model),
    "torch_save": _torch_save,
}


@pytest.mark.parametrize("how", COPIES)
def test_row_6_copies_are_stock(how):
    model = build()
    stock = call(model)
    fastsd.patch(model)
    copied = COPIES[how](model)
    assert_stock(copied)
    assert torch.equal(call(copied), stock)
    assert op_calls(lambda: call(model)) == 16
    assert_as_stock(call(fastsd.patch(copied)), stock)
    fastsd.unpatch(model)
    assert op_calls(lambda: call(copied)) == 16


def test_row_6_copy_of_one_block():
    """Also a shallow one, as ``copy.copy`` makes it: it shares the parameters."""
    model = fastsd.patch(build())
    block = model.mid_block.resnets[0]
    for copied in (copy.copy(block), copy.deepcopy(block)):
        assert type(copied) is ResnetBlock2D
        assert "_fastsd" not in vars(copied)
    assert copy.copy(block).conv1 is block.conv1
    assert vars(block)["_fastsd"].stock is ResnetBlock2D


def test_row_6_copy_keeps_hooks():
    model = fastsd.patch(build())
    model.mid_block.resnets[0].register_forward_hook(_double)
    assert_as_stock(call(copy.deepcopy(model)), call(model))


def _double(module, args, output):
    return 2 * output


@pytest.mark.parametrize("name", NAMES)
def test_row_6_save_pretrained(name, tmp_path):
    stock, model = build(name), fastsd.patch(build(name))
    stock.save_pretrained(tmp_path / "stock")
    model.save_pretrained(tmp_path / "patched")
    files = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert sorted(path.name for path in (tmp_path / "patched").iterdir()) == files
    for file in files:
        assert (tmp_path / "patched" / file).read_bytes() == (tmp_path / "stock" / file).read_bytes()
    assert json.loads((tmp_path / "patched" / "config.json").read_text())["_class_name"] == type(stock).__name__
    loaded = type(stock).from_pretrained(tmp_path / "patched")
    assert_stock(loaded)
    assert torch.equal(call(loaded), call(stock))
    fastsd.patch(loaded, strict=True)
    assert op_calls(lambda: call(loaded)) == norm_count(name)


def test_row_6_controlnet_from_unet():
    stock = diffusers.ControlNetModel.from_unet(build(), conditioning_embedding_out_channels=(4, 8)).eval()
    made = diffusers.ControlNetModel.from_unet(fastsd.patch(build()), conditioning_embedding_out_channels=(4, 8)).eval()
    assert_stock(made)
    for (name, value), (stock_name, stock_value) in zip(
        made.state_dict().items(), stock.state_dict().items(), strict=True
    ):
        assert name == stock_name
        if "controlnet" not in name:
            assert torch.equal(value, stock_value)


def test_row_6_pipeline_save(tmp_path):
    def pipeline(unet, vae):
        return diffusers.StableDiffusionPipeline(
            vae, None, None, unet, diffusers.DDIMScheduler(steps_offset=1, clip_sample=False), None, None, None, False
        )

    pipe = fastsd.patch(pipeline(build(), build("vae")))
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    copied = copy.deepcopy(pipe)
    assert_stock(copied.unet)
    assert torch.equal(call(copied.unet), call(build()))
    assert_stock(diffusers.UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet"))


def test_row_6_replicas_of_data_parallel():
    """A replica shares the class and the attributes but holds no parameters of its own."""
    model = fastsd.patch(nn.ModuleList(blocks(build())))
    replica = model[0]._replicate_for_data_parallel()
    assert type(replica) is type(model[0])
