"""The report: every module of a model, replaced by which rule and op on which backend, or why not."""

import json
from collections import Counter

import pytest
import torch
from torch import nn

import fastsd
from fastsd.nn.replacement import settings_of
from tests.patching.models import Pipeline, block_count, build


def entry(model, path):
    (found,) = (entry for entry in fastsd.report(model).entries if entry.path == path)
    return found


def test_stock_model():
    report = fastsd.report(build())
    known = [entry for entry in report.entries if entry.rule is not None]
    kinds = Counter((each.class_name, each.rule) for each in known)
    assert kinds == {
        ("ResnetBlock2D", "resnet_block"): 8,
        ("Downsample2D", "downsample"): 1,
        ("Upsample2D", "upsample"): 1,
        ("Transformer2DModel", "transformer"): 4,
        ("BasicTransformerBlock", "transformer_block"): 4,
        ("Attention", "attention"): 8,
        ("FeedForward", "feed_forward"): 4,
        ("UpBlock2D", "up_block"): 1,
        ("CrossAttnUpBlock2D", "cross_attention_up_block"): 1,
    }
    for each in known:
        assert not each.replaced
        assert each.reason == "the model is not patched"
        assert each.ops == ()


def test_patched_model():
    each = entry(fastsd.patch(build()), "up_blocks.1.resnets.0")
    assert (each.class_name, each.rule, each.replaced, each.reason) == ("ResnetBlock2D", "resnet_block", True, None)
    assert each.ops == ("resnet_block",)
    assert each.backends == {"resnet_block": "cpu"}


def test_after_unpatch_it_is_as_before():
    model = build()
    before = fastsd.report(model)
    assert fastsd.report(fastsd.patch(model)) != before
    assert fastsd.report(fastsd.unpatch(model)) == before


@pytest.mark.parametrize("name", ["unet", "vae", "controlnet"])
def test_modules_of_a_replaced_one_belong_to_it(name):
    model = fastsd.patch(build(name))
    paths = [entry.path for entry in fastsd.report(model).entries]
    assert len(paths) == len(set(paths))
    replaced = {path: settings_of(module) for path, module in model.named_modules() if settings_of(module) is not None}

    def belongs(path):
        return any(
            path.startswith(f"{owner}.")
            and not path.startswith(tuple(f"{owner}.{child}." for child in settings.rule.passes_on))
            for owner, settings in replaced.items()
        )

    outside = {
        path for path, module in model.named_modules() if list(module.parameters(recurse=False)) and not belongs(path)
    }
    assert set(paths) == outside | set(replaced)


def test_model_without_a_rule():
    (only,) = fastsd.report(nn.Sequential(nn.Linear(2, 2), nn.ReLU())).entries
    assert (only.path, only.rule, only.reason) == ("0", None, "no rule for this class")


def test_refused_module():
    model = build()
    model.mid_block.resnets[0].norm2.register_forward_pre_hook(lambda module, args: None)
    with pytest.warns(UserWarning, match="norm2 has a forward hook"):
        fastsd.patch(model)
    each = entry(model, "mid_block.resnets.0")
    assert (each.replaced, each.backends) == (False, {})
    assert each.reason == "norm2 has a forward hook, which runs only when norm2 is called"


def test_hook_after_patch():
    """A replaced module that runs its stock forward says so."""
    model = fastsd.patch(build())
    model.mid_block.resnets[0].norm2.register_forward_pre_hook(lambda module, args: None)
    each = entry(model, "mid_block.resnets.0")
    assert (each.replaced, each.backends) == (True, {})
    assert each.reason == "norm2 has a forward hook, which runs only when norm2 is called"


@pytest.mark.parametrize(
    ("dtype", "device", "backend"),
    [(torch.float32, "cpu", "cpu"), (torch.float64, "cpu", "reference")],
    ids=str,
)
def test_backend_of_device_and_dtype(dtype, device, backend):
    model = fastsd.patch(build().to(device, dtype))
    assert entry(model, "mid_block.resnets.0").backends == {"resnet_block": backend}


def test_backend_that_no_longer_serves():
    model = fastsd.patch(build(), backend="cpu").double()
    assert "float64" in entry(model, "mid_block.resnets.0").backends["resnet_block"]


