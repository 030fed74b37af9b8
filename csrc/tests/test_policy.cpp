// What is decided per layer, without an engine: the cache's values, the chances of guesses, misses.
// Against the references in Python: tests/test_native_policy.py.
#include <cmath>
#include <limits>
#include <vector>

#include "../runtime/cache_values.h"
#include "../runtime/least_cost.h"
#include "../runtime/next_use.h"
#include "../runtime/routing_profile.h"
#include "check.h"

using namespace comoe;

static void next_use_orders_experts() {
  NextUse policy({4, 4}, {});
  const int32_t used[] = {0, 1};
  for (int token = 0; token < 20; ++token) {
    policy.note(0, used, 2);
    policy.note(1, used, token % 2 ? 2 : 1);
  }
  CHECK(policy.value(0, 0) > policy.value(0, 2));
  CHECK(policy.value(1, 0) > policy.value(1, 1));
  CHECK(policy.value(1, 1) > policy.value(1, 2));
  CHECK(policy.value(0, 2) == policy.value(0, 3));
  // Layer 0 runs next, so what it will use is nearer than what layer 1 will.
  CHECK(policy.value(0, 0) > policy.value(1, 0));
  const int32_t guess[] = {3};
  const double sure[] = {1.0};
  policy.predicted(0, guess, sure, 1);
  CHECK(policy.value(0, 3) > policy.value(0, 0));
  policy.note(0, used, 2);
  CHECK(policy.value(0, 3) < policy.value(0, 0));
  for (int64_t e = 0; e < 4; ++e) CHECK(std::isfinite(policy.value(1, e)));
  const int32_t nobody = 4;
  CHECK_THROWS(policy.note(0, &nobody, 1), std::out_of_range, "");
  CHECK_THROWS(NextUse({}, {}).note(0, used, 1), std::out_of_range, "");
}

static void next_use_stays_exact_for_long() {
  NextUse policy({2}, {});
  const int32_t used = 0;
  for (int token = 0; token < (1 << 22) + 100; ++token) policy.note(0, &used, 1);
  // One tick is still seen: the origin has moved.
  const float before = policy.value(0, 0);
  policy.note(0, &used, 1);
  CHECK(policy.value(0, 0) == before - 1.0f);
}

static void chances_are_learnt() {
  RankChances chances;
  const std::vector<int32_t> guess{2, 0, 1};
  const std::vector<uint8_t> used{0, 0, 1};  // the first guess is always right, the others never
  CHECK(chances.of(1, 2, 3)[0] == 0.5);
  for (int i = 0; i < 400; ++i) chances.note(1, 2, guess, used);
  const std::vector<double>& known = chances.of(1, 2, 3);
  CHECK(known[0] > 0.99 && known[1] < 0.01 && known[2] < 0.01);
  CHECK(chances.of(1, 1, 1)[0] == 0.5);  // another distance
  chances.note(0, 1, {}, used);
}

static LeastCost rule(double price, double latency) {
  constexpr double kNone = std::numeric_limits<double>::infinity();
  // One expert with three levels, one without the second: 100, 200, 400 bytes at 1000 bytes/s.
  return LeastCost(3, {0.4, 0.1, 0.0, 0.4, kNone, 0.0}, {100, 200, 400, 100, 200, 400},
                   {0, 100, 300, 0, 0, 200, 0, 0, 0, 0, 100, 300, 0, 0, 200, 0, 0, 0}, price, 1000,
                   latency);
}

static std::vector<int> decide(const LeastCost& rule, std::vector<MissingExpert> experts) {
  rule.decide(experts);
  std::vector<int> levels;
  for (const MissingExpert& e : experts) levels.push_back(e.decided);
  return levels;
}

static void misses_cost_what_they_should() {
  const MissingExpert has_least{0, 1.0, 0, 2}, has_none{0, 1.0, -1, 2}, lacks_second{1, 1.0, 0, 2};
  CHECK(decide(rule(0, 0), {has_least}) == std::vector<int>{2});    // time is free
  CHECK(decide(rule(100, 0), {has_least}) == std::vector<int>{0});  // time is dear
  CHECK(decide(rule(2, 0), {has_least}) == std::vector<int>{1});    // 0.3 for 0.2, then 0.1 for 0.4
  CHECK(decide(rule(2, 0), {lacks_second}) == std::vector<int>{0});
  CHECK(decide(rule(100, 0), {has_none}) == std::vector<int>{0});  // nothing else to compute with
  // Alone not worth the latency, together they are.
  const LeastCost slow = rule(2, 0.15);
  CHECK(decide(slow, {has_least}) == std::vector<int>{0});
  CHECK(
      (decide(slow, {has_least, has_least, has_least, has_least}) == std::vector<int>{1, 1, 1, 1}));
  const MissingExpert finer{0, 1.0, 2, 1};  // here at a finer level than planned
  CHECK(decide(rule(2, 0), {finer}) == std::vector<int>{1});
  CHECK_THROWS(LeastCost(3, {1, 2}, {1, 2}, {}, 1, 1, 0), std::invalid_argument, "[X, L]");
  CHECK_THROWS(rule(-1, 0), std::invalid_argument, "price");
}

static void the_profile_fades() {
  RoutingProfile profile({0, 2, 5}, 0.5);
  const int64_t experts[] = {0, 9, 1, 1};
  const float weights[] = {0.5f, 0.5f, 1.0f, 2.0f};
  profile.note(0, experts, weights, 2, 2);
  CHECK(profile.seen[0] == 1 && profile.seen[1] == 2 && profile.tokens[0] == 2);
  CHECK(profile.squares[0] == 0.25 && profile.squares[1] == 5);
  profile.note(0, experts, weights, 1, 1);
  CHECK(profile.seen[0] == 1.5 && profile.seen[1] == 1 && profile.tokens[0] == 2);
  CHECK(profile.seen[2] == 0 && profile.tokens[1] == 0);
}

int main() {
  next_use_orders_experts();
  next_use_stays_exact_for_long();
  chances_are_learnt();
  misses_cost_what_they_should();
  the_profile_fades();
  return check_failures;
}
