// How the threads of a CPU share the rows of an operator.
#pragma once

#include <atomic>
#include <functional>

#include "simd.h"

namespace amtml {

// Items begin to end of those that threads share.
struct Share {
  int64_t begin = 0, end = 0;
};

// Gives a thread its next share, until none is left.
class Shares {
 public:
  Shares(int64_t begin, int64_t end) : share_{begin, end} {}
  Shares(std::atomic<int64_t>& taken, int64_t size, int64_t n) : taken_(&taken), size_(size), n_(n) {}

  bool operator()(Share& share) {
    if (taken_) {
      const int64_t begin = taken_->fetch_add(size_, std::memory_order_relaxed);
      share_ = {begin, std::min(begin + size_, n_)};
    }
    share = share_;
    share_ = {};
    return share.begin < share.end;
  }

 private:
  Share share_;
  std::atomic<int64_t>* taken_ = nullptr;
  int64_t size_ = 0, n_ = 0;
};

// body(next) in each thread, where next(share) gives it shares of n items of `work` elements each. Much work is handed
// out piece by piece: a thread whose core is busy takes fewer. Little work is cut once, so that a thread finds in its
// cache what it wrote there the last time. Who takes what changes no number. (No template: torch's parallel_for is one,
// of 2 KB a body, and this is called once a thread.)
inline void in_shares(int64_t n, int64_t work, const std::function<void(Shares&)>& body) {
  constexpr int64_t kMuch = 1 << 22, kShares = 64;
  if (n * work < kMuch) {
    torch::stable::parallel_for(0, n, grain(work), [&](int64_t begin, int64_t end) {
      Shares next(begin, end);
      body(next);
    });
    return;
  }
  const int64_t size = std::max(grain(work), (n + kShares - 1) / kShares);
  std::atomic<int64_t> taken{0};
  torch::stable::parallel_for(0, (n + size - 1) / size, 1, [&](int64_t, int64_t) {
    Shares next(taken, size, n);
    body(next);
  });
}

}  // namespace amtml
