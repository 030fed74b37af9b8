// Pages and slabs: which page is free and which slab is mapped. Bookkeeping only: memory itself is
// the backend's, who owns a page is the core's.
#pragma once

#include <cstdint>
#include <vector>

namespace comoe {

class PagePool {
 public:
  PagePool(int pages_per_slab, int max_slabs);

  int pages_per_slab() const { return pages_per_slab_; }
  // Slabs from here on are not mapped. Grows as needed: an address space may have a million slabs.
  int num_slabs() const { return static_cast<int>(slabs_.size()); }
  int max_slabs() const { return max_slabs_; }
  int slab_of(int32_t page) const { return page / pages_per_slab_; }
  int mapped_slabs() const { return mapped_slabs_; }  // draining ones included
  int draining_slabs() const { return draining_slabs_; }
  int64_t free_pages() const { return free_pages_; }  // of slabs that are mapped and not draining
  bool is_mapped(int slab) const { return slab < num_slabs() && slabs_[slab].mapped; }
  bool is_draining(int slab) const { return slab < num_slabs() && slabs_[slab].draining; }
  bool is_free(int32_t page) const;
  int used_pages(int slab) const { return pages_per_slab_ - slabs_[slab].num_free; }

  int slab_to_map() const;  // lowest unmapped slab, -1 if none
  void map(int slab);
  void unmap(int slab);                        // must have no used page
  void set_draining(int slab, bool draining);  // pages of a draining slab are not given out

  // `count` pages (<= free_pages()), appended to `pages` in ascending order: one contiguous run if
  // any slab has one, else single pages from the lowest slabs on. Low slabs fill first, so that
  // high ones run empty.
  void allocate(int64_t count, std::vector<int32_t>& pages);
  void free(int32_t page);

 private:
  struct Slab {
    bool mapped = false;
    bool draining = false;
    int num_free = 0;
    int longest_run = 0;         // upper bound of the longest free run
    std::vector<uint64_t> free;  // bit i: page i is free
  };

  bool usable(const Slab& slab) const { return slab.mapped && !slab.draining; }
  void take(int slab, int first, int count, std::vector<int32_t>& pages);

  int pages_per_slab_;
  int max_slabs_;
  int mapped_slabs_ = 0;
  int draining_slabs_ = 0;
  int64_t free_pages_ = 0;
  std::vector<Slab> slabs_;
};

}  // namespace comoe
