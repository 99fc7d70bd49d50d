"""Fast multi-teacher knowledge distillation: fused losses for your own loop, and a trainer around them."""

from amtml_fast.amtml import AMTMLLoss, AMTMLOutput
from amtml_fast.backend import backends, use_backend
from amtml_fast.functional import (
    angle_loss,
    dual_softmax,
    fused_linear_kd_loss,
    hint_loss,
    multi_teacher_kd_loss,
    rkd_distance_loss,
    teacher_weights,
    topk_kd_loss,
)
from amtml_fast.gate import TeacherGate
from amtml_fast.losses import (
    AngleLoss,
    DualSoftmax,
    FusedLinearKDLoss,
    MultiGroupHintLoss,
    MultiTeacherKDLoss,
    RKDDistanceLoss,
    TeacherAdapter,
    TopKKDLoss,
)
from amtml_fast.terms import KDStats, LinearTeacher, TopKTeacher
from amtml_fast.version import __version__

__all__ = [
    "AMTMLLoss",
    "AMTMLOutput",
    "AngleLoss",
    "DualSoftmax",
    "FusedLinearKDLoss",
    "KDStats",
    "LinearTeacher",
    "MultiGroupHintLoss",
    "MultiTeacherKDLoss",
    "RKDDistanceLoss",
    "TeacherAdapter",
    "TeacherGate",
    "TopKKDLoss",
    "TopKTeacher",
    "__version__",
    "angle_loss",
    "backends",
    "dual_softmax",
    "fused_linear_kd_loss",
    "hint_loss",
    "multi_teacher_kd_loss",
    "rkd_distance_loss",
    "teacher_weights",
    "topk_kd_loss",
    "use_backend",
]
