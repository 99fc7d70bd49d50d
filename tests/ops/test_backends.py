"""Which backend runs an operator, and why not another."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backends import CHOSEN, cpu_only
from torch._subclasses.fake_tensor import FakeTensorMode

import amtml_fast as af
from amtml_fast import backend
from amtml_fast.ops._vocabulary_rows import rule_of
from amtml_fast.terms import KDOptions, divergence_of

Z = torch.zeros(4, 5)


def test_backends_tell_why_not():
    rows = {(r.op, r.backend): r for r in af.backends()}
    assert set(rows) == {(op, b) for op in backend.OPS for b in backend.BACKENDS[1:]}
    assert all(r.available != bool(r.why_not) for r in rows.values())
    assert all(rows[op, "reference"].available for op in backend.OPS)
    assert CHOSEN or all(rows[op, "cpp"].available for op in backend.OPS)


def test_auto_goes_by_operator_and_size():
    """The first line of the table that fits; the table is complete."""
    table = [backend.Choice("cpu", "angle", 6, ("triton",)), *backend.AUTO]
    small, large = torch.empty(1, 5, device="cpu"), torch.empty(2, 3, device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "AUTO", tuple(table))
        assert backend.order("angle", large) == ("triton",) and backend.order("angle", small) == ("cpp",)
        assert backend.order("distance", large) == ("cpp",)
        assert backend.order("angle", torch.empty(6, device="meta")) == ()
    for choice in backend.AUTO:
        assert choice.op in (None, *backend.OPS) and set(choice.backends) < set(backend.BACKENDS[1:])
        assert choice.numbers == 0 or choice.op
    everything = [c.device_type for c in backend.AUTO if c.op is None]
    assert sorted(everything) == ["cpu", "cuda", "xpu"]


@pytest.mark.parametrize(
    "capability, code, reasons",
    [
        ((9, 0), 90, {"cuda": None, "triton": None}),
        ((7, 5), 0, {"cuda": "no CUDA kernels for compute capability 7.5; .* 8.0 or later", "triton": None}),
        ((12, 0), 0, {"cuda": "no CUDA kernels for compute capability 12.0; .* 12.0", "triton": None}),
        ((6, 1), 0, {"cuda": "no CUDA kernels for", "triton": "needs compute capability 7.0 or later, got 6.1"}),
    ],
    ids=lambda x: str(x) if isinstance(x, tuple) else None,
)
def test_a_gpu_without_code_in_the_library_falls_to_triton_and_then_to_the_reference(
    monkeypatch, capability, code, reasons
):
    with FakeTensorMode():
        rows = torch.empty(3, 4, device="cuda")  # while there is none: a build of torch for CUDA would ask its driver
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.ops.amtml, "cuda_code", lambda device: code, raising=False)
    monkeypatch.setattr(backend, "HAS_EXTENSION", True)
    monkeypatch.setattr(backend, "HAS_CUDA", True)
    monkeypatch.setattr(backend, "HAS_TRITON", True)
    monkeypatch.setattr(backend, "DEVICES", {"cuda": ("cuda",), "triton": ("cuda",), "cpp": ("cpu",)})
    backend.why_not_gpu.cache_clear()
    try:
        for name, reason in reasons.items():
            said = backend.why_not("angle", name, "cuda", 0)
            assert said is None if reason is None else re.search(reason, said), said
        taken = next((name for name, reason in reasons.items() if reason is None), "reference")
        assert backend.choose("angle", rows) == taken
        status = {row.backend: row for row in af.backends() if row.op == "angle"}
        assert status["cuda"].available == (reasons["cuda"] is None)
    finally:
        backend.why_not_gpu.cache_clear()


@pytest.mark.parametrize(
    "shared, most", [(99 << 10, {2: 8192, 3: 7954, 8: 6674, 32: 4096}), (227 << 10, {2: 8192, 32: 8192})]
)
def test_top_k_that_a_gpus_shared_memory_does_not_hold_goes_elsewhere(monkeypatch, shared, most):
    """99 KB: 8.6, 8.9 and 12.0. The bytes are those that run_rows of csrc/cuda/topk_kd.cu asks for, and no fewer."""
    with FakeTensorMode():
        rows = torch.empty(3, 4, device="cuda")
    monkeypatch.setattr(backend, "shared_memory", lambda index: shared)
    monkeypatch.setattr(backend, "why_not", lambda *of: None)
    monkeypatch.setattr(backend, "AUTO", (backend.Choice("cuda", None, 0, ("cuda", "triton")),))
    for teachers, entries in most.items():
        for given, taken in (
            (entries - entries % 32, "cuda"),
            (min(entries + 32, 8192), "cuda" if entries == 8192 else "triton"),
        ):
            assert backend.choose("topk_kd", rows, teachers=teachers, entries=given) == taken, (teachers, given)
    if shared < 227 << 10:
        with (
            af.use_backend("cuda"),
            pytest.raises(RuntimeError, match=r"32 teachers with 8192 classes a row take \d+ bytes"),
        ):
            backend.choose("topk_kd", rows, teachers=32, entries=8192)


@cpu_only
@pytest.mark.parametrize("work", ["forward_kl", "jsd", "split", "topk", "fused", "fused topk", "routed", "whole"])
def test_a_row_that_a_gpus_kernels_cannot_hold_goes_to_the_next_backend(monkeypatch, work):
    """As it would be on a GPU: kernels called "cuda" are looked up by the tensors' device, so here they are the CPU's."""
    monkeypatch.setattr(backend, "AUTO", (backend.Choice("cpu", None, 0, ("cuda", "cpp")),))
    monkeypatch.setattr(backend, "DEVICES", {**backend.DEVICES, "cuda": ("cpu",)})
    monkeypatch.setattr(backend, "HAS_CUDA", True)
    monkeypatch.setattr(backend, "MOST_TEACHERS", 3)
    monkeypatch.setattr(backend, "MOST_ENTRIES", 6)
    taken, choose = [], backend.choose
    monkeypatch.setattr(backend, "choose", lambda *args, **sizes: taken.append(choose(*args, **sizes)) or taken[-1])

    def call(teachers, k):
        kinds = [torch.randn(4, 5) for _ in range(teachers)]
        tops = [x.log_softmax(1).topk(k) for x in kinds]
        named = [af.TopKTeacher(top.indices, top.values) for top in tops]
        hidden, weight = torch.randn(4, 2), torch.randn(5, 2)
        if work == "topk":
            af.topk_kd_loss(Z, [top.indices for top in tops], [top.values for top in tops], None)
        elif work in ("fused topk", "routed"):
            index = torch.arange(4) % teachers if work == "routed" else None
            af.fused_linear_kd_loss(hidden, weight, named, teacher_index=index)
        elif work == "fused":
            af.fused_linear_kd_loss(hidden, weight, kinds)
        elif work == "whole":
            af.AMTMLLoss(af.TeacherAdapter(2, teachers))(Z, kinds, torch.arange(4), hidden)
        elif work == "split":
            options = KDOptions(2.0, 0.5, "mixture", "sum", True, -100, 0.0)
            other = divergence_of(2.0, 0.5, "jsd", None, None, teachers)
            rule_of(options, other, None, Z.dtype, (False, False), False, teachers, Z, None, *kinds)
        else:
            af.multi_teacher_kd_loss(Z, kinds, None, divergence=work)
        got = {*taken}
        taken.clear()
        return got

    assert call(3, 2) == {"cuda"}
    if work == "routed":  # a row has one teacher
        assert call(4, 5) == {"cuda"}
        monkeypatch.setattr(backend, "MOST_ENTRIES", 4)
        assert call(4, 5) == {"cpp"}
    else:
        assert "cpp" in call(4, 1)
        assert call(3, 3) == ({"cpp"} if "topk" in work else {"cuda"})
        with af.use_backend("cuda"), pytest.raises(RuntimeError, match=r"at most 3 teachers, got 4.*always runs"):
            call(4, 1)


def test_the_sizes_are_those_of_the_cuda_kernels():
    source = Path(af.__file__).parents[1] / "csrc" / "cuda"
    if not source.is_dir():
        pytest.skip("the package is installed without its sources")
    most = re.search(r"kMaxTeachers = (\d+)", (source / "common.cuh").read_text())
    entries = re.search(r"kMaxEntries = (\d+)", (source / "topk_entries.cuh").read_text())
    assert (int(most[1]), int(entries[1])) == (backend.MOST_TEACHERS, backend.MOST_ENTRIES)
    for sizes in ((int(most[1]) + 1, 0), (1, int(entries[1]) + 1)):
        refuse = [name for name in backend.BACKENDS[1:] if backend._why_not_sizes(name, *sizes, None)]
        assert refuse == ["cuda", "triton"]


@cpu_only
def test_a_chosen_backend_runs_or_says_why_not():
    with (
        af.use_backend("cuda"),
        pytest.raises(RuntimeError, match=r'angle: backend "cuda" cannot run here: .*(cuda|CUDA)'),
    ):
        af.angle_loss(Z, Z)
    with af.use_backend("cpp"), pytest.raises(RuntimeError, match="needs cpu tensors, got meta"):
        af.angle_loss(Z.to("meta"), Z.to("meta"))
    assert backend._active == "auto"


def test_without_extension_and_extras_the_reference_runs_with_one_notice():
    """A plain install: torch and numpy only, no compiled library, no Triton."""
    code = """
