"""Training methods: one file and one line of METHODS each.

A method says what it needs and builds the objective, an `nn.Module` that turns one batch's outputs into a `StepLoss`.
"""

from __future__ import annotations

from . import amtml_kd, avg_mkd, student
from .base import Context, Method, StepLoss

METHODS: dict[str, Method] = {method.name: method for method in (student.METHOD, avg_mkd.METHOD, amtml_kd.METHOD)}

__all__ = ["METHODS", "Context", "Method", "StepLoss"]
