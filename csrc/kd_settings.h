// How a distillation is weighed and reduced: the numbers that all its operators take, on every device. The operators
// themselves take them one by one, for torch.library has no structs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <string>
#include <vector>

#include "arithmetic.h"
#include "common.h"

namespace amtml {

struct KDSettings {
  double temperature, ce_weight, kl_weight, kl_scale;
  std::string mode;  // "mixture" or "sum"; of topk_kd what becomes of the classes that a teacher does not name
  std::string reduction;
  int64_t ignore_index;
  double label_smoothing;

  bool each_row() const { return reduction == "none"; }
};

enum class DivergenceMode { mixture, sum, logits };

struct DivergenceSettings {
  KDSettings kd;  // kl_scale is not used: a row's is its temperature squared, or 1
  Divergence kind;
  DivergenceMode mode;
  double beta;
  std::vector<double> teacher_temperatures;  // empty: the student's
  bool t2_scale;

  DivergenceSettings(const std::string& divergence, double beta_, const std::string& mode_,
                     std::vector<double> teacher_temperatures_, double temperature, bool t2_scale_, double ce_weight,
                     double kl_weight, const std::string& reduction, int64_t ignore_index, double label_smoothing)
      : kd{temperature, ce_weight, kl_weight, 1, mode_, reduction, ignore_index, label_smoothing},
        beta(beta_),
        teacher_temperatures(std::move(teacher_temperatures_)),
        t2_scale(t2_scale_) {
    constexpr const char* names[] = {"forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd"};
    const auto name = std::find(std::begin(names), std::end(names), divergence);
    STD_TORCH_CHECK(name != std::end(names), "multi_teacher_kd_loss: unknown divergence ", divergence);
    kind = static_cast<Divergence>(name - std::begin(names));
    mode = mode_ == "mixture" ? DivergenceMode::mixture : mode_ == "sum" ? DivergenceMode::sum : DivergenceMode::logits;
  }
};

// What the operators of topk_bucket hand one another; amtml_fast/ops/topk_bucket.py describes it.
constexpr int64_t kNobody = -(int64_t{1} << 62);  // in the place of a class: the entry is of the bucket
constexpr int kFound = 8;                         // numbers a row

}  // namespace amtml
