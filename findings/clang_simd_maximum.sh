#!/usr/bin/env bash
# Clang: the largest of many -inf is -3.4e38 by an OpenMP reduction(max : x), and the smallest of many inf 3.4e38.
#
# Packages: ziglang 0.17.1 (Clang 22.1.8). Seen there, and checked by this script:
#   A reduction begins each lane's own copy of x with the least number of the type, by which Clang means the least finite one. So where x is
#   -inf and so is all that it meets, as in a row of logits whose classes are all masked, the loop makes it the lowest finite number.
#   It is so from -O0 to -O3, and by its annotation alone: the same loop without it, or without -fopenmp-simd, gives -inf. A softmax that takes
#   the maximum off then computes exp(-inf + 3.4e38), which is 0 and not NaN. A loop over no number leaves x as it was. The maximum of integers
#   and sums are right.
# Seen, not checked: the same with Clang 14.0.6; GCC 12 gives -inf.
# Printed: for each optimization level, the largest of 64 times -inf and the smallest of 64 times inf, with the annotation and without it,
#   then the loop without it, whether the maximum of integers is right, the sum, and whether exp is 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q ziglang==0.17.1
cd "$folder"
cat > see.cpp <<'CPP'
#include <climits>
#include <cmath>
#include <cstdio>
#include <vector>

float largest(const std::vector<float>& numbers) {
  float most = -INFINITY;
#pragma omp simd reduction(max : most)
  for (int i = 0; i < (int)numbers.size(); ++i) most = numbers[i] > most ? numbers[i] : most;
  return most;
}

float smallest(const std::vector<float>& numbers) {
  float least = INFINITY;
#pragma omp simd reduction(min : least)
  for (int i = 0; i < (int)numbers.size(); ++i) least = numbers[i] < least ? numbers[i] : least;
  return least;
}

float plain(const std::vector<float>& numbers) {
  float most = -INFINITY;
  for (int i = 0; i < (int)numbers.size(); ++i) most = numbers[i] > most ? numbers[i] : most;
  return most;
}

int whole(const std::vector<int>& numbers) {
  int most = INT_MIN;
#pragma omp simd reduction(max : most)
  for (int i = 0; i < (int)numbers.size(); ++i) most = numbers[i] > most ? numbers[i] : most;
  return most;
}

float sum(const std::vector<float>& numbers) {
  float all = 0;
#pragma omp simd reduction(+ : all)
  for (int i = 0; i < (int)numbers.size(); ++i) all += numbers[i];
  return all;
}

int main() {
  const std::vector<float> low(64, -INFINITY), high(64, INFINITY), none;
  const std::vector<int> least(64, INT_MIN);
  std::printf("%g %g %g, ", largest(low), smallest(high), largest(none));
  std::printf("%g %d %g %d\n", plain(low), whole(least) == INT_MIN, sum(low), std::exp(-INFINITY - largest(low)) == 0);
}
CPP
export ZIG_GLOBAL_CACHE_DIR="$folder/cache" ZIG_LOCAL_CACHE_DIR="$folder/cache"
for level in -O0 -O1 -O2 -O3; do
  for annotated in -fopenmp-simd -fno-openmp-simd; do
    venv/bin/python -m ziglang c++ "$level" "$annotated" -w see.cpp -o see
    seen=$(./see)
    echo "$level $annotated: $seen"
    if [ "$annotated" = -fopenmp-simd ]; then wanted="-3.40282e+38 3.40282e+38 -inf, -inf 1 -inf 1"; else wanted="-inf inf -inf, -inf 1 -inf 0"; fi
    [ "$seen" = "$wanted" ] || { echo "behavior has changed"; exit 1; }
  done
done
