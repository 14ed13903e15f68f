"""resnet_block on the backends that run on the host, against its reference."""

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D

from fastsd_kernels import resnet_block
from fastsd_kernels.resnet_block import op
from tests.proving.op_suite import OpSuite


class TestResnetBlock(OpSuite):
    op = op


@pytest.mark.parametrize("out_channels", [16, 24])
def test_the_reference_is_the_block_of_diffusers(out_channels):
    block = ResnetBlock2D(
        in_channels=16, out_channels=out_channels, temb_channels=12, groups=4, groups_out=8, output_scale_factor=2.0
    )
    block, x, temb = block.double(), torch.randn(2, 16, 5, 6).double(), torch.randn(2, 12).double()
    shortcut = block.conv_shortcut
    ours = resnet_block(
        x,
        block.conv1.weight,
        block.conv2.weight,
        block.conv1.bias,
        block.conv2.bias,
        num_groups=4,
        norm1_weight=block.norm1.weight,
        norm1_bias=block.norm1.bias,
        num_groups_out=8,
        norm2_weight=block.norm2.weight,
        norm2_bias=block.norm2.bias,
        eps=block.norm1.eps,
        channel_bias=block.time_emb_proj(torch.nn.functional.silu(temb)),
        shortcut_weight=None if shortcut is None else shortcut.weight,
        shortcut_bias=None if shortcut is None else shortcut.bias,
        output_scale=0.5,
        backend="reference",
    )
    torch.testing.assert_close(ours, block(x, temb))


def test_second_gradients():
    like = {"dtype": torch.float64, "requires_grad": True}
    x, skip = torch.randn(1, 2, 3, 2, **like), torch.randn(1, 2, 3, 2, **like)
    conv1, conv2, shortcut = (torch.randn(shape, **like) for shape in ((2, 4, 3, 3), (2, 2, 3, 3), (2, 4, 1, 1)))
    torch.autograd.gradgradcheck(
        lambda x, s, a, b, c: resnet_block(x, a, b, skip=s, num_groups=2, eps=1e-3, shortcut_weight=c),
        (x, skip, conv1, conv2, shortcut),
    )


def test_the_result_of_a_block_without_parts_is_no_alias():
    x = torch.randn(1, 4, 3, 3)
    y = resnet_block(x, None, None)
    y += 1
    assert not torch.equal(x, y)
