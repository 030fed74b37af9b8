#include "loss_account.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>

namespace comoe {
namespace {

// Per pass. A loss of twice the limit takes a third off the price of time in 8 passes; slower steps
// spend more before they bite, quicker ones follow single tokens, whose losses differ by several
// times.
constexpr double kStep = 0.05;
constexpr double kMostOverspent = 4;  // limits that one pass counts as at most
constexpr double kLeastCaution = 1e-3;
constexpr double kFade = 0.985;  // per pass: half of it in 46

}  // namespace

LossAccount::LossAccount(std::vector<int64_t> first, int levels)
    : first_(std::move(first)), levels_(levels) {}

void LossAccount::set_losses(std::vector<double> per_square, std::vector<double> nothing) {
  const auto experts = static_cast<size_t>(first_.back());
  if (per_square.size() != experts * levels_ || nothing.size() != experts)
    throw std::invalid_argument("LossAccount.set_losses: expected [X, L] and [X]");
  per_square_ = std::move(per_square);
  nothing_ = std::move(nothing);
}

void LossAccount::set_limit(double limit, double most) {
  if (!(limit >= 0) || !(most > 0))
    throw std::invalid_argument("LossAccount.set_limit: expected a limit >= 0 and most > 0");
  limit_ = limit;
  most_ = most;
  log_caution_ = 0;
  caution_ = 1;
}

void LossAccount::note(int layer, const std::vector<double>& squares,
                       const std::vector<uint8_t>& used, int64_t tokens) {
  if (per_square_.empty() || tokens <= 0) return;
  if (layer <= last_) end_pass();
  last_ = layer;
  double nats = 0;
  for (size_t e = 0; e < squares.size(); ++e) {
    if (squares[e] <= 0) continue;
    const int64_t x = first_[layer] + static_cast<int64_t>(e);
    const double each = used[e] ? per_square_[x * levels_ + used[e] - 1] : nothing_[x];
    if (std::isfinite(each)) nats += each * squares[e];
  }
  pass_ += nats / static_cast<double>(tokens);
}

void LossAccount::end_pass() {
  taken_ = taken_ * kFade + pass_;
  weight_ = weight_ * kFade + 1;
  ++passes_;
  if (limit_ > 0) {
    const double over = std::min(pass_ / limit_, kMostOverspent) - 1;
    log_caution_ =
        std::clamp(log_caution_ - kStep * over, std::log(kLeastCaution), std::log(most_));
    caution_ = std::exp(log_caution_);
  }
  pass_ = 0;
}

}  // namespace comoe
