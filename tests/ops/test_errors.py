"""Bad input is named before anything is computed."""

import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from backends import CHOSEN, cpu_only

import amtml_fast as af
from amtml_fast import dropin

Z, T2, W = torch.zeros(4, 5), [torch.zeros(4, 5)] * 2, torch.full((4, 2), 0.5)
Y = torch.zeros(4, dtype=torch.long)
F4, TH, V = torch.zeros(4, 3, 2, 2), torch.zeros(2, 3), torch.zeros(3)
M = torch.zeros(4, 3, 2, 2)
# fmt: off
BAD = [  # one call a line

    (lambda: af.multi_teacher_kd_loss(Z, [Z, torch.zeros(4, 6)], W), r"teacher_logits\[1\] must be \[4, 5\] like student_logits, got \[4, 6\]"),
    (lambda: af.multi_teacher_kd_loss(Z, [], W), "at least one teacher"),
    (lambda: af.multi_teacher_kd_loss(Z, Z, W), "teacher_logits must be a list"),
    (lambda: af.multi_teacher_kd_loss(Z, 3, W), "teacher_logits must be a list"),
    (lambda: af.multi_teacher_kd_loss(Z[0], T2, W), r"student_logits must be \[N, C\]"),
    (lambda: af.multi_teacher_kd_loss(Z[:, :0], T2, W), "C >= 1"),
    (lambda: af.multi_teacher_kd_loss(Z.long(), T2, W), "student_logits must be float32"),
    (lambda: af.multi_teacher_kd_loss(Z, [Z.clone().requires_grad_(), Z], W), "teachers are frozen"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W[:, :1]), r"teacher_weights must be \[2\] or \[4, 2\] for 2 teachers, got \[4, 1\]"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, -W), "finite and not negative"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W * torch.nan), "finite and not negative"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W, Y.float()), "labels must be an int64"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W, Y[:3]), r"labels must be \[4\]"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W, Y + 5), r"labels\[0\] must be in \[0, 5\) or ignore_index -100, got 5"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W, Y - 1), r"labels\[0\] must be in \[0, 5\)"),
    (lambda: af.multi_teacher_kd_loss(Z[:1], [Z[:1]], None, Y[:1] + 5), r"labels\[0\] must be in \[0, 5\) or ignore_index -100, got 5"),
    (lambda: af.multi_teacher_kd_loss(Z[:1], [Z[:1]], -W[:1, :1]), "finite and not negative, got -0.5"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W + torch.inf), "finite and not negative, got inf"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W, temperature=0), "temperature must be a number"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W, temperature=float("nan")), "temperature must be a number"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W, alpha=1.5), "alpha must be a number"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W, mode="both"), "mode must be one of mixture, sum"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W, reduction="avg"), "reduction must be one of none"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W, label_smoothing=-0.1), "label_smoothing must be a number"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W, reduction="sum", num_items_in_batch=3), "num_items_in_batch must be None"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W, num_items_in_batch=0), r"num_items_in_batch must be in \[1, 2\*\*63\) without labels, got 0"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W, Y, num_items_in_batch=torch.tensor(-1.0)), "num_items_in_batch must be finite and not negative, got -1.0"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W, Y, num_items_in_batch=torch.tensor(torch.nan)), "num_items_in_batch must be finite and not negative, got nan"),
    (lambda: af.multi_teacher_kd_loss(Z.to("meta"), T2, W), "must be on meta like student_logits, got cpu"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W, temperature=1e200), r"temperature must be a number in \[1e-18, 1e\+18\], got 1e\+200"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W, temperature=10**400), r"temperature must be a number in \[1e-18, 1e\+18\], got 1000"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W, num_items_in_batch=2**63), r"num_items_in_batch must be in \[1, 2\*\*63\) without labels"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W, num_items_in_batch=torch.tensor(1j)), "num_items_in_batch must be .* real numbers, got torch.comp"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W, num_items_in_batch=torch.ones(1)), r"num_items_in_batch must be an int or a 0-d tensor, got \[1\]"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W, num_items_in_batch=True), "num_items_in_batch must be an int or a 0-d tensor, got True"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W, num_items_in_batch=4.0), "num_items_in_batch must be an int or a 0-d tensor, got 4.0"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W, num_items_in_batch=torch.tensor(torch.inf)), "num_items_in_batch must be finite and not negative, got inf"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W, temperature=True), r"temperature must be a number in \[1e-18, 1e\+18\], got True"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W, temperature="4"), r"temperature must be a number in \[1e-18, 1e\+18\], got '4'"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W, Y.to_sparse()), "labels must be a dense tensor, as to_dense.. makes it, got torch.sparse_coo"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W, Y, ignore_index=2**63), r"ignore_index must be in \[-2\*\*63, 2\*\*63\), got 9223372036854775808"),
    (lambda: af.AMTMLLoss(af.TeacherAdapter(3, 2), regularizer_weight=1e39), r"regularizer_weight must be a number in \[0, 1e\+18\], got 1e\+39"),
    (
        lambda: af.MultiGroupHintLoss({"a": 1, "b": 2}, [3, 4], teacher_scores=["x", 1]),
        r"teacher_scores\[0\] must be a number, got 'x'",
    ),
    (lambda: af.teacher_weights(F4[0], TH, V), r"features must be \[N, d, H, W\] or \[N, d\]"),
    (lambda: af.teacher_weights(F4, TH[:, :2], V), r"theta must be \[T, 3\]"),
    (lambda: af.teacher_weights(F4, TH, V[:2]), r"v must be \[3\]"),
    (lambda: af.teacher_weights(F4, TH, V, pool="mean"), "pool must be one of max, avg"),
    (lambda: af.teacher_weights(F4[:, :, :0], TH, V), "at least one pixel"),
    (lambda: af.angle_loss(Z, Z[:3]), r"teacher must be \[4, C\]"),
    (lambda: af.angle_loss(Z[0], Z), r"student must be \[N, C\]"),
    (lambda: af.angle_loss(Z, Z, delta=0), "delta must be a number"),
    (lambda: af.angle_loss(Z, Z, eps=-1), "eps must be a number"),
    (lambda: af.angle_loss(Z, Z, reduction="batchmean"), "reduction must be one of mean"),
    (lambda: af.rkd_distance_loss(Z, Z[:3]), r"teacher must be \[4, C\]"),
    (lambda: af.rkd_distance_loss(Z, Z, delta=0), "delta must be a number"),
    (lambda: af.rkd_distance_loss(Z, Z, eps=-1), "eps must be a number"),
    (lambda: af.rkd_distance_loss(Z, Z, reduction="batchmean"), "reduction must be one of mean"),
    (lambda: af.hint_loss(M, M[:3], torch.zeros(3, 3)), "teacher_map must have 4 examples"),
    (lambda: af.hint_loss(M, M[:, :2], torch.zeros(3, 2)), r"weight must be \[2, 3\]"),
    (lambda: af.hint_loss(M[0], M, torch.zeros(3, 3)), r"student_map must be \[N, c, h, w\]"),
    (lambda: af.dual_softmax(Z[0]), "at least 2 dimensions"),
    (lambda: af.dual_softmax(Z, 0, -2), "dim1 and dim2 must differ"),
    (lambda: af.dual_softmax(Z, 0, 2), "dim2 must be in"),
    (lambda: af.dual_softmax(Z, mode="sum"), "mode must be one of sequential"),
    (lambda: af.dual_softmax(Z.to_sparse()), "scores must be a dense tensor, as to_dense.. makes it, got torch.sparse_coo"),
    (lambda: af.dual_softmax(torch.nested.nested_tensor([Z, Z[:2]], layout=torch.jagged)), "scores must be a dense tensor, as to_padded_tensor.. makes it, got a nested one"),
    (lambda: af.dual_softmax(torch.nested.nested_tensor([Z, Z[:2]])), "scores must be a dense tensor, as to_padded_tensor.. makes it, got a nested one"),
    (lambda: af.multi_teacher_kd_loss(Z.to_sparse_csr(), T2, W), "student_logits must be a dense tensor"),
    (lambda: af.multi_teacher_kd_loss(Z, [Z, Z.to_sparse()], W), r"teacher_logits\[1\] must be a dense tensor"),
    (lambda: af.multi_teacher_kd_loss(Z, T2, W.to_sparse()), "teacher_weights must be a dense tensor"),
    (lambda: af.teacher_weights(F4.to_mkldnn(), TH, V), "features must be a dense tensor, as to_dense.. makes it, got torch._mkldnn"),
    (lambda: af.angle_loss(Z, Z.to_sparse()), "teacher must be a dense tensor"),
    (lambda: af.hint_loss(M, M, torch.zeros(3, 3).to_sparse()), "weight must be a dense tensor"),
    (lambda: af.use_backend("fast").__enter__(), "backend must be one of auto"),
    (lambda: af.dual_softmax([1.0]), "scores must be a tensor, got list"),
]
# fmt: on


