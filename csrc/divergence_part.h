// What the operators of a part of the classes (a vocabulary split among processes) have in common on every device.
#pragma once

#include "kd_settings.h"

namespace amtml {

constexpr int64_t kIgnored = -1;  // a label that leaves its row out; another one below 0 is that of another process

// Columns of what forward makes of a row.
struct PartLayout {
  int64_t each, totals, weights, ce, statistics;

  PartLayout() = default;
  PartLayout(const DivergenceSettings& set, int64_t teachers, bool labeled, bool need_totals, bool need_weights,
             bool need_statistics)
      : each(set.mode == DivergenceMode::sum ? teachers : 1),
        totals(need_totals ? each : 0),
        weights(0),
        ce(labeled ? 2 : 0),
        statistics(need_statistics ? 6 + teachers : 0) {
    if (need_weights && set.mode != DivergenceMode::sum) {
      weights = set.mode == DivergenceMode::logits ? 2 * teachers + 1 : teachers;
    }
  }
  AMTML_SHARED int64_t size() const { return each + totals + weights + ce + statistics; }
};

// Rows that nobody weighs or adds up yet.
inline DivergenceSettings part_settings(const std::string& divergence, double beta, const std::string& mode,
                                        const std::vector<double>& teacher_temperatures, double temperature,
                                        double label_smoothing) {
  return DivergenceSettings(divergence, beta, mode, teacher_temperatures, temperature, false, 1, 1, "none", kIgnored,
                            label_smoothing);
}

}  // namespace amtml
