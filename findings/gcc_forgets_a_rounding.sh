#!/usr/bin/env bash
# GCC 12: what rounding a double to float cuts off is 0, where two of them stand side by side.
#
# Compiler: g++ 12.2.0 (Debian 12: g++-12 12.2.0-14+deb12u1, which must be installed), x86-64. Seen there, and checked by this script:
#   A function rounds two doubles to float and keeps the differences, as a sum of two floats does that stands for a double. At -O2, with no other
#   option, both differences are exactly 0, where they should be about 1e-8 of the numbers: vectorized side by side, (double)(float)x has become x.
#   With a logarithm in front it needs -fno-math-errno. With -O1, with -fno-tree-slp-vectorize, and through a volatile float they are right.
# Printed: for each set of options how many of two differences are 0: of two products, of two products through a volatile float, of two logarithms.
set -euo pipefail
compiler=$(command -v g++-12 || command -v g++)
[ "$("$compiler" -dumpfullversion)" = 12.2.0 ] || { echo "needs g++ 12.2.0, found $("$compiler" -dumpfullversion)"; exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat > see.cpp <<'CPP'
#include <cmath>
#include <cstdio>

struct Pair {
  double in[2], cut[2];
  float near[2];
  int zeros() const { return (cut[0] == 0) + (cut[1] == 0); }
};

__attribute__((noinline)) void products(Pair& p) {
  for (int i = 0; i < 2; ++i) {
    const double exact = p.in[i] * 1.1;
    const float near = static_cast<float>(exact);
    p.cut[i] = exact - near;
    p.near[i] = near;
  }
}

__attribute__((noinline)) void kept(Pair& p) {
  for (int i = 0; i < 2; ++i) {
    const double exact = p.in[i] * 1.1;
    volatile float near = static_cast<float>(exact);
    p.cut[i] = exact - near;
    p.near[i] = near;
  }
}

__attribute__((noinline)) void logarithms(Pair& p) {
  for (int i = 0; i < 2; ++i) {
    const double exact = std::log(p.in[i]);
    const float near = static_cast<float>(exact);
    p.cut[i] = exact - near;
    p.near[i] = near;
  }
}

int main() {
  Pair a{{1.3, 2.3}, {}, {}}, b = a, c = a;
  products(a), kept(b), logarithms(c);
  std::printf("%d %d %d\n", a.zeros(), b.zeros(), c.zeros());
}
CPP
check() {  # options, and what is to be seen
  "$compiler" $1 see.cpp -o see
  seen=$(./see)
  echo "$1: $seen"
  [ "$seen" = "$2" ] || { echo "behavior has changed"; exit 1; }
}
check "-O1 -fno-math-errno" "0 0 0"
check "-O2" "2 0 0"
check "-O2 -fno-math-errno" "2 0 2"
check "-O3 -fno-math-errno" "2 0 2"
check "-O2 -fno-math-errno -fno-tree-slp-vectorize" "0 0 0"