def test_backend_of_the_environment(monkeypatch):
    model = fastsd.patch(build())
    monkeypatch.setenv("FASTSD_BACKEND", "reference")
    assert entry(model, "mid_block.resnets.0").backends == {"resnet_block": "reference"}


def test_text():
    model = fastsd.patch(build())
    model.mid_block.resnets[0].nonlinearity = nn.GELU()
    assert str(fastsd.report(model)).splitlines() == [
        "UNet2DConditionModel",
        "  Transformer2DModel        4  replaced by transformer → conv2d [cpu]",
        "  BasicTransformerBlock     4  replaced by transformer_block",
        "  Attention                 8  replaced by attention → attention [cpu]",
        "  FeedForward               4  replaced by feed_forward",
        "  ResnetBlock2D             7  replaced by resnet_block → resnet_block [cpu]",
        "  Downsample2D              1  replaced by downsample → conv2d [cpu]",
        "  UpBlock2D                 1  replaced by up_block",
        "  Upsample2D                1  replaced by upsample → conv2d [cpu]",
        "  CrossAttnUpBlock2D        1  replaced by cross_attention_up_block",
        "  ResnetBlock2D             1  replaced by resnet_block: nonlinearity is a torch.nn.modules.activation.GELU, "
        "expected a plain SiLU",
        "  Conv2d                    2  left: no rule for this class",
        "  Linear                    2  left: no rule for this class",
        "  GroupNorm                 1  left: no rule for this class",
    ]


def test_text_of_a_pipeline():
    parts = Pipeline(
        vae=build("vae"),
        text_encoder=nn.Sequential(nn.Linear(2, 2)),
        scheduler=object(),
        controlnet=[build("controlnet"), build("controlnet", seed=1)],
    )
    report = fastsd.report(fastsd.patch(parts))
    assert [part.name for part in report.parts] == ["vae", "text_encoder", "controlnet.0", "controlnet.1"]
    lines = str(report).splitlines()
    assert lines[0] == "vae: AutoencoderKL"
    assert "text_encoder: Sequential: left, holds no module that a rule knows" in lines
    assert "controlnet.1: ControlNetModel" in lines
    replaced = [line.split() for line in lines if "replaced by resnet_block" in line]
    assert [int(words[1]) for words in replaced] == [block_count("vae"), *[block_count("controlnet")] * 2]


def test_part_with_two_names():
    unet = build()
    assert [part.name for part in fastsd.report(Pipeline(unet=unet, prior=unet)).parts] == ["unet"]


def test_json():
    report = fastsd.report(fastsd.patch(Pipeline(unet=build(), vae=build("vae"))))
    as_dict = json.loads(json.dumps(report.to_dict()))
    assert as_dict == report.to_dict()
    assert [part["name"] for part in as_dict["parts"]] == ["unet", "vae"]
    assert as_dict["parts"][0].keys() == {"name", "class_name", "entries", "cuda_graphs"}
    assert as_dict["parts"][0]["cuda_graphs"] is None
    assert as_dict["parts"][0]["entries"][0].keys() == {
        "path",
        "class_name",
        "replaced",
        "rule",
        "backends",
        "reason",
        "approximate",
    }


def test_cuda_graphs():
    report = fastsd.report(fastsd.patch(Pipeline(unet=build(), vae=build("vae")), cuda_graphs=3))
    reason = "the model is on cpu, and there are CUDA graphs only on a CUDA device"
    assert report.to_dict()["parts"][0]["cuda_graphs"] == {"most": 3, "held": 0, "reason": reason}
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert [line for line in str(report).splitlines() if "CUDA graphs" in line] == [
        f"  CUDA graphs: 0 of at most 3, off: {reason}"
    ]


@pytest.mark.parametrize("cuda_graphs", [None, True], ids=str)
def test_report_changes_nothing(cuda_graphs):
    model = fastsd.patch(build(), cuda_graphs=cuda_graphs)
    before = [(type(module), dict(vars(module))) for module in model.modules()]
    fastsd.report(model)
    assert [(type(module), dict(vars(module))) for module in model.modules()] == before
