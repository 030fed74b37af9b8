#include "pool.h"

#include <algorithm>
#include <stdexcept>

namespace comoe {
namespace {

// First run of `count` set bits among `size`; -1 if none, and then `longest` is the longest run.
int find_run(const std::vector<uint64_t>& bits, int size, int count, int& longest) {
  longest = 0;
  int at = 0;
  while (at < size) {
    const uint64_t ones = bits[at / 64] >> (at % 64);
    if (ones == 0) {
      at = (at / 64 + 1) * 64;
      continue;
    }
    at += __builtin_ctzll(ones);
    const int begin = at;
    while (at < size) {
      const int offset = at % 64;
      const uint64_t zeros = ~bits[at / 64] >> offset;  // bits shifted in count as ones of the mask
      const int run = zeros == 0 ? 64 - offset : std::min(__builtin_ctzll(zeros), 64 - offset);
      at += run;
      if (run < 64 - offset) break;
    }
    at = std::min(at, size);
    if (at - begin >= count) return begin;
    longest = std::max(longest, at - begin);
  }
  return -1;
}

}  // namespace

PagePool::PagePool(int pages_per_slab, int max_slabs)
    : pages_per_slab_(pages_per_slab), max_slabs_(max_slabs) {}

bool PagePool::is_free(int32_t page) const {
  if (!is_mapped(slab_of(page))) return false;
  const int i = page % pages_per_slab_;
  return slabs_[slab_of(page)].free[i / 64] >> (i % 64) & 1;
}

int PagePool::slab_to_map() const {
  for (int s = 0; s < num_slabs(); ++s)
    if (!slabs_[s].mapped) return s;
  return num_slabs() < max_slabs_ ? num_slabs() : -1;
}

void PagePool::map(int s) {
  if (s >= num_slabs()) slabs_.resize(s + 1);
  Slab& slab = slabs_[s];
  if (slab.mapped) throw std::logic_error("PagePool::map: slab is mapped already");
  slab.mapped = true;
  slab.num_free = slab.longest_run = pages_per_slab_;
  slab.free.assign((pages_per_slab_ + 63) / 64, ~uint64_t{0});
  if (pages_per_slab_ % 64) slab.free.back() = (uint64_t{1} << (pages_per_slab_ % 64)) - 1;
  ++mapped_slabs_;
  free_pages_ += pages_per_slab_;
}

void PagePool::unmap(int s) {
  if (!is_mapped(s)) throw std::logic_error("PagePool::unmap: slab is not mapped");
  Slab& slab = slabs_[s];
  if (slab.num_free != pages_per_slab_)
    throw std::logic_error("PagePool::unmap: slab has used pages");
  set_draining(s, false);
  slab.mapped = false;
  slab.free = {};
  --mapped_slabs_;
  free_pages_ -= pages_per_slab_;
  while (!slabs_.empty() && !slabs_.back().mapped) slabs_.pop_back();
}

void PagePool::set_draining(int s, bool draining) {
  Slab& slab = slabs_[s];
  if (slab.draining == draining) return;
  slab.draining = draining;
  draining_slabs_ += draining ? 1 : -1;
  free_pages_ += draining ? -slab.num_free : slab.num_free;
}

void PagePool::take(int s, int first, int count, std::vector<int32_t>& pages) {
  Slab& slab = slabs_[s];
  for (int i = first; i < first + count; ++i) {
    slab.free[i / 64] &= ~(uint64_t{1} << (i % 64));
    pages.push_back(s * pages_per_slab_ + i);
  }
  slab.num_free -= count;
  free_pages_ -= count;
}

void PagePool::allocate(int64_t count, std::vector<int32_t>& pages) {
  if (count > free_pages_) throw std::logic_error("PagePool::allocate: fewer pages are free");
  for (int s = 0; s < num_slabs(); ++s) {
    Slab& slab = slabs_[s];
    if (!usable(slab) || std::min(slab.num_free, slab.longest_run) < count) continue;
    const int first =
        find_run(slab.free, pages_per_slab_, static_cast<int>(count), slab.longest_run);
    if (first < 0) continue;
    slab.longest_run = pages_per_slab_;  // not known any more
    take(s, first, static_cast<int>(count), pages);
    return;
  }
  for (int s = 0; count > 0; ++s) {
    if (!usable(slabs_[s])) continue;
    for (int i = 0; i < pages_per_slab_ && count > 0; ++i) {
      const uint64_t word = slabs_[s].free[i / 64] >> (i % 64);
      if (word == 0) {
        i = i / 64 * 64 + 63;
        continue;
      }
      i += __builtin_ctzll(word);
      take(s, i, 1, pages);
      --count;
    }
  }
}

void PagePool::free(int32_t page) {
  if (!is_mapped(slab_of(page)) || is_free(page))
    throw std::logic_error("PagePool::free: page is free already");
  Slab& slab = slabs_[slab_of(page)];
  const int i = page % pages_per_slab_;
  slab.free[i / 64] |= uint64_t{1} << (i % 64);
  ++slab.num_free;
  slab.longest_run = pages_per_slab_;
  if (!slab.draining) ++free_pages_;
}

}  // namespace comoe
