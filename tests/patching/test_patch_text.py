"""Keys and values of a text that are kept: used where nothing has changed, and nowhere else."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0
from peft import LoraConfig
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastsd
from fastsd.nn import linear as fast_linear
from fastsd.nn import text as fast_text
from fastsd.nn.replacement import settings_of
from tests.patching.models import assert_as_stock, build, call

LIKE = {"generator": torch.Generator().manual_seed(1)}
X, TEXT, OTHER = (torch.randn(2, tokens, width, **LIKE) for tokens, width in ((30, 24), (7, 10), (7, 10)))
KEPT, COMPUTED = 0, 2


def layer(**changes):
    torch.manual_seed(0)
    given = {"query_dim": 24, "heads": 3, "dim_head": 8, "cross_attention_dim": 10, "bias": True} | changes
    return nn.ModuleList([Attention(**given)]).eval().requires_grad_(False)


def warm(model, text):
    """Called until what is made from ``text`` is kept."""
    with torch.no_grad():
        return [model[0](X[: len(text)], text) for _ in range(3)][-1]


def fresh(model, text):
    """What a copy of ``model`` gives that is patched anew, which has nothing kept."""
    with torch.no_grad():
        return fastsd.patch(copy.deepcopy(model))[0](X[: len(text)], text)


@pytest.fixture
def products(monkeypatch):
    """``products(function)``: what it returns, and how many products with a text or its like it computes."""
    counted = []

    def counting(linear):
        def counted_linear(x, *args, **kwargs):
            counted.extend([x] if x.shape[-1] == TEXT.shape[-1] else [])
            return linear(x, *args, **kwargs)

        return counted_linear

    for module in (fast_linear, torch.nn.functional):
        monkeypatch.setattr(module, "linear", counting(module.linear))

    def products(function):
        counted.clear()
        result = function()
        return result, len(counted)

    return products


def test_computed_at_first_and_second_sight(products):
    model = fastsd.patch(layer())
    results, counts = zip(*(products(lambda: model[0](X, TEXT.clone())) for _ in range(4)), strict=True)
    assert counts == (COMPUTED, COMPUTED, KEPT, KEPT)
    assert all(torch.equal(result, fresh(model, TEXT)) for result in results)
    # whatever the queries come from
    assert products(lambda: model[0](X[:, :3], TEXT))[1] == KEPT
    assert torch.equal(model[0](X[:, :3], TEXT), fastsd.patch(layer())[0](X[:, :3], TEXT))


def test_a_first_sight_reads_no_weights(monkeypatch):
    model, read = fastsd.patch(layer()), []
    digest = fast_text.digest
    monkeypatch.setattr(fast_text, "digest", lambda x: read.append(x) or digest(x))
    model[0](X, TEXT)
    assert [x is TEXT for x in read] == [True]


def _by_numpy(text):
    text.numpy()[1, 3, 4] += 0.5


def _at_the_same_address(text):
    other = torch.from_numpy(text.numpy())
    other[0] = OTHER[0]
    assert other.data_ptr() == text.data_ptr()
    return other


# each edits the text, or gives the next one
TEXTS = {
    "in_place": lambda text: text.mul_(1.1),
    "data": lambda text: text.data[1, 3, 4].add_(0.5),
    "numpy": _by_numpy,
    "set_data": lambda text: setattr(text, "data", OTHER.clone()),
    "set_": lambda text: text.set_(OTHER.clone()),
    "same_address": _at_the_same_address,
    "swapped_rows": lambda text: text.flip(0),
    "other_length": lambda text: text[:, :5].contiguous(),
    "other_batch": lambda text: text[1:],
    "other_shape": lambda text: text.view(1, 14, 10),
}


@pytest.mark.parametrize("event", TEXTS)
def test_another_text(event, products):
    model, text = fastsd.patch(layer()), TEXT.clone()
    before = warm(model, text)
    given = TEXTS[event](text)
    text = given if isinstance(given, torch.Tensor) and given.dim() == 3 else text
    after, count = products(lambda: model[0](X[: len(text)], text))
    assert count == COMPUTED
    assert torch.equal(after, fresh(model, text))
    assert not torch.equal(after, before)
    warm(model, text)
    after, count = products(lambda: model[0](X[: len(text)], text))
    assert count == KEPT
    assert torch.equal(after, fresh(model, text))


PARAMETERS = ("to_k.weight", "to_v.weight", "to_k.bias", "to_v.bias")


@pytest.mark.parametrize("at", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize("name", PARAMETERS)
def test_one_element_of_a_parameter(name, at, products):
    """Which torch does not know of; edited back, it is the same again."""
    model = fastsd.patch(layer())
    before = warm(model, TEXT)
    parameter = model[0].get_parameter(name)
    version, old = parameter._version, parameter.clone()
    parameter.data.view(-1)[at] += 0.5
    assert parameter._version == version
    after, count = products(lambda: model[0](X, TEXT))
    assert count == COMPUTED
    assert torch.equal(after, fresh(model, TEXT))
    assert products(lambda: model[0](X, TEXT))[1] == KEPT
    parameter.data.copy_(old)
    assert torch.equal(model[0](X, TEXT), before)


def test_packed_projections(products):
    """Of another processor, other layers: what was kept of those is not theirs."""
    model = fastsd.patch(layer())
    before = warm(model, TEXT)
    model[0].fuse_projections()
    model[0].to_kv.weight.mul_(1.5)
    for processor, once in ((FusedAttnProcessor2_0(), 1), (AttnProcessor2_0(), COMPUTED)):
        model[0].set_processor(processor)
        for expected in (once, KEPT):
            after, count = products(lambda: model[0](X, TEXT))
            assert count == expected
            assert torch.equal(after, fresh(model, TEXT))
            assert torch.equal(after, before) == (once == COMPUTED)
    model[0].set_processor(FusedAttnProcessor2_0())
    warm(model, TEXT)
    model[0].to_kv.bias.data[-1] += 0.5
    after, count = products(lambda: model[0](X, TEXT))
    assert count == 1
    assert torch.equal(after, fresh(model, TEXT))


def _load(assign, attn):
    attn.load_state_dict({name: value * 0.9 for name, value in attn.state_dict().items()}, assign=assign)


def _new_parameter(attn):
    attn.to_k.weight = nn.Parameter(attn.to_k.weight * 2, requires_grad=False)


def _new_layer(attn):
    torch.manual_seed(9)
    attn.to_k = nn.Linear(10, 24, bias=False)


def _no_bias(attn):
    attn.to_v.bias = None


def _exchanged(attn):
    attn.to_k, attn.to_v = attn.to_v, attn.to_k


WEIGHTS = {
    "in_place": lambda attn: attn.to_k.weight.mul_(1.1),
    "set_data": lambda attn: setattr(attn.to_v.weight, "data", attn.to_v.weight * 1.1),
    "new_parameter": _new_parameter,
    "load_state_dict": lambda attn: _load(False, attn),
    "load_state_dict_assign": lambda attn: _load(True, attn),
    "new_layer": _new_layer,
    "no_bias": _no_bias,
    "exchanged": _exchanged,
}


@pytest.mark.parametrize("event", WEIGHTS)
def test_other_weights(event, products):
    model = fastsd.patch(layer())
    before = warm(model, TEXT)
    WEIGHTS[event](model[0])
    for expected in (COMPUTED, KEPT):
        after, count = products(lambda: model[0](X, TEXT))
        assert count == expected
        assert torch.equal(after, fresh(model, TEXT))
    assert not torch.equal(after, before)


def test_functional_call(products):
    model = fastsd.patch(layer())
    warm(model, TEXT)
    weights = {name: value * 1.1 for name, value in model.state_dict().items()}
    after, count = products(lambda: torch.func.functional_call(model[0], _inside(weights), (X, TEXT)))
    assert count == COMPUTED
    model.load_state_dict(weights)
    assert torch.equal(after, fresh(model, TEXT))


def _inside(weights):
    return {name.removeprefix("0."): value for name, value in weights.items()}


def _gaps(attn):
    attn.to_k.weight = nn.Parameter(attn.to_k.weight.mT.contiguous().mT, requires_grad=False)


def _own_forward(attn):
    attn.to_k.forward = lambda x: 2 * torch.nn.functional.linear(x, attn.to_k.weight)


NOT_PLAIN = {
    "hook": lambda attn: attn.to_k.register_forward_hook(lambda module, args, y: 2 * y),
    "pre_hook": lambda attn: attn.to_v.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "own_forward": _own_forward,
    "another_class": lambda attn: setattr(attn, "to_v", nn.Sequential(attn.to_v, nn.Tanh())),
    "parametrised": lambda attn: torch.nn.utils.parametrize.register_parametrization(attn.to_k, "weight", nn.Tanh()),
    "gaps": _gaps,
    "norm_k": lambda attn: setattr(attn, "norm_k", nn.LayerNorm(8)),
}


@pytest.mark.parametrize("event", NOT_PLAIN)
def test_what_is_not_plain_is_called_every_time(event, products):
    model = fastsd.patch(layer())
    warm(model, TEXT)
    NOT_PLAIN[event](model[0])
    for _ in range(3):
        after, count = products(lambda: model[0](X, TEXT))
        assert count == COMPUTED
        if event != "own_forward":  # the copy's reads the first one's weight
            assert torch.equal(after, fresh(model, TEXT))


def test_a_text_with_gaps_is_not_kept(products):
    model, text = fastsd.patch(layer()), torch.stack([TEXT, OTHER], dim=-1)[..., 0]
    warm(model, text)
    after, count = products(lambda: model[0](X, text))
    assert count == COMPUTED
    assert torch.equal(after, fresh(model, text))


def test_what_would_take_much_memory_is_not_kept(products):
    model, text = fastsd.patch(layer()), torch.randn(2, 2800, 10)
    for count in (COMPUTED, COMPUTED, COMPUTED):
        assert products(lambda: model[0](X, text))[1] == count
    assert products(lambda: [model[0](X, text[:, :2000].contiguous()) for _ in range(3)])[1] == 2 * COMPUTED


def test_memory_that_has_been_freed():
    model = fastsd.patch(layer())
    warm(model, TEXT)
    model[0].to_k.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="storage"):
        model[0](X, TEXT)


def test_a_norm_of_the_text(products):
    """It is computed at each call; what counts is what it gives."""
    model = fastsd.patch(layer(cross_attention_norm="layer_norm"))
    warm(model, TEXT)
    assert products(lambda: model[0](X, TEXT))[1] == KEPT
    model[0].norm_cross.weight.data[3] += 0.5
    after, count = products(lambda: model[0](X, TEXT))
    assert count == COMPUTED
    assert torch.equal(after, fresh(model, TEXT))


class _DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class _FunctionMode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [_DispatchMode, _FunctionMode])
def test_modes_see_every_product(mode, products):
    model = fastsd.patch(layer())
    warm(model, TEXT)
    for _ in range(3):
        with mode():
            after, count = products(lambda: model[0](X, TEXT))
        assert count == COMPUTED
    assert torch.equal(after, fresh(model, TEXT))


def test_fake_tensors(products):
    model = fastsd.patch(layer())
    before = warm(model, TEXT)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for _ in range(3):
            assert model[0](mode.from_tensor(X), mode.from_tensor(TEXT)).shape == X.shape
    after, count = products(lambda: model[0](X, TEXT))
    assert count == KEPT
    assert torch.equal(after, before)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_a_trace_holds_no_text():
    model = fastsd.patch(layer())
    warm(model, TEXT)
    traced = torch.jit.trace(lambda x, text: model[0](x, text), (X, TEXT), check_trace=False)
    assert torch.equal(traced(X, OTHER), fresh(model, OTHER))


def test_compiled_and_exported():
    model = fastsd.patch(layer())
    warm(model, TEXT)
    compiled = torch.compile(lambda x, text: model[0](x, text), backend="eager", fullgraph=True)
    exported = torch.export.export(model[0], (X, TEXT)).module()
    for run in (compiled, exported):
        assert torch.equal(run(X, TEXT), fresh(model, TEXT))
        assert torch.equal(run(X, OTHER), fresh(model, OTHER))
    model[0].to_v.weight.data[3, 4] += 0.5
    assert torch.equal(compiled(X, TEXT), fresh(model, TEXT))


def test_autocast_and_other_dtypes():
    model = fastsd.patch(layer())
    warm(model, TEXT)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model[0](X, TEXT), layer()[0](X, TEXT))
    assert torch.equal(model.double()[0](X.double(), TEXT.double()), layer().double()[0](X.double(), TEXT.double()))


def test_less_precision(products):
    model = fastsd.patch(layer())
    warm(model, TEXT)
    setting = torch.backends.mkldnn.matmul
    before, setting.fp32_precision = setting.fp32_precision, "bf16"
    try:
        assert products(lambda: model[0](X, TEXT))[1] == COMPUTED
    finally:
        setting.fp32_precision = before


def test_another_backend(products, monkeypatch):
    model = fastsd.patch(layer())
    before = warm(model, TEXT)
    with monkeypatch.context() as patch:
        patch.setenv("FASTSD_BACKEND", "reference")
        after, count = products(lambda: model[0](X, TEXT))
        assert count >= COMPUTED
        assert torch.equal(after, fresh(model, TEXT))
    assert products(lambda: model[0](X, TEXT))[1] == KEPT
    fastsd.patch(model, backend="reference")
    assert products(lambda: model[0](X, TEXT))[1] >= COMPUTED
    fastsd.patch(model, backend=None)
    assert torch.equal(warm(model, TEXT), before)


@pytest.mark.gradients
def test_gradients_after_inference():
    model, stock = fastsd.patch(layer()), layer()
    warm(model, TEXT)
    gradients = []
    for each in (model, stock):
        text = TEXT.clone().requires_grad_()
        each.requires_grad_()
        each[0](X, text).square().sum().backward()
        gradients.append([text.grad, *(parameter.grad for parameter in each.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.gradients
def test_inference_mode_and_outside(products):
    """What is made in either serves the other, also where a gradient is taken behind it."""
    model = fastsd.patch(layer()).requires_grad_()
    with torch.inference_mode():
        text = TEXT.clone()
        before = warm(model, text)
    model.requires_grad_(False)
    for guard in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with guard():
            after, count = products(lambda: model[0](X, TEXT))
        assert count == KEPT
        assert torch.equal(after, before)
    (kept,) = settings_of(model[0]).kept["texts"]
    assert not any(made.is_inference() or made.requires_grad for made in kept.made)
    scale = torch.ones(24, requires_grad=True)
    (model[0](X, TEXT) * scale).sum().backward()
    assert scale.grad is not None


def test_nobody_writes_to_what_is_kept():
    model = fastsd.patch(layer(rescale_output_factor=1.5, residual_connection=True))
    warm(model, TEXT)
    kept = [made.clone() for made in settings_of(model[0]).kept["texts"][0].made]
    model[0](X, TEXT).zero_()
    assert all(map(torch.equal, settings_of(model[0]).kept["texts"][0].made, kept))


def test_copies_and_files_hold_nothing_of_it():
    model = fastsd.patch(layer())
    pickled, keys = pickle.dumps(model), list(model.state_dict())
    warm(model, TEXT)
    assert pickle.dumps(model) == pickled
    assert list(model.state_dict()) == keys
    for copied in (copy.deepcopy(model[0]), copy.copy(model[0])):
        assert set(vars(copied)) == set(vars(layer()[0]))


def test_unpatch_forgets_it(products):
    model = fastsd.patch(layer())
    warm(model, TEXT)
    made = [weakref.ref(tensor) for tensor in settings_of(model[0]).kept["texts"][0].made]
    fastsd.unpatch(model)
    gc.collect()
    assert [each() for each in made] == [None, None]
    assert torch.equal(model[0](X, TEXT), layer()[0](X, TEXT))
    fastsd.patch(model)
    assert products(lambda: model[0](X, TEXT))[1] == COMPUTED


def test_two_texts_are_kept_and_the_one_used_longest_ago_goes(products):
    model = fastsd.patch(layer())
    texts = [TEXT, OTHER, TEXT + OTHER]
    for text in texts[:2]:
        warm(model, text)
    assert [products(lambda text=text: model[0](X, text))[1] for text in texts[:2] * 2] == [KEPT] * 4
    model[0](X, TEXT)
    warm(model, texts[2])
    assert len(settings_of(model[0]).kept["texts"]) == 2
    assert [products(lambda text=text: model[0](X, text))[1] for text in texts[::2]] == [KEPT] * 2
    assert products(lambda: model[0](X, OTHER))[1] == COMPUTED
    assert len(settings_of(model[0]).kept["texts"]) == 2


@pytest.mark.parametrize("count", [2, 3])
def test_threads_with_texts_of_their_own(count):
    model = fastsd.patch(layer())
    texts = [TEXT, OTHER, TEXT + OTHER][:count]
    expected = [fresh(model, text) for text in texts]
    failures, start = [], threading.Barrier(count)

    def work(text, expected):
        start.wait()
        with torch.no_grad():
            failures.extend(i for i in range(100) if not torch.equal(model[0](X, text), expected))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(texts, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("edited", ["text", "weight"])
def test_an_edit_while_it_is_made(edited, monkeypatch):
    """As another thread may do it; the weight is then edited back."""
    model, text = fastsd.patch(layer()), TEXT.clone()
    tensor = text if edited == "text" else model[0].to_v.weight
    before, old = model[0](X, text), tensor.clone()
    project = fast_text._project

    def edit_and_project(*args):
        tensor.data.mul_(1.5)
        return project(*args)

    with monkeypatch.context() as patch:
        patch.setattr(fast_text, "_project", edit_and_project)
        model[0](X, text)
    tensor.data.copy_(old)
    assert torch.equal(model[0](X, text), before)


def _add(model):
    torch.manual_seed(3)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    model.add_adapter(config, adapter_name="one")


LORA = {
    "load": _add,
    "weigh": lambda model: model.set_adapters(["one"], [0.3]),
    "fuse": lambda model: model.fuse_lora(),
    "unfuse": lambda model: model.unfuse_lora(),
    "fuse_again": lambda model: model.fuse_lora(),
    "unload_fused": lambda model: model.unload_lora(),
}


def test_lora():
    """Fused and unloaded, it has edited plain layers, through ``.data``."""
    stock, model = build(), fastsd.patch(build())
    results = [call(model)]
    for event in LORA.values():
        for _ in range(3):
            assert_as_stock(call(model), call(stock))
            assert torch.equal(call(model), call(fastsd.patch(copy.deepcopy(model))))
        event(stock)
        event(model)
        results.append(call(model))
        assert_as_stock(results[-1], call(stock))
    assert not torch.equal(results[-1], results[0])
    assert type(model.mid_block.attentions[0].transformer_blocks[0].attn2.to_k) is nn.Linear


@pytest.mark.parametrize("gri", [None, fastsd.GRI(window=4, pool=2, levels=(0, 1))], ids=["full", "gri"])
def test_steps_of_a_model(gri, products):
    model = fastsd.patch(build(), gri=gri)
    steps = [{"timestep": torch.tensor(t), "sample": torch.randn(2, 4, 16, 16)} for t in (900, 500, 100)]
    text = {"encoder_hidden_states": torch.randn(2, 7, 8)}
    results = [call(model, **step, **text) for step in steps]
    for step, result in zip(steps, results, strict=True):
        assert torch.equal(call(fastsd.patch(build(), gri=gri), **step, **text), result)
    kept = [settings_of(m).kept for m in model.modules() if settings_of(m) is not None]
    assert sum("texts" in each for each in kept) == 4
