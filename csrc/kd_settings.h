// How a distillation is weighed and reduced: the numbers that all its operators take, on every device. The operators
// themselves take them one by one, for torch.library has no structs.
#pragma once

#include <cstdint>
#include <string>

namespace amtml {

struct KDSettings {
  double temperature, ce_weight, kl_weight, kl_scale;
  std::string mode;  // "mixture" or "sum"; of topk_kd what becomes of the classes that a teacher does not name
  std::string reduction;
  int64_t ignore_index;
  double label_smoothing;

  bool each_row() const { return reduction == "none"; }
};

}  // namespace amtml
