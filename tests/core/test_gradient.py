"""Which gradient an op takes: the fused one that it has, or its reference's."""

import pytest
import torch
from torch import Tensor

from fastsd_kernels.gradient import gradient_of

asked: list[str | None] = []


def _cubed(x):
    return x**3


def _fused(grad, backend, x):
    asked.append(backend)
    return None if backend == "reference" else (grad * 3 * x**2,)


class Cubed(torch.autograd.Function):
    """What :class:`fastsd_kernels.dispatch.Op` makes of the two functions, without a schema."""

    save, differentiate = map(staticmethod, gradient_of(_cubed, _fused))
    generate_vmap_rule = False

    @staticmethod
    def forward(ctx, x, backend):
        ctx.backend = backend
        Cubed.save(ctx, (x,), x)
        return _cubed(x)

    @staticmethod
    def backward(ctx, grad):
        return *Cubed.differentiate(ctx, grad), None


@pytest.fixture
def x():
    asked.clear()
    return torch.tensor([1.0, 2.0], requires_grad=True)


@pytest.mark.parametrize("backend", [None, "triton", "reference"])
def test_the_backend_of_the_call_is_told(x, backend):
    Cubed.apply(x, backend).sum().backward()
    assert asked == [backend]
    torch.testing.assert_close(x.grad, torch.tensor([3.0, 12.0]))


def test_batched_gradients_are_the_references(x):
    y = Cubed.apply(x, None)
    (grads,) = torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True)
    assert not asked
    torch.testing.assert_close(grads, torch.diag(torch.tensor([3.0, 12.0])))


def test_second_gradients_are_the_references(x):
    (grad,) = torch.autograd.grad(Cubed.apply(x, None).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert not asked
    torch.testing.assert_close(second, 6 * x)


def test_autocast_around_the_backward_pass_changes_nothing():
    def product(a: Tensor) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return a @ a

    seen: list[bool] = []
    save, differentiate = gradient_of(product)

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a):
            ctx.backend = None
            save(ctx, (a,), a)
            return product(a)

        @staticmethod
        def backward(ctx, grad):
            return differentiate(ctx, grad)

    a = torch.randn(8, 8, requires_grad=True)
    y = Product.apply(a)
    plain = torch.autograd.grad(y.sum(), a, retain_graph=True)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.autograd.grad(y.sum(), a)[0], plain)
    assert seen == [False] * 3
