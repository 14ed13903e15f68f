"""The cards that every CUDA and Triton kernel is compiled for: Ampere, Hopper, Blackwell."""

TARGETS = ("sm_80", "sm_90a", "sm_100a")
