"""What an op does not take: one error that says what was expected and what was given, from whichever backend."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

import fastsd_kernels
from fastsd_kernels.dispatch import BackendUnavailable, ops
from fastsd_kernels.testing import Sample
from tests.artefacts import ROOT
from tests.contract import covering
from tests.contract.patterns import patterns
from tests.runners import RUNNERS, interpreter, protocol
from tests.runners.host import as_a_card

BAD = [pytest.param(op, bad, id=f"{op.name}-{bad}") for op in ops() for bad in op.cases.bad_samples("cpu")]
OPS = pytest.mark.parametrize("op", ops(), ids=lambda op: op.name)


@pytest.mark.parametrize(("op", "bad"), BAD)
def test_bad_samples(op, bad):
    with pytest.raises(bad.error) as caught:
        getattr(fastsd_kernels, op.name)(**bad.kwargs)
    for words in bad.says:
        assert words in str(caught.value)


def refusal(op, sample, backend):
    """The sentence of the backend itself, as if this machine had all that it needs."""
    with protocol.attributes((op.backends[backend].module, "unavailable", lambda: None)):
        return protocol.refusal(op, sample, backend)


def samples(op):
    """One sample of each pattern of arguments."""
    return [covering.samples(op, "cpu", torch.float32)[name] for name in patterns(op)]


@OPS
@pytest.mark.parametrize("words", [("triton", "GPU", "backend='cpu'"), ("cuda", "cuda backend needs CUDA tensors")])
def test_tensors_on_the_cpu(op, words):
    backend, *_ = words
    for sample in samples(op):
        sentence = refusal(op, sample, backend) or ""
        algorithm = sample.kwargs.get("algorithm")
        if algorithm is None or algorithm not in sentence:
            assert sentence.startswith(f"{op.name}: backend '{backend}' cannot be used: ")
            assert "cpu" in sentence
            assert all(word in sentence for word in words), sentence


@OPS
@pytest.mark.parametrize(("backend", "word"), [("triton", "GPU"), ("cuda", "CUDA")])
def test_forced_without_a_card(op, backend, word, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("torch sees a card")
    says = f"{op.name}: backend '{backend}' cannot be used: .*{word}"
    with pytest.raises(BackendUnavailable, match=says):
        protocol.call(op, samples(op)[0], backend)
    monkeypatch.setenv("FASTSD_BACKEND", backend)
    with pytest.raises(BackendUnavailable, match=says):
        protocol.call(op, samples(op)[0], None)


@OPS
def test_float64(op):
    sample = samples(op)[0].map_tensors(Tensor.double)
    assert "is torch.float64" in refusal(op, sample, "cpu")
    assert "got torch.float64" in refusal(op, sample, "triton")
    with as_a_card(lambda *args, **kwargs: None):
        sentence = protocol.refusal(op, sample, "cuda")
    # torch's own convolutions take it
    assert sentence is None if op.name in ("conv2d", "resnet_block") else "is torch.float64" in sentence


@OPS
def test_arguments_of_unknown_dtypes(op):
    for sample in samples(op):
        for name, value in sample.kwargs.items():
            if isinstance(value, Tensor):
                changed = Sample(sample.name, sample.kwargs | {name: value.to(torch.float8_e5m2)})
                with pytest.raises(TypeError, match=f"{name}: .*got torch.float8_e5m2"):
                    protocol.call(op, changed, "reference")


@OPS
def test_the_interpreter_refuses_bfloat16(op):
    sample = samples(op)[0].map_tensors(Tensor.bfloat16)
    with interpreter.as_interpreted():
        sentence = protocol.refusal(op, sample, "triton")
    for words in ("bfloat16", "TRITON_INTERPRET"):
        assert words in sentence


@OPS
@pytest.mark.parametrize("runner", [RUNNERS[name] for name in ("cpu", "interpreter", "host")], ids=lambda r: r.name)
def test_samples_that_a_runner_does_not_take(op, runner):
    """Only those that ask for an algorithm or a strategy: another one would be left out of the contract's tests."""
    left_out = getattr(op.cases, "NOT_INTERPRETED", ()) if runner.name == "interpreter" else ()
    if runner.name == "host":
        left_out = ("pruned_identity",)  # a sum, which torch computes
    known = covering.samples(op, "cpu", torch.float16)
    for name in known.keys() - covering.served(op, runner, torch.float16).keys():
        chosen = known[name].kwargs.get("algorithm") or known[name].kwargs.get("strategy")
        assert chosen is not None or name.startswith(left_out), name
        if runner.name == "cpu":
            assert repr(chosen) in refusal(op, known[name], "cpu")


MISSING = """
import sys
sys.modules["triton"] = sys.modules["cuda"] = sys.modules["cuda.core"] = None
import torch
from fastsd_kernels.dispatch import ops
from tests.runners import protocol
for op in ops():
    sample = next(iter(op.cases.samples("cpu", torch.float32)))
    for backend in ("triton", "cuda"):
        print(protocol.refusal(op, sample, backend))
"""


def test_missing_packages():
    """Without triton and without cuda-python the library imports, and says what to install."""
    child = subprocess.run([sys.executable, "-c", MISSING], cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    lines = child.stdout.splitlines()
    assert len(lines) == 2 * len(ops())
    for triton, cuda in zip(lines[::2], lines[1::2], strict=True):
        assert "pip install triton" in triton
        assert "backend 'cuda' cannot be used: " in cuda


# Triton's other kernels have tiles of so many elements that 2³¹ of them fit into no card, as do residual blocks
LIMITED = [(op, "cuda") for op in ops() if op.name != "resnet_block"] + [
    (op, "triton") for op in ops() if op.name in ("gri_attention", "attention")
]


@pytest.mark.parametrize(("op", "backend"), LIMITED, ids=lambda given: getattr(given, "name", given))
def test_more_blocks_than_a_grid_has(op, backend):
    """Of 2³⁰ + 1 items of a batch, all of them the same memory, which alone are less than a grid has blocks."""
    samples = covering.samples(op, "cpu", torch.float16)
    sample = next(sample for name, sample in samples.items() if name.endswith("contiguous"))
    batch = covering.first_tensor(sample).shape[0]
    many = {
        name: value[:1].expand(2**30 + 1, *value.shape[1:])
        for name, value in sample.kwargs.items()
        if name in ("x", "q", "k", "v", "alpha", "channel_bias") and isinstance(value, Tensor)
    }
    assert all(sample.kwargs[name].shape[0] == batch for name in many)
    if op.name == "conv2d":
        many["algorithm"] = "implicit_gemm"
    with as_a_card(None) if backend == "cuda" else interpreter.as_interpreted():
        sentence = protocol.refusal(op, Sample("many", sample.kwargs | many), backend) or ""
    assert "1073741825" in sentence or str(2**31 - 1) in sentence
