"""Variants of kernels that the self-test compiles for braid-tiny, and what warming up needs beyond: JSON.

A program of its own: in the tests' process Triton interprets. Nothing is compiled or launched: how Triton specialises
each call is what counts. Ends with 77, and the reason on stderr, where there is no Triton.
"""

import json
import sys
from collections.abc import Callable
from types import SimpleNamespace

import torch
from instructions import Driver


def main(dtype: str) -> None:
    try:
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction
    except ImportError as problem:
        sys.stderr.write(f"no Triton here: {problem}")
        sys.exit(77)
    from braidsdk.cache.pool import Pool
    from braidsdk.engine import graphs
    from braidsdk.kernels import launch
    from braidsdk.kernels.backends import Backends
    from braidsdk.kernels.selftest import CASES, Bench
    from braidsdk.models.registry import find_checkpoint, load_model

    driver.set_active(Driver())
    asked: list[tuple[str, str]] = []
    JITFunction._do_compile = lambda self, key, *_: asked.append((self.__name__, str(key)))
    for module in [module for name, module in sys.modules.items() if name.startswith("braidsdk.kernels")]:
        if hasattr(module, "check_tensors"):
            module.check_tensors = lambda *_: None  # it wants a GPU
    launch.dependent_launch = lambda _: True

    def record(run: Callable[[], None], *_: object) -> SimpleNamespace:
        run()
        return SimpleNamespace(replay=run)

    graphs._record = record
    torch.cuda.Stream = lambda _: None
    torch.cuda.graph_pool_handle = lambda: 0
    torch.cuda.current_stream = lambda _: SimpleNamespace(synchronize=lambda: None)
    model = load_model(
        find_checkpoint("braid-tiny"),
        device=torch.device("cpu"),
        dtype=getattr(torch, dtype),
        choose=lambda *_: Backends.all("triton"),
    )
    model.embedding = model._head = model.embedding.clone()  # on a GPU no weight lies in its file, at any address
    pool, config = Pool.for_model(model, 2**26), model.config
    shape = config.geometry(model.dtype)
    with torch.inference_mode():
        for case in CASES:
            case.make(Bench(shape, torch.device("cpu"), timed=False)).run(0)
        tried = set(asked)
        asked.clear()
        pool.page_size = 64  # as on a GPU
        pool.kv = pool.kv.view(*pool.kv.shape[:2], -1, config.kv_heads, 64, config.head_dim)
        for step in graphs.Graphs(model, pool).warm_up(64):
            step()
    beyond = [key for key in dict.fromkeys(asked) if key not in tried]
    sys.stdout.write(json.dumps({"tried": sorted({name for name, _ in tried}), "beyond": beyond}))


if __name__ == "__main__":
    main(*sys.argv[1:])
