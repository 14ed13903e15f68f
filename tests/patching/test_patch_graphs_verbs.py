"""What patch, unpatch, copies, hooks and compilers make of models with CUDA graphs."""

import copy
import inspect
import io
import threading

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn

import fastsd
from fastsd.models import example_inputs, flat_output
from fastsd.nn.graphs import graphs_of
from tests.patching.models import Pipeline, assert_as_stock, assert_untouched, call, fast, fingerprint
from tests.patching.tape import build, events, graphed, state


class _Doubled(ModelHook):
    def post_forward(self, module, output):
        return (2 * output[0],)


class TestTrace:
    def test_row_15_unpatch(self, tape):
        model = build()
        before, stock = fingerprint(model), call(model)
        fastsd.patch(model, cuda_graphs=True)
        call(model)
        assert_untouched(fastsd.unpatch(model), before)
        assert torch.equal(call(model), stock)
        assert state(model) is None

    def test_names(self):
        model, stock = graphed(), build()
        assert type(model) is type(stock)
        assert list(model.state_dict()) == list(stock.state_dict())
        assert inspect.signature(model.forward) == inspect.signature(stock.forward)
        assert model.forward.__name__ == "forward"

    @pytest.mark.parametrize("how", ["deepcopy", "copy", "pickle_1", "pickle_5", "save_pretrained", "replica"])
    def test_row_15_copies_are_stock(self, tape, how, tmp_path):
        model = graphed()
        expected = call(build())
        call(model)
        if how == "save_pretrained":
            model.save_pretrained(tmp_path)
            copied = type(model).from_pretrained(tmp_path)
        elif how == "replica":
            copied = model._replicate_for_data_parallel()
        elif how == "copy":
            copied = copy.copy(model)
        elif how == "deepcopy":
            copied = copy.deepcopy(model)
        else:
            file = io.BytesIO()
            torch.save(model, file, pickle_protocol=int(how[-1]))
            assert b"fastsd" not in file.getvalue()
            file.seek(0)
            copied = torch.load(file, weights_only=False)
        assert type(copied) is type(model)
        assert not {"forward", "__reduce_ex__", "_replicate_for_data_parallel", "_apply", "_fastsd_graphs"} & set(
            vars(copied)
        )
        if how != "replica":  # whose parameters DataParallel sets
            assert_as_stock(call(copied), expected)
        call(model)
        # saving writes into the configuration, which a forward may read
        anew = ["capture"] if how == "save_pretrained" else []
        assert events(tape) == ["capture", "replay", *anew, "replay"]

    def test_row_15_hook_around_the_forward(self, tape):
        """What offloads a whole model runs at every call; a copy and the unpatched model keep it."""
        model = graphed()
        inputs = example_inputs(model, 2, 16, tokens=7) | {"return_dict": False}
        (plain,) = model(**inputs)
        (stock,) = build()(**inputs)
        add_hook_to_module(model, _Doubled())
        for _ in range(2):
            assert torch.equal(model(**inputs)[0], 2 * plain)
        assert events(tape) == ["capture", "replay", "capture", "replay", "replay"]
        assert state(model).reason is None
        copied = copy.deepcopy(model)
        assert_as_stock(copied(**inputs)[0], 2 * stock)
        assert events(tape, "capture") == ["capture"] * 2
        fastsd.unpatch(model)
        assert torch.equal(model(**inputs)[0], 2 * stock)
        remove_hook_from_module(model)
        assert torch.equal(model(**inputs)[0], stock)
        fastsd.patch(model, cuda_graphs=True)  # over what the hook has left
        assert torch.equal(model(**inputs)[0], plain)
        assert events(tape, "capture") == ["capture"] * 3
        fastsd.unpatch(model)
        assert "forward" not in vars(model)

    def test_patch_again_under_a_hook(self, tape):
        model = graphed()
        add_hook_to_module(model, ModelHook())
        assert state(fastsd.patch(model, cuda_graphs=3)).most == 3
        call(model)
        assert events(tape) == ["capture", "replay"]

    def test_hook_while_graphs_were_away(self, tape):
        """It stays; graphs do not come back over it."""
        model = graphed()
        inputs = example_inputs(model, 2, 16, tokens=7) | {"return_dict": False}
        (plain,) = model(**inputs)
        with pytest.warns(UserWarning, match="its CUDA graphs not back"), fastsd.patched(model, cuda_graphs=False):
            add_hook_to_module(model, _Doubled())
        assert torch.equal(model(**inputs)[0], 2 * plain)
        assert state(model) is None

    def test_forward_that_passes_graphs_by(self, tape):
        model = graphed()
        model.forward = type(model).forward.__get__(model).__call__
        call(model)
        assert "something stands in the place of its forward" in state(model).reason

    def test_model_inside_of_another(self, tape):
        class Both(nn.Module):
            def __init__(self, net):
                super().__init__()
                self.net = net

            def forward(self, sample, timestep, **kwargs):
                return self.net(sample, timestep, **kwargs)

        both = fastsd.patch(Both(graphed()), cuda_graphs=True)
        both(**example_inputs(both.net, 2, 16, tokens=7))
        assert state(both).reason == "net has CUDA graphs of its own"
        assert events(tape) == ["capture", "replay"]

    def test_hooks_of_torch_on_the_model(self, tape):
        model = graphed()
        calls = []
        model.register_forward_pre_hook(lambda module, args: calls.append(1))
        for _ in range(3):
            call(model)
        assert len(calls) == 3
        assert events(tape) == ["capture", "replay", "replay", "replay"]

    def test_row_15_compile(self, tape):
        model = graphed()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert_as_stock(call(compiled), call(build()))
        assert events(tape) == []
        assert "it is compiled" in state(compiled).reason
        assert state(model).reason is None
        model.compile(backend="eager", fullgraph=True)
        assert_as_stock(call(model), call(build()))
        assert events(tape) == []
        assert "it is compiled" in state(model).reason

    @pytest.mark.parametrize(
        "strict", [pytest.param(True, marks=pytest.mark.long), False], ids=["strict", "non_strict"]
    )
    def test_row_15_export(self, tape, strict):
        model = graphed()
        inputs = example_inputs(model, 2, 16, tokens=7)
        program = torch.export.export(model, (), inputs, strict=strict)
        assert_as_stock(flat_output(program.module()(**inputs)), call(build()))
        assert events(tape) == []

    def test_row_15_two_threads(self, tape):
        model, eager = graphed(), fastsd.patch(build())
        inputs = [example_inputs(model, 1, 8, tokens=7) for _ in range(2)]
        inputs[1]["sample"] = inputs[1]["sample"] + 1
        expected = [eager(**each)[0] for each in inputs]
        failures = []

        @torch.no_grad()
        def work(each, right):
            for _ in range(10):
                if not torch.equal(model(**each)[0], right):
                    failures.append(each)

        threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert events(tape, "capture") == ["capture"]

    def test_two_models(self, tape):
        one, other = graphed(seed=1), graphed(seed=2)
        first = call(one), call(other)
        assert torch.equal(call(one), first[0])
        assert torch.equal(call(other), first[1])
        fastsd.unpatch(one)
        assert torch.equal(call(other), first[1])


