"""The CUDA sources, as package data: ``fastsd_kernels.cuda_sources``."""
