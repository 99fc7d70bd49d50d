"""What ``kernels/_launch.py`` launches, beside what Triton itself would: ``python launch_by_hand.py``, where kernels are compiled (not
interpreted) and a driver that launches nothing tells which binary was launched with which arguments."""

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
import triton.language as tl
from amtml_fast.kernels import _launch, scale_rows
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction
from triton_host import Driver, steps

import amtml_fast as af
from amtml_fast import backend


class Recorder(Driver):
    """Each binary that is loaded is another function; what is launched is in ``seen``."""

    def __init__(self) -> None:
        super().__init__()
        self.device, self.loaded, self.seen = 0, 0, []  # type: ignore[var-annotated]

    def get_current_device(self) -> int:
        return self.device

    def load_binary(self, name: str, *_: Any) -> tuple:
        self.loaded += 1
        return self.loaded, (name, self.loaded), 0, 0, 1024

    def launch(self, x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
        _, metadata, enter, leave, *arguments = rest
        for hook in (enter, leave):  # as CUDA's launcher does
            if hook is not None:
                hook(metadata)
        self.seen.append((function, (x, y, z), arguments))


OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def kernel(x, several, maybe, n, scale, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    value = tl.load(x + i, mask=i < n) * scale
    for t in tl.static_range(len(several)):
        value += tl.load(several[t] + i, mask=i < n)
    if maybe is not None:
        value += tl.load(maybe + i, mask=i < n)
    tl.store(x + i, value, mask=i < n)


def make() -> _launch.Launch:
    return _launch.Launch(kernel, (2,), n=48, scale=0.5, SIZE=32, **OPTIONS)


def variants() -> Iterator[tuple[int, tuple]]:
    """Device and tensors, each with one thing of its own that Triton compiles anew for."""
    whole, half = torch.zeros(65), torch.zeros(65, dtype=torch.bfloat16)
    odd = whole[1:]
    yield 0, (whole, (whole, whole), whole)
    yield 0, (odd, (whole, whole), whole)
    yield 0, (whole, (whole, odd), whole)
    yield 0, (whole, (odd, whole), whole)
    yield 0, (whole, (whole, whole), odd)
    yield 0, (half, (whole, whole), whole)
    yield 0, (whole, (whole, half), whole)
    yield 0, (whole, (whole,), whole)
    yield 0, (whole, (whole, whole), None)
    yield 0, (whole, (whole, whole), half)
    yield 1, (whole, (whole, whole), whole)


def wrong_launches(driver: Recorder) -> int:
    """Of all variants' second launches: how many differ from Triton's own."""
    launch, wrong = make(), 0
    for again in (False, True):
        for device, tensors in variants():
            driver.device = device
            kernel[(2,)](*tensors, 48, 0.5, 32, **OPTIONS)
            launch(*tensors)
            want, got = driver.seen[-2:]
            wrong += again and got != want
    driver.device = 0
    return wrong


def without(kind: type) -> Callable:
    key = _launch._key
    return lambda tensors, device: tuple(
        part[1:] if type(part) is tuple and kind is int else part
        for part in key(tensors, device)
        if type(part) is not kind
    )


def check_key(driver: Recorder) -> None:
    assert wrong_launches(driver) == 0
    whole = _launch._key
    # The device, dtypes, alignment, tuples' tensors, what there is not.
    for kind in (int, torch.dtype, bool, tuple, type(None)):
        _launch._key = without(kind)
        assert wrong_launches(driver) > 0, f"nothing depends on the key's {kind.__name__}"
    _launch._key = whole


def check_when(driver: Recorder) -> None:
    """Triton's own launch: the first of its kind, and whenever somebody else is interested in launches."""
    ordinary: list[str] = []
    run, runtime, heard = JITFunction.run, triton.knobs.runtime, []

    def counted(self: JITFunction, *args: Any, **options: Any) -> Any:
        ordinary.append(self.__name__)
        return run(self, *args, **options)

    JITFunction.run = counted
    (_, tensors), *_ = variants()
    launch = make()

    def launches(times: int = 2) -> int:
        before, seen = len(ordinary), len(driver.seen)
        for _ in range(times):
            launch(*tensors)
        assert len(driver.seen) == seen + times
        return len(ordinary) - before

    assert launches() == 1
    assert launches() == 0
    hook = lambda metadata: heard.append(metadata.get()["name"])  # noqa: E731
    for chain in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        chain.add(hook)
        assert launches() == 2 and heard == ["kernel"] * 2
        chain.remove(hook)
        heard.clear()
    assert launches() == 0
    runtime.debug = True
    assert launches() == 2
    runtime.debug = False
    kernel.add_pre_run_hook(lambda *_, **__: heard.append("before"))
    assert launches() == 2 and len(heard) == 2
    kernel.pre_run_hooks.clear()
    _launch.by_hand = False
    assert launches() == 2
    _launch.by_hand = True
    assert launches() == 0
    launch = make()
    threads = [threading.Thread(target=lambda: [launch(*tensors) for _ in range(200)]) for _ in range(8)]
    seen = len(driver.seen)
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(driver.seen) == seen + 1600 and len({repr(s[:2]) for s in driver.seen[seen:]}) == 1
    JITFunction.run = run


def check_losses(driver: Recorder) -> None:
    """Every launch of some losses has the same binary, grid and numbers, by hand and by Triton."""

    def plain(argument: Any) -> Any:
        if isinstance(argument, tuple):
            return tuple(map(plain, argument))
        return argument.dtype if isinstance(argument, torch.Tensor) else argument

    backend.DEVICES["triton"] = ("cpu",)
    with af.use_backend("triton"):
        for name, step in steps().items():
            records = []
            for by_hand in (True, True, False):
                _launch.by_hand = by_hand
                driver.seen.clear()
                step()
                records.append(
                    [(function, grid, [*map(plain, arguments)]) for function, grid, arguments in driver.seen]
                )
            assert records[1] == records[2], name
            assert records[1] or "empty" in name
    _launch.by_hand = True


def check_far(_: Recorder) -> None:
    """Near 2^31 numbers a gradient's next block begins beyond 32 bits, and so may the incoming gradient of a row."""
    scale = scale_rows._scale_kernel.warmup(
        torch.float32, torch.float32, 7, 2**31 - 1, 2**29, BLOCK=1024, grid=(1,), enable_fp_fusion=True
    )
    lines = scale.asm["ttir"].splitlines()
    loops, offsets = ([line for line in lines if word in line] for word in ("scf.for", "arith.muli %i,"))
    assert len(loops) == 2 and offsets and all("i64" in line for line in loops + offsets), loops + offsets


def check_amd(driver: Recorder) -> None:
    """No launch has an option that AMD's compiler does not know: Triton would raise an error."""
    nvidia, run = driver.target, JITFunction.run
    driver.target = GPUTarget("hip", "gfx942", 64)
    known, given = make_backend(driver.target).parse_options({"enable_fp_fusion": True}).__dict__, set()
    JITFunction.run = lambda self, *_, grid, warmup, **options: given.update(options)
    for classes in (1000, 32000):  # rows in registers, and in chunks
        student, teachers = torch.zeros(2, classes, requires_grad=True), [torch.zeros(2, classes)]
        with af.use_backend("triton"):
            for options in ({}, {"divergence": "jsd"}):
                af.multi_teacher_kd_loss(student, teachers, None, **options).backward()
    driver.target, JITFunction.run = nvidia, run
    assert "num_warps" in given and given <= known.keys(), given - known.keys()


if __name__ == "__main__":
    assert _launch.by_hand, "this version of Triton is not known: see KNOWN"
    recorder = Recorder()
    triton.runtime.driver.set_active(recorder)
    for check in (check_key, check_when, check_losses, check_far, check_amd):
        check(recorder)
        print(check.__name__, "passed")
