"""One file per op, ``bench_<op>.py``: the shapes it is timed at, and what it replaces.

Such a file has ``CASES``, a mapping with the names of the calls; ``sample(name, device, dtype)``, which makes the
arguments of one; and ``eager(**arguments)``, the plain PyTorch that diffusers runs in the op's place. It may have

- ``flops(**arguments)``: the arithmetic of one call, where that is not the op's products;
- ``others(device, with_compile)``: the op's function in other ways, held to its contract;
- ``yardsticks()``: other functions, each with its definition in plain PyTorch, which it is held to;
- ``MOST_CALLS``: of a timed run;
- ``conclusions(medians)``: what follows from the medians of every case, and ``table`` of that.
"""
