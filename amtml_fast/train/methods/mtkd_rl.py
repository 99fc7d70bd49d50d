"""MTKD-RL (Yang et al. 2025): an agent weighs the teachers of each example, and is rewarded by what the student makes of them.

w = c_1 agent(state) + c_2 (1 - softmax_t CE_t) / (T - 1) + c_3 softmax_t KL_t, with c of sum 1: learned. The state is what all
teachers say, with CE_t to the label and KL_t to the student.

The reward is what the student loses, -(CE + sum_t w_t KL_t). It is linear in w, so its gradient needs no drawn actions:
sum_t R_t grad w_t, with R_t = -(CE + KL_t) relative to the other teachers of the example.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...gate import log_probabilities
from ..data.parts import IGNORED
from .base import KD, Context, KDLoss, Method, Objective, Step, StepLoss, divergences
from .ca_mkd import confidence_weights

WIDTH = 128  # of the agent, as in the authors' code


class ReinforcedKD(Objective):
    def __init__(self, context: Context) -> None:
        super().__init__()
        count = len(context.teacher_names)
        self.temperature = context.loss.temperature
        # An agent that must weigh images without a label does not learn to look at what only the others have.
        self.sees_labels = not context.hidden_labels
        state = count * (context.classes + 1 + int(self.sees_labels))
        self.agent = nn.Sequential(nn.Linear(state, WIDTH, bias=False), nn.ReLU(), nn.Linear(WIDTH, count))
        self.shares = nn.Parameter(torch.ones(3, dtype=torch.float32, device="cpu"))
        self.kd = KDLoss(context.loss, mode="sum")

    def forward(self, step: Step) -> StepLoss:
        gaps = divergences(step.logits.detach(), step.teacher_logits, self.temperature)  # [N, T]
        weights = self.weights(step, gaps)
        fixed = weights.detach().nan_to_num(1 / weights.shape[1])  # a student that diverges says so by its loss
        kd = self.kd(step, fixed)
        known = step.labels != IGNORED
        rewards = relative(-gaps)  # the student's own cross-entropy is the same for every teacher
        reward = (weights * rewards).sum(1).where(known, 0).sum() / known.sum().clamp_min(1)
        return StepLoss(kd - reward, {"kd": kd.detach(), "reward": reward.detach()}, fixed)

    def weights(self, step: Step, gaps: Tensor) -> Tensor:
        """[N, T]; without a label the teachers are equally confident."""
        log_p = log_probabilities(step.teacher_logits)
        state = [log_p.flatten(1), gaps]
        if self.sees_labels:
            at = step.labels[:, None, None].expand(-1, log_p.shape[1], 1)
            state.append(-log_p.gather(2, at)[..., 0])
        own = self.agent(torch.cat(state, 1)).float().softmax(1)
        confident = confidence_weights(step.teacher_logits, step.labels)
        return torch.stack([own, confident, gaps.softmax(1)], -1) @ self.shares.softmax(0)


def relative(rewards: Tensor) -> Tensor:
    """[N, T] against the mean of an example's teachers, in units of their range; 0 where all are equal."""
    spread = rewards.amax(1, keepdim=True) - rewards.amin(1, keepdim=True)
    return (rewards - rewards.mean(1, keepdim=True)) / spread.clamp_min(torch.finfo(torch.float32).tiny)


METHOD = Method(name="mtkd_rl", label="MTKD-RL", build=ReinforcedKD, reads=KD, labels=lambda loss: True)
