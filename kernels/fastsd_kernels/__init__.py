"""Fused kernels for Stable Diffusion U-Nets, as torch ops.

Each op is a function here, ``torch.ops.fastsd.<op>`` for graph capture, and a package of its own with the
reference that defines it and the backends that serve it.
"""

from fastsd_kernels.attention import attention
from fastsd_kernels.cond_conv2d import cond_conv2d
from fastsd_kernels.conv2d import conv2d
from fastsd_kernels.gri_attention import gri_attention
from fastsd_kernels.group_norm_silu import group_norm_silu
from fastsd_kernels.linear import linear
from fastsd_kernels.resnet_block import resnet_block

__all__ = ["attention", "cond_conv2d", "conv2d", "gri_attention", "group_norm_silu", "linear", "resnet_block"]
