#include "least_cost.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace comoe {

LeastCost::LeastCost(int levels, std::vector<double> loss, std::vector<double> bytes,
                     std::vector<double> steps, double price, double bandwidth, double latency)
    : levels_(levels),
      loss_(std::make_shared<const std::vector<double>>(std::move(loss))),
      bytes_(std::make_shared<const std::vector<double>>(std::move(bytes))),
      steps_(std::make_shared<const std::vector<double>>(std::move(steps))),
      seconds_price_(price / bandwidth),
      wait_price_(price * latency) {
  if (levels < 1 || loss_->size() % levels != 0 || bytes_->size() != loss_->size() ||
      steps_->size() != loss_->size() * levels)
    throw std::invalid_argument("LeastCost: expected loss and bytes [X, L] and steps [X, L, L]");
  if (!(price >= 0) || !(bandwidth > 0) || !(latency >= 0))
    throw std::invalid_argument(
        "LeastCost: expected price and latency at least 0 and bandwidth above 0");
}

LeastCost LeastCost::with_loss(std::vector<double> loss) const {
  if (loss.size() != loss_->size())
    throw std::invalid_argument("LeastCost.with_loss: expected [X, L]");
  LeastCost other = *this;
  other.loss_ = std::make_shared<const std::vector<double>>(std::move(loss));
  return other;
}

void LeastCost::decide(std::vector<MissingExpert>& experts, double caution) const {
  constexpr double kNever = std::numeric_limits<double>::infinity();
  double gain_of_all = 0;
  std::vector<double> gains(experts.size());
  for (size_t i = 0; i < experts.size(); ++i) {
    MissingExpert& x = experts[i];
    const double* loss = &(*loss_)[x.expert * levels_];
    const double* missing = x.resident >= 0
                                ? &(*steps_)[(x.expert * levels_ + x.resident) * levels_]
                                : &(*bytes_)[x.expert * levels_];
    double least = kNever;
    x.decided = 0;
    for (int l = std::max(x.resident, 0); l <= x.low; ++l) {
      const double cost = loss[l] * x.square + caution * seconds_price_ * missing[l];
      if (cost < least) {
        least = cost;
        x.decided = l;
      }
    }
    const double stay = x.resident >= 0 ? loss[x.resident] * x.square : kNever;
    // Both may be infinite: then there is nothing to gain.
    gains[i] = stay > least ? stay - least : 0;
    gain_of_all += gains[i];
  }
  // An expert that is not waited for costs no time; all who wait share the price of waiting at all.
  const bool wait = gain_of_all > caution * wait_price_;
  for (size_t i = 0; i < experts.size(); ++i)
    if (!wait || gains[i] <= 0) experts[i].decided = std::min(experts[i].resident, experts[i].low);
}

}  // namespace comoe
