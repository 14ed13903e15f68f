"""patch, unpatch and patched: what they return, refuse, change and leave alone. Row 14 of the compatibility matrix."""

import sys
import threading

import diffusers
import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastsd
from fastsd.models import load
from fastsd.nn import gri_attention, transformer_block, up_block
from fastsd.nn.replacement import settings_of
from fastsd_kernels import cpu_memory, dispatch
from tests.combinations import pairwise
from tests.patching.models import Pipeline, assert_as_stock, assert_untouched, blocks, build, call, fast, fingerprint


def backends(model):
    return {backend for entry in fastsd.report(model).entries for backend in entry.backends.values()}


def pipeline(unet=None, vae=None, **parts):
    return diffusers.StableDiffusionPipeline(
        vae=vae or build("vae"),
        unet=unet or build(),
        text_encoder=None,
        tokenizer=None,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **parts,
    )


@pytest.mark.parametrize("name", ["unet", "unet_2d_model", "controlnet", "vae"])
def test_patch_leaves_no_trace(name):
    model = build(name)
    before = fingerprint(model)
    assert fastsd.patch(model) is model
    assert all(fast(model))
    assert fastsd.unpatch(model) is model
    assert_untouched(model, before)


def test_patch_touches_only_replaced_blocks():
    model = build()
    before = {path: (type(module), set(vars(module))) for path, module in model.named_modules()}
    stock_forward = ResnetBlock2D.forward
    fastsd.patch(model)
    for path, module in model.named_modules():
        if settings_of(module) is None:
            assert (type(module), set(vars(module))) == before[path]
    assert ResnetBlock2D.forward is stock_forward
    assert not any(fast(build()))


def test_stock_names():
    model = fastsd.patch(build())
    stock = build()
    assert list(model.state_dict()) == list(stock.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in stock.named_modules()]
    assert str(model) == str(stock)
    assert {type(block).__name__ for block in blocks(model)} <= set(model._no_split_modules)
    assert type(model) is diffusers.UNet2DConditionModel


def test_row_14_patch_twice():
    model = fastsd.patch(build())
    before = fingerprint(model)
    fastsd.patch(model)
    assert_untouched(model, before)


def test_row_14_unpatch_twice():
    model = build()
    before = fingerprint(model)
    fastsd.unpatch(fastsd.unpatch(fastsd.patch(model)))
    assert_untouched(model, before)


def test_row_14_two_models():
    one, other = build(seed=1), build(seed=2)
    stock = call(one), call(other)
    fastsd.patch(one)
    assert torch.equal(call(other), stock[1])
    fastsd.patch(other)
    assert_as_stock(call(one), stock[0])
    assert_as_stock(call(other), stock[1])
    fastsd.unpatch(one)
    assert torch.equal(call(one), stock[0])
    assert all(fast(other))


