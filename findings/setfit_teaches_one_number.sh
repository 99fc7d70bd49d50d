#!/usr/bin/env bash
# SetFit: its distillation teaches the student that all texts are the same, whatever the teacher says.
#
# Packages: setfit 1.2.0, sentence-transformers 6.2.0, transformers 5.24.0, datasets 5.2.0, accelerate 1.15.0, scikit-learn 1.9.1, torch 2.13.0
# (CPU build). Seen there, and checked by this script:
#   DistillationTrainer embeds the texts with the teacher and makes pairs of texts, whose targets are to be the teacher's cosines. The pairs are
#   made by the constructor of the parent class, which at that time has numbered all texts 0. So each target is the cosine of the first text with
#   itself, 1. The student's body learns to give all texts one embedding. The loss goes to 0, and nothing warns.
#   Here its mean cosine of two texts goes from 0.07 to 0.95, where the teacher's is 0.14, and its cosines do not follow the teacher's.
#   With pairs that have the teacher's cosines, given by a subclass, the same student ends at a correlation of 0.99 with the teacher's.
#   Right is such a subclass, or training the body by sentence-transformers' own losses.
# Printed: the targets that the trainer makes of the teacher's cosines; for the teacher and each student, the mean cosine of two texts and the
#   correlation with the teacher's cosines; and the loss.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 setfit==1.2.0 sentence-transformers==6.2.0 transformers==5.24.0 datasets==5.2.0 \
  accelerate==1.15.0 scikit-learn==1.9.1 numpy
cd "$folder"
export HF_HOME="$folder/cache" HF_DATASETS_DISABLE_PROGRESS_BARS=1
cat > see.py <<'PY'
import random
from itertools import combinations

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, util
from sentence_transformers.models import StaticEmbedding
from setfit import DistillationTrainer, SetFitModel, TrainingArguments
from sklearn.linear_model import LogisticRegression
from tokenizers import Tokenizer, models, pre_tokenizers

torch.set_num_threads(1)
words = [f"w{i}" for i in range(40)]
draw = random.Random(0)
texts = [" ".join(draw.choices(words[:20] if i % 2 else words[20:], k=5)) for i in range(16)]
tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", *words])}, unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()


def model(seed):
    torch.manual_seed(seed)
    body = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu")
    return SetFitModel(model_body=body, model_head=LogisticRegression())


def cosines(of):
    embeddings = of.model_body.encode(texts, convert_to_tensor=True)
    return torch.stack([util.cos_sim(embeddings[i], embeddings[j]).squeeze() for i, j in combinations(range(len(texts)), 2)])


class Right(DistillationTrainer):
    def get_dataset(self, x, y, args, max_pairs=-1):
        pairs = combinations(range(len(texts)), 2)
        rows = [{"sentence_1": texts[i], "sentence_2": texts[j], "label": c.item()} for (i, j), c in zip(pairs, cosines(self.teacher_model))]
        return Dataset.from_list(rows), args.loss(self.model.model_body)


teacher = model(0)
teacher.model_head.fit(teacher.model_body.encode(texts), [i % 2 for i in range(len(texts))])
wanted = cosines(teacher)
seen = {"teacher": teacher, "student, untrained": model(1)}
losses = {}
for kind in (DistillationTrainer, Right):
    student = model(1)
    arguments = TrainingArguments("out", batch_size=16, num_epochs=20, body_learning_rate=0.05, report_to="none", save_strategy="no")
    trainer = kind(teacher_model=teacher, student_model=student, train_dataset=Dataset.from_dict({"text": texts}), args=arguments)
    if kind is DistillationTrainer:
        targets = {float(target) for target in trainer.get_dataset(texts, None, arguments)[0]["label"]}
        print(f"the teacher's cosines: {wanted.min():.2f} to {wanted.max():.2f}; all targets: {targets}")
    trainer.train()
    seen[f"student of {kind.__name__}"] = student
    losses[kind] = [float(log["embedding_loss"]) for log in trainer.st_trainer.state.log_history if "embedding_loss" in log]
numbers = {}
for name, of in seen.items():
    got = cosines(of)
    numbers[name] = got.mean().item(), torch.corrcoef(torch.stack([got, wanted]))[0, 1].item()
    print(f"{name}: mean cosine {numbers[name][0]:.2f}, correlation with the teacher's {numbers[name][1]:.2f}")
first, *_, last = losses[DistillationTrainer]
print(f"loss of DistillationTrainer: {first:.2f} at first, {last:.4f} at the end")
assert last < 0.02 < first, "behavior has changed"
assert {round(target, 4) for target in targets} == {1.0} and wanted.max() < 0.95, "behavior has changed"
mean, correlation = numbers["student of DistillationTrainer"]
assert mean > 0.9 and abs(correlation) < 0.4, "behavior has changed"
assert numbers["teacher"][0] < 0.3 and numbers["student, untrained"][0] < 0.3, "behavior has changed"
assert numbers["student of Right"][1] > 0.9, "behavior has changed"
PY
venv/bin/python -W ignore see.py 2> log | grep -v "^{" || { tail -5 log; exit 1; }
