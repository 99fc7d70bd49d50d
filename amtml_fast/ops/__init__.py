"""The operators, one a file: an operator's public function, its checks, its autograd.Function, and the schemas and fakes of
the raw ops that its kernels implement. The kernels have the same name: csrc/cpu/<op>.cpp, csrc/cuda/<op>.cu, kernels/<op>.py
(fused_linear_kd: C++ alone; on a GPU it runs the others' between products).
"""

# ruff: noqa: F401
# In the order of backend.OPS, and so of the tables.
# isort: off
from amtml_fast.ops import teacher_weights
from amtml_fast.ops import multi_teacher_kd
from amtml_fast.ops import divergence
from amtml_fast.ops import topk_kd
from amtml_fast.ops import topk_bucket
from amtml_fast.ops import fused_linear_kd
from amtml_fast.ops import angle
from amtml_fast.ops import distance
from amtml_fast.ops import hint
from amtml_fast.ops import dual_softmax
from amtml_fast.ops import whole_loss
