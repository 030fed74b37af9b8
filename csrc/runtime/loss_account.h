// What computing loses, in the nats per token that calibration expects of what was really used, and
// how far that is from what the user allows.
#pragma once

#include <cstdint>
#include <vector>

namespace comoe {

class LossAccount {
 public:
  // first: [layers + 1], where each layer's experts begin among all X.
  LossAccount(std::vector<int64_t> first, int levels);

  // From now on. per_square: [X, L] nats of a use at each level per squared gate weight, not
  // finite: no such level.  nothing: [X], of a use that is left out.
  void set_losses(std::vector<double> per_square, std::vector<double> nothing);
  // Nats per token that may be lost, 0: as many as it takes; the price of time may be multiplied by
  // at most `most`. What was owed is forgotten.
  void set_limit(double limit, double most);

  // A layer computed: squares [E], sums over its tokens of squared gate weights; used [E], level +
  // 1, 0: left out.
  void note(int layer, const std::vector<double>& squares, const std::vector<uint8_t>& used,
            int64_t tokens);
  struct Figures {
    double taken = 0;    // nats per token, fading over some dozens of passes
    double caution = 1;  // what the price of time is to be multiplied by, so that on average no
                         // more is lost than allowed
    int64_t passes = 0;  // that were counted
  };
  Figures figures() const { return {weight_ > 0 ? taken_ / weight_ : 0, caution_, passes_}; }

 private:
  void end_pass();

  std::vector<int64_t> first_;
  int levels_;
  std::vector<double> per_square_, nothing_;
  double limit_ = 0, most_ = 1, log_caution_ = 0, caution_ = 1;
  double taken_ = 0, weight_ = 0;  // sums over passes, fading
  int64_t passes_ = 0;
  double pass_ = 0;  // of the pass that runs
  int last_ = -1;    // its last layer
};

}  // namespace comoe
