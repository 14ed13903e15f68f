"""What pytest is given for a part of the tests: one table for each layout of the suite.

A part names an op and a backend, or a package and a word of it, as a person would who has changed that code.
"""

OPS = ("attention", "cond_conv2d", "conv2d", "gri_attention", "group_norm_silu", "linear", "resnet_block")
_BACKENDS = ("cpu", "cuda", "triton")
_WITHIN = {"attention": "attention and not gri_attention", "conv2d": "conv2d and not cond_conv2d"}

Parts = dict[str, tuple[str, ...]]


# packages, and words of the names of their tests: the same in both layouts
_WORDS = {
    "patching": (
        *(
            "adapters",
            "attention or transformer",
            "containers or exact",
            "convolution",
            "copies",
            "gri",
            "graphs",
            "hooks",
        ),
        *("refus or report", "text", "verbs"),
    ),
    "compress": ("cond_conv", "measure", "storage", "test_compress or plan"),
    "adapters": ("controlnet", "ip_adapter", "lora", "scales"),
    "cli": ("compress", "doctor", "explain"),
}
_PACKAGES: Parts = {
    **{package: (f"tests/{package}",) for package in _WORDS},
    **{f"{package}/{word}": (f"tests/{package}", "-k", word) for package, words in _WORDS.items() for word in words},
}

OLD: Parts = {
    **{f"{op}/{backend}": (f"tests/kernels/test_{op}_{backend}.py",) for op in OPS for backend in _BACKENDS},
    **{f"{op}/cpu": (f"tests/kernels/test_{op}_cpu.py", f"tests/kernels/test_{op}.py") for op in OPS},
    "resnet_block/cpu": ("tests/kernels/test_resnet_block.py",),
    **{op: (f"tests/kernels/test_{op}.py",) for op in OPS},
    "autocast": ("tests/kernels", "-k", "autocast"),
    "dispatch": ("tests/kernels/test_conv2d_measured.py",),
    "gradient": ("tests/kernels/test_gradient.py",),
    "cpu_memory": ("tests/kernels/test_cpu_memory.py",),
    "digest": ("tests/kernels/test_digest.py",),
    "cubin_cache": ("tests/proving/test_cubin_cache.py",),
    "cuda_runtime": ("tests/kernels/test_cuda_runtime.py",),
    **_PACKAGES,
}

# what to run of the contract after a change of a backend
_RUNS = {
    "cpu": "cpu or ops or schema or refusals",
    "cuda": "host or ops or budgets or refusals or launches",
    "triton": "interpreter or ops or budgets or refusals or launches",
}


def _of_op(op: str, runs: str = "") -> tuple[str, ...]:
    words = f"({_WITHIN.get(op, op)})" + (f" and ({runs})" if runs else "")
    return ("tests/contract", f"tests/ops/test_{op}.py", "-k", words)


NEW: Parts = {
    **{f"{op}/{backend}": _of_op(op, runs) for op in OPS for backend, runs in _RUNS.items()},
    **{op: _of_op(op) for op in OPS},
    **{
        word: ("tests/core", "tests/ops", "tests/contract", "-k", word)
        for word in ("autocast", "gradient", "cpu_memory", "digest", "cubin_cache", "cuda_runtime")
    },
    "dispatch": ("tests/ops/test_conv2d_measured.py",),
    **_PACKAGES,
}

SUITES = {"old": OLD, "new": NEW}