def test_row_14_threads():
    """Each thread patches, runs and unpatches its own model."""
    with torch.no_grad():
        models = [build(seed=seed) for seed in range(2)]
        stock = [call(model) for model in models]
    failures = []

    def work(model, expected):
        try:
            with torch.no_grad():
                for _ in range(5):
                    assert_as_stock(call(fastsd.patch(model)), expected)
                    assert torch.equal(call(fastsd.unpatch(model)), expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(models, stock, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


class _After(TorchDispatchMode):
    """``act()`` once so many operations of torch have run."""

    def __init__(self, count, act):
        super().__init__()
        self.count, self.act, self.seen = count, act, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.seen += 1
        if self.seen == self.count:
            self.act()
        return result


# its window is the whole map, so that it is full attention
FULL = fastsd.GRI(window=16, pool=4, mask_own_window=True)


@pytest.mark.parametrize(
    ("name", "gri"),
    [
        pytest.param("small", None, id="small"),
        pytest.param("cross_up", None, id="cross_up"),
        pytest.param("cross_up", FULL, id="gri"),
        pytest.param("vae", None, id="vae"),
        pytest.param("unet", None, id="unet", marks=pytest.mark.long),
        pytest.param("linear_projections", None, id="linear_projections", marks=pytest.mark.long),
    ],
)
def test_row_14_unpatched_while_it_runs(name, gri):
    """As another thread may do at any place of a forward."""
    model = build(name)
    expected = call(model)
    with _After(0, None) as all_of_it:
        call(fastsd.patch(model, gri=gri))
    for count in range(1, all_of_it.seen, 5):
        fastsd.patch(model, gri=gri)
        with _After(count, lambda: fastsd.unpatch(model)):
            assert_as_stock(call(model), expected)
        assert torch.equal(call(fastsd.unpatch(model)), expected)


class _AtLine:
    """``act()`` when a line of the replaced modules' forwards runs for the first time; what lines there are."""

    FILES = tuple(module.__file__ for module in (up_block, transformer_block, gri_attention))

    def __init__(self, wanted, act):
        self.wanted, self.act, self.seen = wanted, act, {}

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)

    def _enter(self, frame, event, _):
        return self._see if frame.f_code.co_filename in self.FILES else None

    def _see(self, frame, event, _):
        line = (frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and line not in self.seen:
            self.seen[line] = None
            if line == self.wanted:
                self.act()
        return self._see


@pairwise(
    "name,gri,is_exchanged",
    ["small", "cross_up"],
    [None, FULL],
    [False, True],
    ids=lambda value: value if isinstance(value, str) else str(bool(value)),
)
def test_row_14_another_patch_while_it_runs(name, gri, is_exchanged):
    """Between any two lines, where no operation of torch runs."""
    model = build(name)
    expected = call(model)

    def act():
        fastsd.unpatch(model)
        if is_exchanged:
            fastsd.patch(model, gri=None if gri else FULL)

    with _AtLine(None, None) as all_of_it:
        call(fastsd.patch(model, gri=gri))
    assert {path for path, _ in all_of_it.seen} == set(_AtLine.FILES)
    for line in all_of_it.seen:
        fastsd.patch(fastsd.unpatch(model), gri=gri)
        with _AtLine(line, act):
            assert_as_stock(call(model), expected)
    assert torch.equal(call(fastsd.unpatch(model)), expected)


def test_patched_restores():
    model = build()
    before = fingerprint(model)
    with fastsd.patched(model) as inside:
        assert inside is model
        assert all(fast(model))
    assert_untouched(model, before)
    with pytest.raises(KeyError), fastsd.patched(model):
        raise KeyError
    assert_untouched(model, before)


def test_patched_keeps_an_earlier_patch():
    model = fastsd.patch(build(), backend="reference")
    before = fingerprint(model)
    with fastsd.patched(model, backend="cpu"):
        assert backends(model) == {"cpu"}
    assert_untouched(model, before)
    pipe = pipeline(unet=model)
    with fastsd.patched(pipe, backend="reference"):
        assert all(fast(pipe.vae))
    assert not any(fast(pipe.vae))
    assert_untouched(model, before)


def test_patched_keeps_what_was_done_inside():
    model = build()
    with fastsd.patched(model):
        fastsd.unpatch(model)
    assert not any(fast(model))
    with fastsd.patched(model):
        fastsd.patch(model, backend="reference")
    assert all(fast(model))
    model = build()
    with fastsd.patched(model):
        fastsd.patch(model.mid_block, backend="reference")
    kept = [path for path, module in model.named_modules() if type(module).__module__.startswith("fastsd.")]
    assert kept
    assert all(path.startswith("mid_block") for path in kept)


def test_another_backend_updates():
    model = fastsd.patch(fastsd.patch(build()), backend="reference")
    assert backends(model) == {"reference"}
    assert backends(fastsd.patch(model)) == {"cpu"}


def test_backend_is_used(monkeypatch):
    model = fastsd.patch(build(), backend="reference")
    monkeypatch.setattr(dispatch.Op, "choose", lambda op, *args, backend: pytest.fail(f"backend {backend}"))
    with pytest.raises(pytest.fail.Exception, match="backend reference"):
        call(model)


class TestParts:
    def test_pipeline(self):
        pipe = pipeline()
        before = fingerprint(pipe.unet), fingerprint(pipe.vae)
        assert fastsd.patch(pipe) is pipe
        assert all(fast(pipe.unet))
        assert all(fast(pipe.vae))
        assert fastsd.unpatch(pipe) is pipe
        assert_untouched(pipe.unet, before[0])
        assert_untouched(pipe.vae, before[1])

    def test_part_of_a_patched_pipeline(self):
        pipe = fastsd.patch(pipeline())
        fastsd.unpatch(pipe.unet)
        assert not any(fast(pipe.unet))
        assert all(fast(pipe.vae))

    @pytest.mark.parametrize("several", [list, tuple, diffusers.MultiControlNetModel], ids=lambda t: t.__name__)
    def test_several_controlnets(self, several):
        nets = [build("controlnet", seed=seed) for seed in range(2)]
        pipe = Pipeline(unet=build(), controlnet=several(nets), tokenizer="tokenizer", text_encoder=None)
        fastsd.patch(pipe)
        assert all(fast(nets[0]) + fast(nets[1]) + fast(pipe.components["unet"]))
        fastsd.unpatch(pipe)
        assert not any(fast(nets[0]) + fast(nets[1]) + fast(pipe.components["unet"]))

    def test_wrapped_model(self):
        model = build()
        fastsd.patch(nn.Sequential(model))
        assert all(fast(model))

    def test_block_shared_by_two_parents(self):
        model = build()
        model.mid_block.resnets[1] = model.up_blocks[0].resnets[0]
        with fastsd.patched(model):
            assert fast(model) == [True] * 7
            assert sum(entry.rule == "resnet_block" for entry in fastsd.report(model).entries if entry.replaced) == 7
        assert fast(model) == [False] * 7

    def test_block_shared_by_two_parts(self):
        unet, vae = build(), build("vae")
        vae.decoder.mid_block.resnets[0] = unet.mid_block.resnets[0]
        with fastsd.patched(Pipeline(unet=unet, vae=vae)):
            assert all(fast(unet) + fast(vae))
        assert not any(fast(unet) + fast(vae))

    def test_part_without_a_module_that_a_rule_knows(self):
        encoder = nn.Sequential(nn.Linear(4, 4))
        pipe = Pipeline(unet=build(), text_encoder=encoder)
        fastsd.patch(pipe, strict=True)
        assert type(encoder[0]) is nn.Linear


def test_row_13_named_models():
    """Every residual block of the models that users have, by structure alone."""
    expected = {
        "sd15": 22,
        "sd21": 22,
        "sdxl": 17,
        "ssd1b": 16,
        "vega": 16,
        "bk-base": 14,
        "bk-small": 12,
        "bk-tiny": 9,
        "inpaint": 22,
        "ip2p": 22,
        "lcm": 22,
        "controlnet-sd15": 10,
    }
    for name, count in expected.items():
        model = fastsd.patch(load(name, device="meta", weights=False), strict=True)
        assert (name, len(blocks(model)), all(fast(model))) == (name, count, True)


def test_unpatch_gives_kept_memory_back():
    unet = fastsd.patch(build())
    cpu_memory.empty((1024, 1024), dtype=torch.float32, device=torch.device("cpu"))
    assert cpu_memory.kept() >= 4 * 1024**2
    fastsd.unpatch(unet)
    assert cpu_memory.kept() == 0
