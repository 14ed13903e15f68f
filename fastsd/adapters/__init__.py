"""Adapters that were trained on a full U-Net, for the pruned ones that were made from it."""

from fastsd.adapters.controlnet import controlnet_from_unet, fit_controlnet
from fastsd.adapters.ip_adapter import fit_ip_adapter
from fastsd.adapters.lora import fit_lora
from fastsd.adapters.origin import Origin, origin_of
from fastsd.adapters.report import FitReport
from fastsd.adapters.scales import set_adapters, set_ip_adapter_scale
from fastsd.adapters.t2i_adapter import fit_t2i_adapter
from fastsd.compress.compression import Compression

__all__ = [
    "Compression",
    "FitReport",
    "Origin",
    "controlnet_from_unet",
    "fit_controlnet",
    "fit_ip_adapter",
    "fit_lora",
    "fit_t2i_adapter",
    "origin_of",
    "set_adapters",
    "set_ip_adapter_scale",
]
