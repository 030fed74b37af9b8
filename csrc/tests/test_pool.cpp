// Pages and slabs: random allocations against a plain model, contiguous runs, draining.
#include <algorithm>
#include <random>
#include <set>

#include "../engine/pool.h"
#include "check.h"

using namespace comoe;

namespace {

bool is_run(const std::vector<int32_t>& pages) {
  for (size_t i = 1; i < pages.size(); ++i)
    if (pages[i] != pages[i - 1] + 1) return false;
  return true;
}

void test_runs() {
  for (int pages_per_slab : {1, 3, 63, 64, 65, 128, 200}) {
    PagePool pool(pages_per_slab, 3);
    CHECK(pool.free_pages() == 0 && pool.slab_to_map() == 0);
    pool.map(0);
    pool.map(1);
    CHECK(pool.free_pages() == 2 * pages_per_slab);
    std::vector<int32_t> whole;
    pool.allocate(pages_per_slab, whole);
    CHECK(is_run(whole) && whole.front() == 0);
    CHECK(pool.used_pages(0) == pages_per_slab);
    // Free every second page, then ask for a run: only the other slab has one.
    for (int32_t page = 0; page < pages_per_slab; page += 2) pool.free(page);
    if (pages_per_slab >= 3) {
      std::vector<int32_t> run;
      pool.allocate(2, run);
      CHECK(is_run(run) && pool.slab_of(run[0]) == 1);
      // More than any run: taken in pieces, in ascending order, from both slabs.
      std::vector<int32_t> rest;
      pool.allocate(pool.free_pages(), rest);
      CHECK(static_cast<int>(rest.size()) == (pages_per_slab + 1) / 2 + pages_per_slab - 2);
      CHECK(std::is_sorted(rest.begin(), rest.end()));
    }
  }
}

void test_run_across_words() {
  PagePool pool(200, 1);
  pool.map(0);
  std::vector<int32_t> all;
  pool.allocate(200, all);
  for (int32_t page = 60; page < 140; ++page) pool.free(page);  // over two borders of words
  pool.free(0);
  std::vector<int32_t> run;
  pool.allocate(80, run);
  CHECK(is_run(run) && run.front() == 60);
}

void test_draining() {
  PagePool pool(4, 2);
  pool.map(0);
  pool.map(1);
  std::vector<int32_t> pages;
  pool.allocate(3, pages);
  pool.set_draining(0, true);
  CHECK(pool.free_pages() == 4 && pool.draining_slabs() == 1);
  std::vector<int32_t> others;
  pool.allocate(4, others);
  for (int32_t page : others) CHECK(pool.slab_of(page) == 1);
  CHECK_THROWS(pool.unmap(0), std::logic_error, "used pages");
  for (int32_t page : pages) pool.free(page);
  CHECK(pool.free_pages() == 0);  // the free pages of a draining slab are not given out
  pool.unmap(0);
  CHECK(pool.mapped_slabs() == 1 && pool.draining_slabs() == 0 && pool.slab_to_map() == 0);
  CHECK_THROWS(pool.allocate(1, others), std::logic_error, "fewer pages");
  CHECK_THROWS(pool.free(0), std::logic_error, "free already");
  pool.free(4);
  CHECK_THROWS(pool.free(4), std::logic_error, "free already");
}

void test_against_model() {
  std::mt19937 random(1);
  for (int pages_per_slab : {5, 64, 97}) {
    const int slabs = 4;
    PagePool pool(pages_per_slab, slabs);
    std::set<int32_t> used;
    std::vector<bool> mapped(slabs, false), draining(slabs, false);
    for (int step = 0; step < 20000; ++step) {
      const int slab = static_cast<int>(random() % slabs);
      switch (random() % 8) {
        case 0:
          if (!mapped[slab]) pool.map(slab), mapped[slab] = true;
          break;
        case 1:
          if (mapped[slab] && pool.used_pages(slab) == 0)
            pool.unmap(slab), mapped[slab] = draining[slab] = false;
          break;
        case 2:
          if (mapped[slab])
            draining[slab] = !draining[slab], pool.set_draining(slab, draining[slab]);
          break;
        case 3:
        case 4: {
          if (pool.free_pages() == 0) break;
          const int64_t count = 1 + static_cast<int64_t>(random() % pool.free_pages());
          std::vector<int32_t> pages;
          pool.allocate(count, pages);
          CHECK(static_cast<int64_t>(pages.size()) == count);
          for (int32_t page : pages) {
            CHECK(mapped[pool.slab_of(page)] && !draining[pool.slab_of(page)]);
            CHECK(used.insert(page).second);
          }
          break;
        }
        default:
          for (int i = static_cast<int>(random() % 40); i > 0 && !used.empty(); --i) {
            auto it = used.lower_bound(static_cast<int32_t>(random() % (pages_per_slab * slabs)));
            if (it == used.end()) it = used.begin();
            pool.free(*it);
            used.erase(it);
          }
      }
      int64_t free_pages = 0;
      for (int s = 0; s < slabs; ++s) {
        const auto in_slab = std::distance(used.lower_bound(s * pages_per_slab),
                                           used.lower_bound((s + 1) * pages_per_slab));
        if (mapped[s]) CHECK(pool.used_pages(s) == in_slab);
        if (mapped[s] && !draining[s]) free_pages += pages_per_slab - in_slab;
      }
      CHECK(pool.free_pages() == free_pages);
      if (check_failures > 0) return;
    }
  }
}

}  // namespace

int main() {
  test_runs();
  test_run_across_words();
  test_draining();
  test_against_model();
  return check_failures != 0;
}