import sys, warnings
blocked = {"amtml_fast._C", "triton", "accelerate", "typer", "rich", "omegaconf", "matplotlib", "safetensors"}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name in blocked or name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import amtml_fast as af, torch
    z = torch.randn(4, 5, requires_grad=True)
    af.multi_teacher_kd_loss(z, [torch.randn(4, 5)], None).backward()
ours = [str(w.message) for w in caught if "amtml_fast" in str(w.message)]
assert len(ours) == 1 and "pip install --no-build-isolation" in ours[0], ours
assert not any(r.available for r in af.backends() if r.backend == "cpp")
try:
    with af.use_backend("cpp"):
        af.angle_loss(z, z)
except RuntimeError as error:
    assert "does not load" in str(error)
else:
    raise SystemExit("cpp did not raise")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@cpu_only
@pytest.mark.parametrize(
    "beside, said",
    [
        (
            {"setup.py": ""},
            r"is a source folder, in which it is not built\. Where an installed package was meant, run from another",
        ),
        ({"setup.py": "", "amtml_fast/_C.abi3.so": "no library"}, r"does not load \(.*_C\.abi3\.so.*\)\. With torch"),
        ({"amtml_fast/not_built.txt": "no compiler\n"}, r"does not load \(it was not built: no compiler\). With torch"),
        ({}, r"does not load \(No module named 'amtml_fast._C'\). With torch"),
    ],
    ids=["source", "broken", "told", "untold"],
)
def test_what_to_do_without_the_extension_depends_on_the_folder(tmp_path, beside, said):
    package = Path(af.__file__).parent
    shutil.copytree(package, tmp_path / "amtml_fast", ignore=shutil.ignore_patterns("*.so", "train", "hf", "kernels"))
    for name, text in beside.items():
        (tmp_path / name).write_text(text)
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f)]; import amtml_fast as af; "
    )
    code += "print([row.why_not for row in af.backends() if row.backend == 'triton'][0])"
    shell = {**os.environ, "AMTML_BACKEND": "", "PYTHONPATH": str(tmp_path)}
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=shell, capture_output=True, text=True)
    assert out.returncode == 0 and re.search(said, out.stderr), out.stderr
    if backend.HAS_TRITON:
        assert f"no kernels (amtml_fast.kernels) for it beside {tmp_path / 'amtml_fast'}" in out.stdout


@cpu_only
@pytest.mark.parametrize("variable", ["AMTML_BACKEND", "AMTML_CPU_VECTORS"])
def test_a_variable_of_the_environment_is_known_or_refused(variable):
    shell = {**os.environ, variable: "AVX2"}
    out = subprocess.run([sys.executable, "-c", "import amtml_fast"], env=shell, capture_output=True, text=True)
    assert out.returncode != 0 and re.search(rf"{variable}.* must be .*, got 'AVX2'", out.stderr), out.stderr