@pytest.mark.skipif(CHOSEN == "gpu", reason="the same checks, on tensors of the CPU")
@pytest.mark.parametrize(("call", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_named(on, call, message):
    with pytest.raises((ValueError, TypeError, RuntimeError, IndexError), match=message):
        call()


# Each public call that takes ignore_index: the losses of theirs as they are made, ours as modules when they are called.
IGNORING = {
    "multi_teacher_kd_loss": lambda i: af.multi_teacher_kd_loss(Z, T2, W, Y, ignore_index=i),
    "topk_kd_loss": lambda i: af.topk_kd_loss(Z, [Y[:, None]], [Z[:, :1]], None, Y, ignore_index=i),
    "fused_linear_kd_loss": lambda i: af.fused_linear_kd_loss(Z[:, :3], torch.zeros(5, 3), T2, None, Y, ignore_index=i),
    "TeacherGate.fit": lambda i: af.TeacherGate(2, 5).fit(T2, Y, ignore_index=i),
    "AMTMLLoss": lambda i: af.AMTMLLoss(af.TeacherAdapter(3, 2), ignore_index=i),
    "LigerFusedLinearJSDLoss": lambda i: dropin.LigerFusedLinearJSDLoss(ignore_index=i),
    "LigerFusedLinearJSD": lambda i: dropin.LigerFusedLinearJSD(ignore_index=i),
    "ForwardKLLoss": lambda i: dropin.ForwardKLLoss(i),
    "ReverseKLLoss": lambda i: dropin.ReverseKLLoss(i),
    "SymmetricKLLoss": lambda i: dropin.SymmetricKLLoss(ignore_index=i),
}


@cpu_only
@pytest.mark.parametrize("function", IGNORING)
@pytest.mark.parametrize("wrong", [2.5, -100.0, True, "a", None, torch.tensor(-100)], ids=repr)
def test_an_ignore_index_that_is_no_int_is_named(function, wrong):
    with pytest.raises(TypeError, match=re.escape(f"{function}: ignore_index must be an int, got {wrong!r}")):
        IGNORING[function](wrong)


@cpu_only
def test_an_ignore_index_that_is_set_later_is_looked_at_again():
    loss = dropin.ForwardKLLoss()
    loss.ignore_index = 2.5
    with pytest.raises(TypeError, match=r"ForwardKLLoss: ignore_index must be an int, got 2\.5"):
        loss(Z, Z, Y)


@pytest.mark.skipif(CHOSEN == "gpu", reason="the same checks, on tensors of the CPU")
def test_a_map_whose_maximum_has_no_place_is_refused(fused):
    """The place is an int32: behind it, backward would write in front of the gradient."""
    wide = torch.zeros(1, 3, 65536, 1, dtype=torch.bfloat16).expand(-1, -1, -1, 32769)
    for features in (wide, wide.mT):
        with pytest.raises((RuntimeError, ValueError), match=r"teacher_weights.* 2\^3[01] pixels"):
            af.teacher_weights(features, torch.zeros(2, 3), torch.zeros(3))


def _wide(*shape):
    return torch.zeros(1).expand(shape)


# Sizes of which the CUDA kernels count something in 32 bits; most tensors are one number, read again and again.
TOO_LARGE = [
    (
        lambda: af.hint_loss(_wide(1, 2**32 + 3, 1, 1), _wide(1, 3, 1, 1), _wide(3, 2**32 + 3), normalize=True),
        "hint_loss.* at most 1073741824 channels",
    ),
    (
        lambda: af.teacher_weights(_wide(1, 2**25), _wide(1, 2**25), _wide(2**25)),
        "teacher_weights.* at most 33553920 channels",
    ),
    (lambda: af.angle_loss(_wide(1, 2**31), _wide(1, 5)), "angle_loss.* at most 2147483647 columns"),
    (lambda: af.rkd_distance_loss(_wide(1, 5), _wide(1, 2**31)), "rkd_distance_loss.* at most 2147483647 columns"),
    (lambda: _many_classes("renormalize"), "topk_kd_loss.* at most 2147483647 classes"),
    (lambda: _many_classes("bucket"), "topk_kd_loss.* at most 2147483647 classes"),
]


def _many_classes(tail):
    storage = torch.UntypedStorage(2**32, device="cpu")  # untouched pages cost nothing
    student = torch.empty(0, dtype=torch.bfloat16).set_(storage, 0, (1, 2**31), (2**31, 1))
    return af.topk_kd_loss(student, [_wide(1, 1).long()], [_wide(1, 1)], None, torch.tensor([-100]), tail=tail)


FAR = 2**30 + 8
TOO_LARGE_FOR_TRITON = [  # launches are made of sizes alone
    (
        lambda k: k._kd_rows.row_numbers(SimpleNamespace(c=FAR), None, False),
        r"student_logits .* 2\^30 classes for Triton",
    ),
    (
        lambda k: k.divergence_part._numbers(SimpleNamespace(c=FAR), "sum", (), 1.0, None),
        r"student_logits .* 2\^30 classes in",
    ),
    (lambda k: k.topk_bucket._block(FAR, 2), r"student_logits .* 2\^30 classes for Triton"),
    (lambda k: k.topk_bucket._last(1, FAR, FAR, 1), r"student_logits .* 2\^30 classes for Triton"),
    (
        lambda k: k.dual_softmax._forward((1, 1, FAR), (FAR, FAR), 2, "product"),
        r"dual_softmax: scores .* 2\^30 rows and columns",
    ),
    (
        lambda k: k.dual_softmax._backward((1, FAR, 1), (FAR, 1), (FAR, 1), 2, "product"),
        r"dual_softmax: scores .* 2\^30 rows",
    ),
    (
        lambda k: k.teacher_weights._geometry((1, FAR), (FAR, 1)),
        r"teacher_weights: features .* 2\^30 channels for Triton",
    ),
    (lambda k: k.hint._norms((1, FAR, 1, 1), (FAR, 1, 1, 1), False), r"hint_loss: feature maps .* 2\^30 channels"),
    (
        lambda k: k.hint._pool((1, 1, 2**15, 2**16), (2**31, 2**31, 2**16, 1), 1, 1, False),
        r"feature maps .* 2\^30 pixels",
    ),
    (
        lambda k: k.hint._pool_backward((1, 1, 50000, 1), (50000, 50000, 1, 1), 49999, 1, False),
        r"\[50000, 1\] to \[49999, 1\]",
    ),
    (
        lambda k: af.hint_loss(_wide(1, 1, 1, 50000), _wide(1, 1, 1, 49999), _wide(1, 1)),
        r"\[1, 50000\] to \[1, 49999\]",
    ),
    (lambda k: af.angle_loss(_wide(1, FAR), _wide(1, 5)), r"student must have at most 2\^30 columns"),
    (lambda k: af.rkd_distance_loss(_wide(1, 5), _wide(1, FAR)), r"teacher must have at most 2\^30 columns"),
]


@pytest.mark.skipif(CHOSEN != "triton", reason="about the Triton kernels")
@pytest.mark.parametrize(("call", "message"), TOO_LARGE_FOR_TRITON)
def test_what_triton_counts_in_32_bits_is_refused_beyond(fused, call, message):
    kernels = importlib.import_module("amtml_fast.kernels")
    for name in ("_kd_rows", "divergence_part", "dual_softmax", "hint", "teacher_weights", "topk_bucket"):
        importlib.import_module(f"amtml_fast.kernels.{name}")
    with pytest.raises(ValueError, match=message):
        call(kernels)


@pytest.mark.skipif(CHOSEN != "emulated", reason="about the CUDA kernels")
@pytest.mark.parametrize(("call", "message"), TOO_LARGE, ids=[m for _, m in TOO_LARGE])
def test_what_cuda_counts_in_32_bits_is_refused_beyond(fused, call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


@cpu_only
def test_a_grid_of_cuda_has_a_block_for_each_row():
    """2^32 rows as an unsigned are none, and 2^32 + 1 are one: `blocks` refuses what it would wrap."""
    for source in Path(__file__).parents[2].glob("csrc/cuda/*.cu*"):
        launches = re.findall(r"\blaunch\([^;]*;", source.read_text())
        assert not [text for text in launches if re.search(r"\{(dim3\()?static_cast<unsigned>", text)], source.name


@cpu_only
def test_compiled_code_still_refuses_wrong_values():
    """Checks of values cannot be traced, so the kernel itself looks before it reads."""
    torch._dynamo.reset()
    compiled = torch.compile(af.multi_teacher_kd_loss, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"labels\[0\] must be in \[0, 5\)"):
        compiled(Z, T2, W, Y + 5)
    for wrong in (-W, W * torch.nan, W * torch.inf):
        with pytest.raises(RuntimeError, match="teacher_weights must be finite and not negative"):
            compiled(Z, T2, wrong, Y)


@cpu_only
def test_weights_of_all_rows_are_looked_at_where_no_row_counts(on):
    for weights in (torch.tensor([-1.0, 1]), torch.tensor([torch.nan, 1])):
        with pytest.raises(
            ValueError, match=r"^multi_teacher_kd_loss: teacher_weights must be finite and not negative"
        ):
            af.multi_teacher_kd_loss(Z, T2, weights, torch.full_like(Y, -100))


class _Tagged(torch.Tensor):
    """As of a library of data sets: a tensor with a class of its own."""


@cpu_only
def test_values_of_a_subclass_are_checked_too(on):
    for wrong, message in (
        ((Z, T2, W, (Y + 5).as_subclass(_Tagged)), r"labels\[0\] must be in \[0, 5\)"),
        ((Z, T2, (-W).as_subclass(_Tagged), Y), "teacher_weights must be finite and not negative"),
    ):
        with pytest.raises(ValueError, match=f"^multi_teacher_kd_loss: {message}"):
            af.multi_teacher_kd_loss(*wrong)
