#!/usr/bin/env bash
# TRL: GOLD between two tokenizers teaches a student that speaks like its teacher to repeat the second half of each split word.
#
# Packages: trl 1.16.0, transformers 5.24.0, accelerate 1.15.0, datasets 5.2.0, torch 2.13.0 (CPU build). Seen there, and checked by this script:
#   GOLD compares the probabilities of student and teacher where their tokens end at the same byte. Where the teacher has one token "cd" and the
#   student two, "c" and "d", it multiplies, as documented, by the conditional probability of the actual later token, "d". By default
#   (uld_token_merge_strategy="observed") it takes the logits at "d" for that, which are about what comes after "d". So it multiplies by the
#   probability that "d" is followed by another "d". A student that is as sure of the text as its teacher has a loss of 0.67, where two of three
#   words are split. Trained with it, it gives "d" after "d" a probability of 1.00, and the right letter, which had 0.99, one of 0.00.
#   The logits that predict the first token of an answer get no gradient: the slice begins at that token.
#   With "bayesian", which takes the logits one token earlier, the loss is 0.02, and the right letter keeps its probability.
# Run here is ULDLoss, the trainer's loss. Read, not run: GOLDTrainer gives it both models' logits as they come.
# Printed: for both strategies, the loss of such a student, the positions with a gradient, and the probabilities of what follows "d" after training.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 datasets==5.2.0 trl==1.16.0 numpy
cd "$folder"
export HF_HOME="$folder/cache" TRL_EXPERIMENTAL_SILENCE=1
cat > see.py <<'PY'
import torch
from trl.experimental.gold import GOLDConfig
from trl.experimental.gold.gold_trainer import ULDLoss

torch.set_num_threads(1)
# Both models know one text, "abcdef." and its end, of which "ab" is the prompt, and are sure of each next token to 0.99.
LETTERS, WORDS = ["a", "b", "c", "d", "e", "f", ".", ""], ["ab", "cd", "ef", ".", ""]


def table(size):
    probs = torch.full((size, size), 0.01 / (size - 1))
    for token in range(size):
        probs[token, (token + 1) % size] = 0.99
    return probs.log()


def labels(tokens, prompt):
    return torch.tensor([[-100 if i < prompt else i for i in range(len(tokens))]])


def offsets(tokens, prompt):
    ends = torch.tensor([len(token) for token in tokens[prompt:]]).cumsum(0)
    spans = torch.stack([torch.cat([ends.new_zeros(1), ends[:-1]]), ends], dim=1)
    return torch.cat([spans.new_zeros(prompt, 2), spans]).unsqueeze(0)


seen = {}
for strategy in ("observed", "bayesian"):
    options = {} if strategy == "observed" else {"uld_token_merge_strategy": strategy}
    config = GOLDConfig("out", use_uld_loss=True, use_cpu=True, report_to=[], **options)
    assert config.uld_token_merge_strategy == strategy, "behavior has changed"
    loss_of = ULDLoss(config)

    def loss(logits):
        return loss_of(
            student_logits=logits,
            teacher_logits=table(len(WORDS)).unsqueeze(0),
            student_labels=labels(LETTERS, 2),
            teacher_labels=labels(WORDS, 1),
            student_input_ids=torch.arange(len(LETTERS)).unsqueeze(0),
            teacher_input_ids=torch.arange(len(WORDS)).unsqueeze(0),
            student_byte_offsets=offsets(LETTERS, 2),
            teacher_byte_offsets=offsets(WORDS, 1),
        )

    student = table(len(LETTERS)).requires_grad_()
    logits = student.unsqueeze(0) * 1
    logits.retain_grad()
    first = loss(logits)
    first.backward()
    rows = [LETTERS[i] or "end" for i in range(len(LETTERS)) if logits.grad[0, i].abs().sum() > 0]
    optimizer = torch.optim.Adam([student], lr=0.05)
    for _ in range(500):
        optimizer.zero_grad()
        loss(student.unsqueeze(0)).backward()
        optimizer.step()
    probs = student.softmax(-1)
    d, e = LETTERS.index("d"), LETTERS.index("e")
    seen[strategy] = first.item(), rows, probs[d, d].item(), probs[d, e].item()
    print('{}: loss {:.3f}, gradient at {}; trained, "d" after "d" {:.3f}, "e" after "d" {:.3f}'.format(strategy, *seen[strategy]))
loss, rows, again, right = seen["observed"]
assert 0.6 < loss < 0.7 and "b" not in rows and "." in rows, "behavior has changed"
assert again > 0.9 and right < 0.05, "behavior has changed"
loss, rows, again, right = seen["bayesian"]
assert loss < 0.03 and "b" in rows and "." not in rows, "behavior has changed"
assert again < 0.05 and right > 0.9, "behavior has changed"
PY
venv/bin/python -W ignore see.py
