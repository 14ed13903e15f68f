"""Row 10 of the compatibility matrix: compilers and tracers see through a patched model."""

from collections import Counter

import pytest
import torch
from torch import nn

import fastsd
from fastsd.models import example_inputs, flat_output
from tests.combinations import long
from tests.patching.models import assert_as_stock, block_count, build, call, fused_in, norm_count

AOT_EAGER = torch._dynamo.lookup_backend("aot_eager")


@pytest.fixture(autouse=True)
def _no_graph_of_an_earlier_test():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs:
    """A compiler backend that keeps the graphs and runs them, traced through autograd or as they are."""

    def __init__(self, *, is_traced=True):
        self.graphs, self.is_traced = [], is_traced

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return AOT_EAGER(graph, inputs) if self.is_traced else graph

    def op_calls(self):
        """Norms in fastsd's ops per graph; dynamo empties the graphs that it gives up for a better one."""
        graphs = [list(graph.graph.nodes) for graph in self.graphs]
        return [sum(fused_in(node.target, node.args, "norms") for node in nodes) for nodes in graphs if nodes]


@pytest.mark.parametrize("name", ["unet", *long("no_attention_scale_shift", "no_attention")])
def test_row_10_fullgraph(name):
    model = build(name)
    stock = call(model)
    fastsd.patch(model)
    graphs = Graphs()
    model.compile(fullgraph=True, backend=graphs)
    assert_as_stock(call(model), stock)
    assert graphs.op_calls() == [norm_count(name)]


def test_row_10_dynamic():
    model = build("no_attention")
    sizes = [(2, 16), (3, 8), (4, 24)]
    stock = [call(model, *size) for size in sizes]
    fastsd.patch(model)
    graphs = Graphs()
    model.compile(fullgraph=True, dynamic=True, backend=graphs)
    for size, expected in zip(sizes, stock, strict=True):
        assert_as_stock(call(model, *size), expected)
    assert graphs.op_calls() == [10]


@pytest.mark.gradients
def test_row_10_compiled_training():
    model, stock = fastsd.patch(build("no_attention")), build("no_attention")
    graphs = Graphs()
    inputs = example_inputs(stock, 2, 16)
    stock(**inputs)[0].square().sum().backward()
    torch.compile(model, fullgraph=True, backend=graphs)(**inputs)[0].square().sum().backward()
    assert graphs.op_calls() == [10]
    for (name, parameter), (_, expected) in zip(model.named_parameters(), stock.named_parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_row_10_patch_and_unpatch_a_compiled_model():
    """What was compiled before is not used for what the model is now."""
    model = build("no_attention")
    stock = call(model)
    graphs = Graphs(is_traced=False)
    model.compile(fullgraph=True, backend=graphs)
    call(model)
    assert_as_stock(call(fastsd.patch(model)), stock)
    assert torch.equal(call(fastsd.unpatch(model)), stock)
    assert graphs.op_calls()[:2] == [0, 10]


def test_row_10_repeated_blocks():
    model = build("no_attention")
    stock = call(model)
    fastsd.patch(model)
    model._repeated_blocks = ["ResnetBlock2D"]
    graphs = Graphs(is_traced=False)
    model.compile_repeated_blocks(fullgraph=True, backend=graphs)
    assert_as_stock(call(model), stock)
    assert graphs.op_calls()
    assert set(graphs.op_calls()) == {2}


@pytest.mark.parametrize("strict", [False, *long(True)], ids=["non_strict", "strict"])
def test_row_10_export(strict):
    name = "no_attention" if strict else "unet"
    model = build(name)
    inputs = example_inputs(model, 2, 16, tokens=7)
    stock = model(**inputs)[0]
    program = torch.export.export(fastsd.patch(model), (), inputs, strict=strict)
    assert sum(fused_in(node.target, node.args, "norms") for node in program.graph.nodes) == norm_count(name)
    assert_as_stock(program.module()(**inputs)[0].double(), stock.double())
    # each operation knows which residual block it is of
    known = {module for node in program.graph.nodes for module in node.meta.get("nn_module_stack", {}).values()}
    assert sum(str(kind).endswith("ResnetBlock2D") for _, kind in known) == block_count(name)


def test_row_10_hook_put_on_a_compiled_block():
    """A block that is compiled after a hook was put on its norm runs the hook."""
    model, stock = fastsd.patch(build("no_attention")), build("no_attention")
    for each in (model, stock):
        each.mid_block.resnets[0].norm1.register_forward_hook(lambda module, args, output: 3 * output)
    model.compile(fullgraph=True, backend="eager")
    assert_as_stock(call(model), call(stock))


def test_row_10_one_compiled_block():
    """The wrapper of a compiled module shows the attributes of the module inside, and is none of ours."""
    model = build("no_attention")
    stock = call(model)
    model.mid_block.resnets[0] = torch.compile(model.mid_block.resnets[0], fullgraph=True, backend="eager")
    fastsd.patch(model, strict=True)
    assert_as_stock(call(model), stock)
    fastsd.patch(model, backend="reference")
    replaced = Counter(entry.class_name for entry in fastsd.report(model).entries if entry.replaced)
    assert replaced == {"ResnetBlock2D": block_count("no_attention"), "UpBlock2D": 1}
    assert torch.equal(call(fastsd.unpatch(model)), stock)


class _Positional(nn.Module):
    """A model, called with the tensors of its example in their order; of a VAE its decoder."""

    def __init__(self, model):
        super().__init__()
        self.model = model.requires_grad_(False)

    def example(self, size, seed):
        tensors = {key: x for key, x in example_inputs(self.model, 2, size, tokens=7).items() if torch.is_tensor(x)}
        like = torch.Generator().manual_seed(seed)
        return {key: x.float().normal_(generator=like).to(x.dtype) for key, x in tensors.items()}

    def forward(self, *tensors):
        given = dict(zip(self.example(16, 0), tensors, strict=True))
        return flat_output(getattr(self.model, "decode", self.model)(**given, return_dict=False))


@pytest.mark.parametrize("name", ["cross_up", "vae", *long("unet", "linear_projections", "controlnet")])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_row_10_traced(name):
    """With ops of fastsd inside, for sizes and texts that it was not traced with."""
    stock, model = _Positional(build(name)), _Positional(fastsd.patch(build(name)))
    traced = torch.jit.trace(model, tuple(model.example(16, 0).values()), check_trace=False)
    for size, seed in ((16, 1), (24, 2)):
        given = stock.example(size, seed).values()
        assert_as_stock(traced(*given), stock(*given))
    assert "fastsd::" in str(traced.inlined_graph)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_row_10_a_trace_of_gri_attention_is_of_one_map():
    """Maps of as many tokens would else be cut into each other's windows."""
    model = _Positional(fastsd.patch(build(), gri=fastsd.GRI(window=8, pool=4)))
    traced = torch.jit.trace(model, tuple(model.example(16, 0).values()), check_trace=False)
    given = model.example(16, 1)
    assert_as_stock(traced(*given.values()), model(*given.values()))
    given["sample"] = given["sample"].reshape(2, 4, 8, 32)
    assert torch.isfinite(model(*given.values())).all()
    with pytest.raises(RuntimeError, match="expanded size"):
        traced(*given.values())
