#!/usr/bin/env bash
# POT: the value of ot.solve with reg and unbalanced is 0 for every problem, and so is its gradient.
#
# Packages: POT 0.9.7.post1, torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   ot.solve(M, a, b, reg=..., unbalanced=...) finds the right plan, and .value, documented as the full cost with its regularization, is 1e-6 or less.
#   Its KL of masses that do not sum to the same leaves out the terms -sum p + sum q, which the solver and the other values have. What is left of the
#   objective is 0 at the solution, whatever costs and weights are: by its condition of first order the terms cancel. So two equal sets of points
#   and two sets that are far apart have the same value, and a student that is trained by it (unbalanced transport lets outliers go) has a gradient of 0
#   and stays where it is. Nothing warns.
#   It is so with the defaults, reg_type="KL" and unbalanced_type="KL", for ot.solve_sample, and for ot.sinkhorn_unbalanced2(returnCost="total").
#   Right are value_linear, the cost of the plan alone; .value without reg; and .value by another solver, for unbalanced_type="L2".
# Printed: for the points apart by some distance, the mass of the plan, value, value by its definition, and value_linear; then those of the two other
#   functions; and the gradient's norm of value, of its definition and of value_linear.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 POT==0.9.7.post1 numpy scipy
cd "$folder"
cat > see.py <<'PY'
import ot
import torch

torch.set_num_threads(1)
torch.manual_seed(0)
points, weights = torch.randn(8, 3, dtype=torch.double), torch.full((8,), 1 / 8, dtype=torch.double)
shift = torch.tensor([1.0, 0, 0], dtype=torch.double)
other = torch.softmax(torch.randn(8, dtype=torch.double), 0)
REG, MASS = 0.5, 2.0


def kl(p, q):
    return (torch.xlogy(p, p / q) - p + q).sum()


def defined(cost, plan, penalty):
    return (plan * cost).sum() + REG * kl(plan, weights[:, None] * other) + MASS * (penalty(plan.sum(1), weights) + penalty(plan.sum(0), other))


def half_square(p, q):
    return ((p - q) ** 2).sum() / 2


seen = []
for distance in (0, 1, 2, 4):
    cost = ot.dist(points + distance * shift, points)
    result = ot.solve(cost, weights, other, reg=REG, unbalanced=MASS)
    want = defined(cost, result.plan, kl)
    seen.append([x.item() for x in (result.value, want, result.value_linear)])
    print("{}: mass {:.4f}, value {:.1e}, by its definition {:.4f}, value_linear {:.4f}".format(distance, result.plan.sum().item(), *seen[-1]))
    trials = [defined(cost, result.plan * (1 + 0.01 * torch.randn(8, 8)).double(), kl) for _ in range(100)]
    assert min(trials) > want, "the plan is not the best one"
sample = ot.solve_sample(points + shift, points, weights, other, reg=REG, unbalanced=MASS).value.item()
total = ot.sinkhorn_unbalanced2(weights, other, ot.dist(points + shift, points), REG, MASS, returnCost="total").item()
print(f"solve_sample {sample:.1e}, sinkhorn_unbalanced2 {total:.1e}")

norms = {}
for name in ("value", "definition", "value_linear"):
    student = (points + shift).requires_grad_()
    cost = ot.dist(student, points)
    result = ot.solve(cost, weights, other, reg=REG, unbalanced=MASS)
    loss = defined(cost, result.plan, kl) if name == "definition" else getattr(result, name)
    loss.backward()
    norms[name] = student.grad.norm().item()
    print(f"gradient of {name}: {norms[name]:.1e}")
cost = ot.dist(points + shift, points)
exact = ot.solve(cost, weights, other, unbalanced=MASS)
want = (exact.plan * cost).sum() + MASS * (kl(exact.plan.sum(1), weights) + kl(exact.plan.sum(0), other))
square = ot.solve(cost, weights, other, reg=REG, unbalanced=MASS, unbalanced_type="L2")
square_want = defined(cost, square.plan, half_square)
print(f"without reg {exact.value.item():.4f}, by its definition {want.item():.4f}")
print(f'unbalanced_type="L2" {square.value.item():.4f}, by its definition {square_want.item():.4f}')
assert all(abs(value) < 1e-6 and want > 0.1 for value, want, _ in seen), "behavior has changed"
assert seen[0][1] < seen[1][1] < seen[2][1] < seen[3][1] and seen[0][2] < seen[1][2], "behavior has changed"
assert abs(sample) < 1e-6 and abs(total) < 1e-5, "behavior has changed"
assert norms["value"] < 1e-6 and norms["definition"] > 0.1 and norms["value_linear"] > 0.1, "behavior has changed"
assert abs(exact.value - want) < 1e-6 and abs(square.value - square_want) < 1e-6, "behavior has changed"
PY
venv/bin/python -W error::UserWarning see.py
