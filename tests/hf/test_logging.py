"""What a logged step says of teachers and entropies, whatever makes it one."""

import math

import pytest
import torch
from backends import cpu_only
from tiny_models import S, collate, examples, llama, trainer
from transformers import TrainerCallback

pytestmark = cpu_only
EPOCHS = dict(logging_strategy="epoch", max_steps=-1, num_train_epochs=2, logging_steps=500)


def logs_of(folder, data=None, teachers=None, callback=None, **options):
    made = trainer(folder, llama(), teachers or [llama(24, 1), llama(8, 2)], data, **options)
    if callback is not None:
        made.add_callback(callback)
    made.train()
    return [logs for logs in made.state.log_history if "loss" in logs]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(examples(10))


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (dict(logging_steps=2, max_steps=5), [2, 4]),
        (dict(logging_steps=0.5, max_steps=4), [2, 4]),
        (dict(logging_first_step=True, logging_steps=3, max_steps=4), [1, 3]),
        (dict(logging_first_step=True, logging_steps=500, max_steps=2), [1]),
        (EPOCHS, [2, 4]),
        (dict(EPOCHS, logging_steps=3), [2, 4]),
        (dict(EPOCHS, logging_first_step=True), [1, 2, 4]),
        (dict(EPOCHS, per_device_train_batch_size=1, gradient_accumulation_steps=3), [3, 6]),
        (dict(EPOCHS, max_steps=3), [2, 3]),
        (dict(EPOCHS, data=Stream(), max_steps=7), [3, 6, 7]),
    ],
    ids=lambda value: "" if isinstance(value, list) else ", ".join(f"{n} {v}" for n, v in value.items() if n != "data"),
)
def test_every_logged_step_has_the_teachers(tmp_path, options, steps):
    logs = logs_of(tmp_path, **options)
    assert [of["step"] for of in logs] == steps
    for of in logs:
        assert math.isclose(of["teacher_0_weight"], 0.5) and of["teacher_0_kl"] > 0 and of["teacher_1_kl"] > 0


def test_they_are_of_that_step_alone(tmp_path):
    options = dict(max_steps=4, learning_rate=0.1)
    every = logs_of(tmp_path, logging_steps=1, **options)
    for chosen, at in ((dict(logging_steps=2), (2, 4)), (dict(EPOCHS, max_steps=4), (2, 4))):
        some = logs_of(tmp_path, **{**options, **chosen})
        assert [of["step"] for of in some] == list(at)
        for of in some:
            same = every[of["step"] - 1]
            for name in ("teacher_0_kl", "teacher_1_kl", "student_entropy", "target_entropy"):
                assert math.isclose(of[name], same[name], rel_tol=1e-6), name


def test_a_step_that_only_a_callback_logs_has_none_and_none_of_another_step(tmp_path):
    class At(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_log = control.should_log or state.global_step == 3
            return control

    logs = logs_of(tmp_path, callback=At(), logging_steps=2, max_steps=4)
    assert {of["step"]: "teacher_0_kl" in of for of in logs} == {2: True, 3: False, 4: True}


def test_tokens_that_do_not_count_may_have_no_teacher(tmp_path):
    data = [dict(e, teacher_index=torch.arange(len(e["input_ids"])) % 2) for e in examples()]

    def padded(given):
        batch = collate([{name: x for name, x in e.items() if name != "teacher_index"} for e in given])
        pad = [torch.nn.functional.pad(e["teacher_index"], (0, S - len(e["teacher_index"])), value=-100) for e in given]
        return {**batch, "teacher_index": torch.stack(pad)}

    logs = logs_of(tmp_path, data, collator=padded, weighting="routed")
    assert len(logs) == 2
    for of in logs:
        assert 0 < of["teacher_0_weight"] < 1 and math.isclose(of["teacher_0_weight"] + of["teacher_1_weight"], 1)
