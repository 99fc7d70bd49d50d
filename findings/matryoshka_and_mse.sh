#!/usr/bin/env bash
# sentence-transformers: MSELoss inside MatryoshkaLoss does not teach lengths.
#
# Packages: sentence-transformers 6.2.0, transformers 5.24.0, torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   MatryoshkaLoss cuts the student's embeddings to each dimension and makes them unit vectors, also at the full dimension. It cuts the
#   teacher's embeddings, given as labels, but does not normalize them. So MSELoss compares a unit vector with one of another length: a student
#   that is its teacher has a loss, ten times the teacher has the same one, and neither has a gradient. What is trained is the direction.
#   MatryoshkaLoss of the full dimension alone is not MSELoss.
#   That holds for a teacher of unit vectors, too, at each dimension but the full one. A reported loss has a floor that is no fault of the student.
#   EmbedDistillLoss with the cosine, which knows no lengths, is 0 for a copy in all cases.
# Printed: for a teacher with and without unit vectors, loss and gradient's norm of a copy of it and of ten times the copy.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy sentence-transformers==6.2.0 transformers==5.24.0
cd "$folder"
cat > see.py <<'PY'
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers

torch.manual_seed(0)
words = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate("abcdefgh")}, unk_token="a"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
student = SentenceTransformer(modules=[StaticEmbedding(words, embedding_dim=8)], device="cpu")
weight = next(student.parameters())
texts = list("abcdefgh")
kinds = {
    "MSELoss": lambda: losses.MSELoss(student),
    "Matryoshka(MSELoss, [8])": lambda: losses.MatryoshkaLoss(student, losses.MSELoss(student), [8]),
    "Matryoshka(MSELoss, [8, 4, 2])": lambda: losses.MatryoshkaLoss(student, losses.MSELoss(student), [8, 4, 2]),
    "Matryoshka(cosine, [8, 4, 2])": lambda: losses.MatryoshkaLoss(student, losses.EmbedDistillLoss(student), [8, 4, 2]),
}
seen = {}
for unit in (False, True):
    teacher = torch.nn.functional.normalize(torch.randn(8, 8)) if unit else torch.randn(8, 8)
    for name, make in kinds.items():
        for factor in (1, 10):
            weight.data.copy_(factor * teacher)
            weight.grad = None
            loss = make()([student.preprocess(texts)], teacher.clone())
            loss.backward()
            seen[unit, name, factor] = loss.item(), weight.grad.norm().item()
        row = seen[unit, name, 1] + seen[unit, name, 10]
        print(f"unit vectors {unit}, {name}: copy {row[0]:.4f}, gradient {row[1]:.4f}; ten times {row[2]:.4f}, gradient {row[3]:.4f}")
for (unit, name, factor), (loss, gradient) in seen.items():
    if name == "MSELoss":
        assert (loss == 0) == (factor == 1) == (gradient == 0), "behavior has changed"
    else:
        assert gradient < 1e-5 and abs(loss - seen[unit, name, 1][0]) < 1e-5, "behavior has changed"
        assert (loss > 0.05) == ("MSE" in name and not (unit and "[8])" in name)), "behavior has changed"
PY
venv/bin/python see.py
