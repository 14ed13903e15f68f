"""What pytest is given for a part of the tests: one table for each layout of the suite.

A part names an op and a backend, or a package and a word of it, as a person would who has changed that code.
"""

OPS = ("attention", "cond_conv2d", "conv2d", "gri_attention", "group_norm_silu", "linear", "resnet_block")
_BACKENDS = ("cpu", "cuda", "triton")
_WITHIN = {"attention": "attention and not gri_attention", "conv2d": "conv2d and not cond_conv2d"}

Parts = dict[str, tuple[str, ...]]


def _word(folder: str, word: str) -> tuple[str, ...]:
    return (f"tests/{folder}", "-k", word)


# the packages' tests have the same names in both layouts
_PACKAGES: Parts = {
    **{f"patching/{word}": _word("patching", word) for word in ("convolution", "copies", "gri", "graphs", "hooks")},
    **{f"patching/{word}": _word("patching", word) for word in ("refus or report", "text", "verbs", "adapters")},
    "patching/attention": _word("patching", "attention or transformer"),
    "patching": ("tests/patching",),
    "compress": ("tests/compress",),
    **{f"compress/{word}": _word("compress", word) for word in ("cond_conv", "measure", "storage")},
    **{f"adapters/{word}": _word("adapters", word) for word in ("ip_adapter", "lora", "scales", "controlnet")},
    "cli": ("tests/cli",),
}

OLD: Parts = {
    **{f"{op}/{backend}": (f"tests/kernels/test_{op}_{backend}.py",) for op in OPS for backend in _BACKENDS},
    **{f"{op}/cpu": (f"tests/kernels/test_{op}_cpu.py", f"tests/kernels/test_{op}.py") for op in OPS},
    "resnet_block/cpu": ("tests/kernels/test_resnet_block.py",),
    **{op: (f"tests/kernels/test_{op}.py",) for op in OPS},
    "dispatch": ("tests/kernels/test_conv2d_measured.py", "tests/kernels/test_resource_gates.py"),
    "gradient": ("tests/kernels/test_gradient.py",),
    "cpu_memory": ("tests/kernels/test_cpu_memory.py",),
    "digest": ("tests/kernels/test_digest.py",),
    "cubin_cache": ("tests/proving/test_cubin_cache.py",),
    "cuda_runtime": ("tests/kernels/test_cuda_runtime.py",),
    **_PACKAGES,
}

_OF_OPS = ("tests/contract", "tests/ops", "tests/harness")

NEW: Parts = {
    **{f"{op}/{backend}": (*_OF_OPS, "-k", _WITHIN.get(op, op)) for op in OPS for backend in _BACKENDS},
    **{op: (*_OF_OPS, "-k", _WITHIN.get(op, op)) for op in OPS},
    **{
        word: (*_OF_OPS, "-k", word)
        for word in ("dispatch", "gradient", "cpu_memory", "digest", "cubin_cache", "cuda_runtime")
    },
    **_PACKAGES,
}

SUITES = {"old": OLD, "new": NEW}
