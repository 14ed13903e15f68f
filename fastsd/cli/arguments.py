"""Values on the command line: data types and devices."""

import argparse

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def dtype(text: str) -> torch.dtype:
    """A data type by torch's name."""
    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(DTYPES)}; got {text!r}")
    return DTYPES[text]


def dtype_name(dtype: torch.dtype) -> str:
    """``"float16"`` for ``torch.float16``."""
    return str(dtype).removeprefix("torch.")


def device(text: str) -> torch.device:
    """A device that is present on this machine; ``cuda`` means ``cuda:0``."""
    try:
        found = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N; got {text!r}") from error
    if found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N; got {text!r}")
    if found.type == "cuda":
        found = torch.device("cuda", found.index or 0)
        if found.index >= torch.cuda.device_count():
            raise argparse.ArgumentTypeError(
                f"{text}: torch sees {torch.cuda.device_count()} CUDA devices on this machine; use --device cpu"
            )
    return found


def devices() -> list[torch.device]:
    """Every device of this machine that fastsd serves, the CPU first."""
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]


def best_device() -> torch.device:
    """The first CUDA device, or the CPU where there is none."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
