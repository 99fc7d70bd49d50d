"""Transforms of torch.func, also under torch.compile, stacked incoming gradients, and tensors made of others: right, or a clear error."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from backends import CHOSEN, cpu_only
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.fx.experimental.proxy_tensor import make_fx

import amtml_fast as af
from amtml_fast import dropin
from amtml_fast.testing import CASES, convert, value_and_grads

each_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
either = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


def _of_one_input(case):
    """The operator as a scalar function of its first input, and that input."""
    first, *rest = ([x.detach() for x in a] if isinstance(a, list) else a.detach() for a in case.inputs(*case.small))
    return (lambda x: case.function(x, *rest).square().sum()), first


def _whole_loss_of_theta():
    torch.manual_seed(0)
    loss = af.AMTMLLoss(af.TeacherAdapter(4, 2))
    batch = torch.randn(6, 5), [torch.randn(6, 5) for _ in range(2)], torch.arange(6) % 5, torch.randn(6, 4)
    parameters = {name: p.detach() for name, p in loss.named_parameters()}

    def function(theta):
        return torch.func.functional_call(loss, {**parameters, "adapter.theta": theta}, batch).loss

    return function, parameters["adapter.theta"]


FUNCTIONS = {
    **{op: lambda case=case: _of_one_input(case) for op, case in CASES.items()},
    "AMTMLLoss": _whole_loss_of_theta,
}


def _transforms(f, direction):
    return {
        "grad": torch.func.grad(f),
        "vjp": lambda x: torch.func.vjp(f, x)[1](x.new_ones(()))[0],
        "jacrev": torch.func.jacrev(f),
        "jvp": lambda x: torch.func.jvp(f, (x,), (direction,))[1],
        "jacfwd": torch.func.jacfwd(f),
        "vmap": lambda x: torch.func.vmap(f)(torch.stack([x, 2 * x])),
        "vmap of grad": lambda x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, 2 * x])),
    }


def _traced(make, names):
    """What is compiled, which takes half a second each: all that one operator and the whole loss can do; of the others, which
    have the same nodes of autograd and the same checks, one in turn and the next."""
    turn = list(FUNCTIONS.values()).index(make)
    every = make in (FUNCTIONS["multi_teacher_kd"], FUNCTIONS["AMTMLLoss"])
    names = list(names)
    return names if every else [names[(turn + i) % len(names)] for i in range(len(names) // 3)]


def _gradient(f, x):
    return torch.autograd.grad(f(leaf := x.clone().requires_grad_()), leaf)[0]


@cpu_only  # under auto the reference runs, on any device
@either
@pytest.mark.parametrize("make", FUNCTIONS.values(), ids=list(FUNCTIONS))
def test_transforms_are_right_under_auto(make, compiled):
    f, x = make()
    direction = torch.randn_like(x)
    with af.use_backend("reference"):
        gradient, second = _gradient(f, x), _gradient(f, 2 * x)
        value, other = f(x), f(2 * x)
    want = {
        **dict.fromkeys(["grad", "vjp", "jacrev", "jacfwd"], gradient),
        "jvp": (gradient * direction).sum(),
        "vmap": torch.stack([value, other]),
        "vmap of grad": torch.stack([gradient, second]),
    }
    assert gradient.norm() > 0
    transforms = _transforms(f, direction)
    for name in _traced(make, transforms) if compiled else transforms:
        transformed = transforms[name]
        torch._dynamo.reset()
        run = torch.compile(transformed, fullgraph=True, backend="eager") if compiled else transformed
        torch.testing.assert_close(run(x), want[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@cpu_only
@pytest.mark.parametrize("make", FUNCTIONS.values(), ids=list(FUNCTIONS))
def test_forward_over_reverse_is_the_second_derivative(make):
    f, x = make()
    direction, leaf = torch.randn_like(x), x.clone().requires_grad_()
    with af.use_backend("reference"):
        (first,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
        (want,) = torch.autograd.grad((first * direction).sum(), leaf)
    got = torch.func.jvp(torch.func.grad(f), (x,), (direction,))[1]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@either
@pytest.mark.parametrize("make", FUNCTIONS.values(), ids=list(FUNCTIONS))
def test_a_named_backend_refuses_transforms(make, compiled, fused):
    if compiled and CHOSEN in ("emulated", "gpu"):
        pytest.skip("it is refused before a device is asked; on the emulator torch.compile would trace two_devices.py")
    f, x = make()
    transforms = _transforms(f, torch.ones_like(x))
    for name in _traced(make, ["grad", "jvp", "vmap"]) if compiled else transforms:
        torch._dynamo.reset()
        run = torch.compile(transforms[name], backend="eager") if compiled else transforms[name]
        with pytest.raises(RuntimeError, match=r'use_backend\("reference"\)'):
            print(name, run(x))


@each_case
def test_dual_tensors_run_on_the_reference(case):
    f, x = _of_one_input(case)
    want = _gradient(f, x).sum()
    with torch.autograd.forward_ad.dual_level():
        out = f(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(out).tangent, want, rtol=1e-4, atol=1e-6)


@cpu_only
def test_a_tangent_of_temperatures_by_row_is_not_lost():
    """They get no gradient, and an error says so; forward mode has no flag to be seen, and gives the derivative."""
    student, teachers, weights, labels = convert(CASES["divergence"].inputs(6, 5, 2, dtype=torch.float64))
    student, weights = student.detach(), weights.detach()
    temperature, direction = torch.rand(6, dtype=torch.float64) + 1, torch.randn(6, dtype=torch.float64)

    def of_logits(t):
        return af.multi_teacher_kd_loss(student, teachers, weights, labels, temperature=t, divergence="jsd")

    def of_hidden(t):
        return af.fused_linear_kd_loss(
            student, torch.eye(5, dtype=torch.float64), teachers, weights, labels, temperature=t, divergence="jsd"
        )

    for loss in (of_logits, of_hidden):
        step = 1e-6 * direction
        want = (loss(temperature + step) - loss(temperature - step)) / 2e-6
        got = torch.func.jvp(loss, (temperature,), (direction,))[1]
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


# --- torch.export


class _Exported(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def _raw_ops(program):
    modules = program.graph_module.modules()
    return [node for module in modules for node in module.graph.nodes if "amtml" in str(node.target)]


@cpu_only
@each_case
def test_an_exported_program_has_derivatives_and_needs_no_kernels(case):
    """A raw op in it would have none: gradients would be missing, with a warning."""
    args, others = (case.inputs(*case.small, seed=seed) for seed in (0, 1))
    program = torch.export.export(_Exported(case.function), args, strict=False)
    assert not _raw_ops(program)
    got, want = value_and_grads(program.module(), others), value_and_grads(case.function, others)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    with af.use_backend("cpp"):  # a backend that is named is what the program asks for
        assert _raw_ops(torch.export.export(_Exported(case.function), args, strict=False))


@cpu_only
@pytest.mark.parametrize("backend", ["auto", "cpp"])
def test_an_exported_program_takes_any_number_of_rows(backend):
    adapter, gate = af.TeacherAdapter(4, 2), af.TeacherGate(2, 5)

    def everything(features, student, teacher):
        top = teacher.log_softmax(1).topk(2)
        stored = [top.indices], [top.values], None
        teachers = [teacher, af.TopKTeacher(top.indices, top.values)]
        return (
            adapter(features) * gate([student, teacher]),
            af.dual_softmax(features),
            af.multi_teacher_kd_loss(student, [teacher], None, temperature=teacher.square().sum(1) + 1),
            af.topk_kd_loss(student, *stored),
            af.topk_kd_loss(student, *stored, tail="bucket"),
            af.angle_loss(student, teacher),
            af.rkd_distance_loss(student, teacher),
            af.fused_linear_kd_loss(student, torch.eye(5), teachers, None),
            af.hint_loss(features, features, torch.eye(4)),
        )

    def batch(rows):
        return torch.randn(rows, 4, 3, 3), torch.randn(rows, 5), torch.randn(rows, 5)

    rows = {0: torch.export.Dim("rows", min=3, max=64)}
    with af.use_backend(backend):
        program = torch.export.export(_Exported(everything), batch(8), dynamic_shapes=((rows,) * 3,), strict=False)
        other = batch(5)
        torch.testing.assert_close(program.module()(*other), everything(*other), rtol=1e-4, atol=1e-6)


@cpu_only
@each_case
def test_make_fx_traces_forward_and_backward(case, on):
    """On real tensors, of which none may be read meanwhile."""
    args, others = (case.inputs(*case.small, seed=seed) for seed in (0, 1))

    def step(*args):
        out = case.function(*args)
        return out, torch.autograd.grad(out.square().sum(), args[0])

    torch.testing.assert_close(make_fx(step)(*args)(*others), step(*others), rtol=1e-4, atol=1e-6)


# --- several incoming gradients at once


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_case
def test_stacked_incoming_gradients_come_one_by_one(case, dtype, on):
    options = next((v for v in case.variants if v.get("reduction") == "none"), {})
    args = case.inputs(*case.small, dtype=dtype)
    leaves = [t for t in args if isinstance(t, torch.Tensor) and t.requires_grad]
    out = case.function(*args, **options)
    stack = torch.randn(3, *out.shape).to(out)
    want = [torch.autograd.grad(out, leaves, g, retain_graph=True) for g in stack]
    want = tuple(map(torch.stack, zip(*want)))
    by_vmap = torch.func.vmap(lambda g: torch.autograd.grad(out, leaves, g, retain_graph=True))(stack)
    twice = [
        torch.autograd.grad(out, leaves, stack, is_grads_batched=True, retain_graph=keep) for keep in (True, False)
    ]
    for got in (by_vmap, *twice):
        if on == "reference":  # torch's batched formulas add up in another order
            torch.testing.assert_close(got, want)
        else:
            assert all(map(torch.equal, got, want))


def test_stacked_gradients_of_the_whole_loss(on):
    loss = af.AMTMLLoss(af.TeacherAdapter(4, 2))
    student, features = torch.randn(6, 5, requires_grad=True), torch.randn(6, 4)
    out = loss(student, [torch.randn(6, 5) for _ in range(2)], torch.arange(6) % 5, features).loss
    leaves = [student, *loss.parameters()]
    once = torch.autograd.grad(out, leaves, retain_graph=True)
    stacked = torch.autograd.grad(out, leaves, torch.tensor([1.0, 4.0]), is_grads_batched=True)
    for a, b in zip(once, stacked):
        torch.testing.assert_close(b, torch.stack([a, 4 * a]))


def test_stacked_gradients_in_a_thread_of_their_own(on):
    """As on a GPU, where autograd runs backward in another thread than the one that has stacked them."""
    student, threads = torch.randn(6, 5, requires_grad=True), ThreadPoolExecutor(1)
    out = af.multi_teacher_kd_loss(student, [torch.randn(6, 5)], None, reduction="none")
    stack = torch.randn(3, 6)
    want = torch.stack([torch.autograd.grad(out, student, g, retain_graph=True)[0] for g in stack])

    def backward(g):
        return threads.submit(torch.autograd.grad, out, student, g).result()[0]

    torch.testing.assert_close(torch._vmap_internals._vmap(backward)(stack), want)


@each_case
def test_a_graph_of_stacked_gradients_is_refused(case, fused):
    args = case.inputs(*case.small)
    out = case.function(*args)
    with pytest.raises(RuntimeError, match=r'no second derivative.*use_backend\("reference"\)'):
        torch.autograd.grad(out, args[0], torch.ones(2, *out.shape), is_grads_batched=True, create_graph=True)


# --- DTensor and FSDP2, in a group of one process


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@cpu_only
@pytest.mark.parametrize("placement", [Replicate(), Shard(0)], ids=["replicated", "sharded"])
@each_case
def test_dtensors_run_on_the_reference(case, placement, mesh):
    args = case.inputs(*case.small)
    want = case.function(*args)
    grad = torch.autograd.grad(want.sum(), args[0])[0]

    def spread(a):
        if isinstance(a, (list, tuple)):
            return [spread(x) for x in a]
        return distribute_tensor(a.detach(), mesh, [placement]).requires_grad_(a.requires_grad)

    parts = [spread(a) for a in args]

    def value_and_gradient(function):
        got = function(*parts)
        return got, torch.autograd.grad(got.sum(), parts[0])[0]

    try:
        value_and_gradient(case.reference)
    except (RuntimeError, NotImplementedError) as error:  # torch 2.11 pools no DTensors
        with af.use_backend("auto"), pytest.raises(type(error)):
            value_and_gradient(case.function)
        return
    with af.use_backend("auto"):
        got, got_grad = value_and_gradient(case.function)
    torch.testing.assert_close(got.full_tensor(), want)
    torch.testing.assert_close(got_grad.full_tensor(), grad, rtol=1e-4, atol=1e-6)
    with af.use_backend("cpp"), pytest.raises(RuntimeError, match=r'got a DTensor. use_backend\("reference"\)'):
        case.function(*parts)


@cpu_only
@pytest.mark.parametrize("sharded", ["adapter", "loss", "adapter, then loss"])
def test_fsdp_of_an_adapter_leaves_value_and_gradients_alone(sharded, mesh):
    plain = af.AMTMLLoss(af.TeacherAdapter(4, 2), regularizer_weight=0.1)
    loss = copy.deepcopy(plain)
    for part in sharded.split(", then "):
        fully_shard(loss.adapter if part == "adapter" else loss, mesh=mesh)
    student, features = torch.randn(6, 5, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    batch = student, [torch.randn(6, 5) for _ in range(2)], torch.arange(6) % 5, features
    for _ in range(2):  # the second step starts from shards
        for module in (plain, loss):  # before forward: between it and backward FSDP's gradients are out of reach
            module.zero_grad()
        outs = plain(*batch), loss(*batch)
        torch.testing.assert_close(tuple(outs[1]), tuple(outs[0]))
        for out in outs:
            out.loss.backward()
        for a, b in zip(plain.parameters(), loss.parameters()):
            torch.testing.assert_close(b.grad.full_tensor(), a.grad)


@cpu_only
def test_hints_without_weight_that_fsdp_shards(mesh):
    """Outside of their forward they hold shards, and the loss is an ordinary tensor all the same."""
    hints = af.MultiGroupHintLoss({"last": 4}, [3], mapping={0: "last"})
    loss = af.AMTMLLoss(af.TeacherAdapter(4, 1), hints, hint_weight=0.0)
    fully_shard(hints, mesh=mesh)
    fully_shard(loss, mesh=mesh)  # the outermost unit alone keeps what it has gathered
    features = torch.randn(6, 4, 2, 2, requires_grad=True)
    batch = torch.randn(6, 5, requires_grad=True), [torch.randn(6, 5)], torch.arange(6) % 5, features
    out = loss(*batch, {"last": features}, [torch.randn(6, 3, 2, 2)])
    assert type(out.loss) is torch.Tensor
    out.loss.backward()
    assert batch[0].grad.norm() > 0
    assert (hints.transforms["0"].grad.full_tensor() == 0).all()


@cpu_only
@pytest.mark.parametrize("make", [dropin.Adapter, dropin.MixtureAdapter])
def test_an_adapter_sharded_on_meta_starts_as_the_others(make, mesh):
    with torch.device("meta"):
        adapter = make([None, None], (6, 4))
    fully_shard(adapter, mesh=mesh)
    adapter.to_empty(device="cpu")
    adapter.reset_parameters()
    found = {name: p.full_tensor() for name, p in adapter.named_parameters()}
    torch.testing.assert_close(found, dict(make([None, None], (6, 4)).named_parameters()), rtol=0, atol=0)
