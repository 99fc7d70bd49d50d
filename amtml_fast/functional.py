"""The operators as functions. Each has a file in ``amtml_fast.ops`` and a namesake in ``amtml_fast.reference``.

Inputs may be float32, bfloat16, float16 or float64, in any mixture and with any strides. Sums, products and exponentials are
made in float32 (float64 if an input is), and each gradient has its input's dtype.
"""

from amtml_fast.ops.angle import angle_loss
from amtml_fast.ops.distance import rkd_distance_loss
from amtml_fast.ops.dual_softmax import dual_softmax
from amtml_fast.ops.fused_linear_kd import fused_linear_kd_loss
from amtml_fast.ops.hint import hint_loss
from amtml_fast.ops.multi_teacher_kd import multi_teacher_kd_loss
from amtml_fast.ops.teacher_weights import teacher_weights
from amtml_fast.ops.topk_kd import topk_kd_loss

__all__ = [
    "angle_loss",
    "dual_softmax",
    "fused_linear_kd_loss",
    "hint_loss",
    "multi_teacher_kd_loss",
    "rkd_distance_loss",
    "teacher_weights",
    "topk_kd_loss",
]
