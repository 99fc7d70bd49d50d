// One kernel for each fault that the emulator must tell: test_emulator.py. The argument is the fault's number.
#include "cuda_runtime.h"

namespace {

using emulation::launch;

float* shared() { return reinterpret_cast<float*>(emulation::machine().thread->block->shared.get()); }

void nothing() {}

void right() {
  shared()[threadIdx.x] = 1;
  __syncthreads();
  const float sum = __shfl_xor_sync(~0u, shared()[63 - threadIdx.x], 1);
  if (sum != 1) emulation::fail("a wrong number");
}

void barriers_that_differ() {
  if (threadIdx.x == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

void shuffles_that_differ() {
  if (threadIdx.x < 8) {
    __shfl_xor_sync(~0u, 1.0f, 1);
  } else {
    __shfl_xor_sync(~0u, 2.0f, 1);
  }
}

void lanes_that_left() {
  if (threadIdx.x < 8) return;
  __shfl_xor_sync(~0u, 1.0f, 8);
}

void too_little_shared_memory() { shared()[threadIdx.x + 1] = 1; }

// Three kernels: the last reads what the first writes, and waits behind that.
float made, read;
void make() { made = 1; }
void pass_on() { emulation::wait_for_previous(); }
void read_too_soon() {
  read = made;
  emulation::wait_for_previous();
}

void run(int fault) {
  const auto plain = [](void (*kernel)(), dim3 grid = 2, dim3 block = 64, size_t bytes = 64 * sizeof(float)) {
    launch({grid, block, 1, bytes, false, kernel});
  };
  switch (fault) {
    case 0:
      return plain(right);
    case 1:
      return plain(barriers_that_differ);
    case 2:
      return plain(shuffles_that_differ);
    case 3:
      return plain(lanes_that_left);
    case 4:
      return plain(too_little_shared_memory);
    case 5:
      return plain(nothing, {1, 1 << 16});
    case 6:
      return plain(nothing, 1, 2048);
    case 7:
      return plain(nothing, 1, 32, 256 << 10);
    default:
      plain(make, 1, 1);
      launch({1, 1, 1, 0, true, pass_on});
      launch({1, 1, 1, 0, true, read_too_soon});
      emulation::settle();
      if (read != 1) throw std::runtime_error("read too soon");
  }
}

}  // namespace

int main(int, char** arguments) {
  try {
    run(std::atoi(arguments[1]));
    emulation::settle();
  } catch (const std::exception& error) {
    std::puts(error.what());
  }
}