class TestPatch:
    def test_again(self):
        model = graphed()
        before = fingerprint(model)
        assert_untouched(fastsd.patch(model), before)
        assert_untouched(fastsd.patch(model, cuda_graphs=True), before)
        assert_untouched(fastsd.patch(model, cuda_graphs=8), before)
        assert state(fastsd.patch(model, cuda_graphs=3)).most == 3
        assert state(fastsd.patch(model)).most == 3
        assert state(fastsd.patch(model, cuda_graphs=False)) is None
        assert all(fast(model))
        assert "forward" not in vars(model)

    def test_patched(self, tape):
        model = build()
        before = fingerprint(model)
        with fastsd.patched(model, cuda_graphs=2):
            call(model)
            assert state(model).held == 1
        assert_untouched(model, before)
        fastsd.patch(model, cuda_graphs=4)
        call(model)
        earlier = graphs_of(model)
        with fastsd.patched(model, cuda_graphs=False):
            assert state(model) is None
        assert graphs_of(model) is earlier
        call(model)
        assert state(model).held == 1
        for inside in (2, False):
            fastsd.patch(model, cuda_graphs=4)
            with fastsd.patched(model, cuda_graphs=inside):
                fastsd.unpatch(model)
            assert state(model) is None

    def test_pipeline(self):
        pipe = Pipeline(unet=build(), vae=build("vae"), controlnet=[build("controlnet")])
        report = fastsd.report(fastsd.patch(pipe, cuda_graphs=True))
        assert {part.name: part.cuda_graphs is not None for part in report.parts} == {
            "unet": True,
            "vae": False,
            "controlnet.0": True,
        }
        fastsd.unpatch(pipe)
        assert all(part.cuda_graphs is None for part in fastsd.report(pipe).parts)

    def test_inside_of_another_model(self):
        model = graphed()
        fastsd.unpatch(nn.Sequential(model))
        assert "forward" not in vars(model)

    @pytest.mark.parametrize("wrong", [-1, 2.0, "8"], ids=repr)
    def test_wrong_number(self, wrong):
        model = build()
        before = fingerprint(model)
        with pytest.raises(ValueError, match="cuda_graphs: expected True, False or a number of graphs"):
            fastsd.patch(model, cuda_graphs=wrong)
        assert_untouched(model, before)

    def test_model_that_is_not_called_by_its_forward(self):
        model = build("vae")
        before = fingerprint(model)
        with pytest.raises(ValueError, match="cuda_graphs: expected a U-Net, a ControlNet or a pipeline"):
            fastsd.patch(model, cuda_graphs=True)
        assert_untouched(model, before)

    def test_hook_before_patch(self):
        model = build()
        add_hook_to_module(model, ModelHook())
        before = fingerprint(model)
        with pytest.raises(fastsd.PatchError, match="has an instance forward"):
            fastsd.patch(model, cuda_graphs=True)
        assert_untouched(model, before)
        remove_hook_from_module(model)
        assert state(fastsd.patch(model, cuda_graphs=True)) is not None
