"""MTKD-RL (Yang et al. 2025): an agent weighs the teachers of each example, and is rewarded by what the student makes of them.

w = c_1 agent(state) + c_2 (1 - softmax_t CE_t) / (T - 1) + c_3 softmax_t KL_t, with c of sum 1: learned. The state is what all
teachers say, with CE_t to the label and KL_t to the student.

The reward is what the student loses, -(CE + sum_t w_t KL_t). It is linear in w, so its gradient needs no drawn actions:
sum_t R_t grad w_t, with R_t = -(CE + KL_t) relative to the other teachers of the example.

mtkd_rl_code has the update of the authors' code in its place: - mean r_i log w_it, with the reward r_i of an example in units of the
batch's standard deviation, within [0, 1]. All teachers of an example get the same, so it makes weights more equal.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...gate import log_probabilities
from ..data.parts import IGNORED
from .base import KD, Context, KDLoss, Method, Objective, Step, StepLoss, average, divergences, mean_of_known, of_label
from .ca_mkd import confidence_weights

WIDTH = 128  # of the agent, as in the authors' code
SLOWER = 0.1  # on the reward: theirs learns without momentum, which makes steps ten times as long at the student's 0.9
TINY = torch.finfo(torch.float32).tiny


class ReinforcedKD(Objective):
    def __init__(self, context: Context) -> None:
        super().__init__()
        count = len(context.teacher_names)
        self.temperature, self.processes = context.loss.temperature, context.processes
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
        kd, reward = self.kd(step, fixed), self.reward(step, weights, gaps)
        return StepLoss(kd - SLOWER * reward, {"kd": kd.detach(), "reward": reward.detach()}, fixed)

    def weights(self, step: Step, gaps: Tensor) -> Tensor:
        """[N, T]; without a label the teachers are equally confident."""
        log_p = log_probabilities(step.teacher_logits)
        state = [log_p.flatten(1), gaps]
        if self.sees_labels:
            state.append(-of_label(log_p, step.labels))
        own = self.agent(torch.cat(state, 1)).float().softmax(1)
        confident = confidence_weights(step.teacher_logits, step.labels)
        return torch.stack([own, confident, gaps.softmax(1)], -1) @ self.shares.softmax(0)

    def reward(self, step: Step, weights: Tensor, gaps: Tensor) -> Tensor:
        """Its gradient trains the agent: mean over the examples with a label."""
        # The student's cross-entropy is the same for every teacher.
        return mean_of_known((weights * relative(-gaps)).sum(1), step.labels, self.processes)


class RewardedKD(ReinforcedKD):
    """The update of the authors' code."""

    def reward(self, step: Step, weights: Tensor, gaps: Tensor) -> Tensor:
        ce = F.cross_entropy(step.logits.detach().float(), step.labels, ignore_index=IGNORED, reduction="none")
        lost = ce + (weights.detach() * gaps).sum(1)
        mean = self.mean(lost, step.labels)
        deviation = self.mean((lost - mean).square(), step.labels).sqrt()
        rewards = ((mean - lost) / deviation.clamp_min(TINY)).clamp(0, 1)
        return mean_of_known(rewards * weights.log().mean(1), step.labels, self.processes)

    def mean(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Over the examples of all processes with a label."""
        return average(mean_of_known(rows, labels, self.processes), self.processes)


def relative(rewards: Tensor) -> Tensor:
    """[N, T] between the least and the greatest of an example, against their mean: in (-1, 1), and 0 where all are equal."""
    least, greatest = rewards.amin(1, keepdim=True), rewards.amax(1, keepdim=True)
    share = (rewards - least) / (greatest - least).clamp_min(TINY)
    return share - share.mean(1, keepdim=True)


METHOD = Method(name="mtkd_rl", label="MTKD-RL", build=ReinforcedKD, reads=KD, labels=lambda loss: True)
CODE = replace(METHOD, name="mtkd_rl_code", label="MTKD-RL, authors' code", build=RewardedKD)
