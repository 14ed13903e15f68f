"""What is in a launch that a runner recorded, of either kind of kernels."""

import re
from typing import Any

from tests.harness.host import CUDA_SOURCES


def named(launch: Any) -> tuple[str, dict[str, Any]]:
    """The kernel's name, and the arguments by their names in its source, which in Triton end with ``_ptr``."""
    if not isinstance(launch, dict):
        names = [name.removesuffix("_ptr") for name in launch.kernel.arg_names]
        return launch.kernel.__name__, dict(zip(names, launch.args, strict=True))
    text = (CUDA_SOURCES / launch["source"]).read_text()
    (parameters,) = re.findall(rf"^ +{launch['kernel']}\(([^)]*)\) {{", text, re.MULTILINE)
    return launch["kernel"], dict(zip(re.findall(r"(\w+)(?:,|$)", parameters), launch["args"], strict=True))
