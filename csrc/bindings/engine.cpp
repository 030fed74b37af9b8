// The engine: every array is checked here, and the GIL is released in whatever can wait.
#include "../engine/engine.h"

#include <optional>
#include <string>
#include <vector>

#include "../storage/crc32c.h"
#include "../storage/raw_read.h"
#include "../storage/remote_reader.h"
#include "bindings.h"

namespace comoe {

static uint32_t crc32c_of(const py::buffer& buffer, uint32_t seed) {
  const py::buffer_info info = buffer.request();
  if (!PyBuffer_IsContiguous(info.view(), 'C'))
    throw std::invalid_argument(
        "crc32c: buffer: expected contiguous memory, got a strided view; copy it first");
  py::gil_scoped_release release;
  return crc32c(info.ptr, static_cast<size_t>(info.size * info.itemsize), seed);
}

// A one-dimensional, contiguous array of exactly T; scalars and lists are not guessed at.
template <class T>
static py::array_t<T> checked_array(const char* op, const char* argument, const py::object& object,
                                    py::ssize_t size = -1) {
  const std::string expected = std::string(op) + ": " + argument +
                               ": expected a contiguous 1-D numpy array of " +
                               std::string(py::str(py::dtype::of<T>())) +
                               (size < 0 ? "" : " with " + std::to_string(size) + " entries");
  if (!py::isinstance<py::array>(object))
    throw py::type_error(expected + ", got " + std::string(py::str(py::type::of(object))));
  const py::array array = py::reinterpret_borrow<py::array>(object);
  if (!array.dtype().is(py::dtype::of<T>()) && !array.dtype().equal(py::dtype::of<T>()))
    throw py::type_error(expected + ", got " + std::string(py::str(array.dtype())));
  if (array.ndim() != 1 || !(array.flags() & py::array::c_style) ||
      (size >= 0 && array.size() != size))
    throw std::invalid_argument(expected + ", got shape " +
                                std::string(py::str(array.attr("shape"))) +
                                (array.flags() & py::array::c_style ? "" : " (strided)"));
  return py::reinterpret_borrow<py::array_t<T>>(array);
}

static Priority checked_priority(const char* op, int priority) {
  if (priority < 0 || priority > 2)
    throw std::invalid_argument(
        std::string(op) + ": priority: expected 0 (demand), 1 (prefetch) or 2 (upgrade), got " +
        std::to_string(priority));
  return static_cast<Priority>(priority);
}

static std::unique_ptr<Session> open_session(Engine& engine, const py::object& experts,
                                             const py::object& min_levels,
                                             const py::object& want_levels) {
  const auto expert = checked_array<int32_t>("session", "experts", experts);
  const auto min = checked_array<uint8_t>("session", "min_levels", min_levels, expert.size());
  const auto want = checked_array<uint8_t>("session", "want_levels", want_levels, expert.size());
  std::vector<Need> needs(expert.size());
  for (size_t i = 0; i < needs.size(); ++i)
    needs[i] = {expert.data()[i], min.data()[i], want.data()[i]};
  py::gil_scoped_release release;
  return engine.open_session(needs.data(), static_cast<int64_t>(needs.size()));
}

static int32_t add_records(Engine& engine, const py::object& files, const py::object& offsets,
                           const py::object& nbytes, const py::object& crcs) {
  const auto file = checked_array<int32_t>("add_records", "file", files);
  const auto offset = checked_array<int64_t>("add_records", "offset", offsets, file.size());
  const auto bytes = checked_array<int64_t>("add_records", "nbytes", nbytes, file.size());
  const auto crc = checked_array<uint32_t>("add_records", "crc", crcs, file.size());
  std::vector<RecordInfo> infos(file.size());
  for (size_t i = 0; i < infos.size(); ++i)
    infos[i] = {file.data()[i], offset.data()[i], bytes.data()[i], crc.data()[i]};
  py::gil_scoped_release release;
  return engine.add_records(infos.data(), static_cast<int64_t>(infos.size()));
}

static int32_t add_experts(Engine& engine, const py::object& table) {
  const int per_expert = engine.records_per_expert();
  const auto ids = checked_array<int32_t>("add_experts", "records", table);
  if (ids.size() % per_expert != 0)
    throw std::invalid_argument(
        "add_experts: records: expected a multiple of " + std::to_string(per_expert) +
        " ids (all of each expert, see level_masks), got " + std::to_string(ids.size()));
  py::gil_scoped_release release;
  return engine.add_experts(ids.data(), ids.size() / per_expert);
}

static py::object remote_take(Engine& engine, double timeout, int64_t gap, int64_t most_bytes,
                              int most_others) {
  if (gap < 0 || most_bytes < 1 || most_others < 0)
    throw std::invalid_argument(
        "remote_take: expected gap >= 0, most_bytes >= 1 and most_others >= 0, got " +
        std::to_string(gap) + ", " + std::to_string(most_bytes) + ", " +
        std::to_string(most_others));
  std::vector<RemoteRequest> taken;
  bool stopped;
  {
    py::gil_scoped_release release;
    taken = engine.remote().take(timeout, gap, most_bytes, most_others);
    stopped = engine.remote().stopped();
  }
  if (stopped) return py::none();
  py::list list(taken.size());
  for (size_t i = 0; i < taken.size(); ++i) {
    const RemoteRequest& r = taken[i];
    list[i] = py::make_tuple(r.ticket, r.record, r.file, r.offset, r.bytes, r.demand);
  }
  return std::move(list);
}

static py::object remote_done(Engine& engine, int64_t ticket, const py::buffer& data) {
  const py::buffer_info info = data.request();
  if (!PyBuffer_IsContiguous(info.view(), 'C'))
    throw std::invalid_argument(
        "remote_done: data: expected contiguous memory, got a strided view; copy it first");
  Handed handed;
  {
    py::gil_scoped_release release;
    handed = engine.remote().done(ticket, static_cast<const uint8_t*>(info.ptr),
                                  info.size * info.itemsize);
  }
  return handed == Handed::closed ? py::object(py::none()) : py::bool_(handed == Handed::taken);
}

static py::dict stats_dict(const EngineStats& s) {
  py::dict d;
  d["hits"] = s.core.hits;
  d["partial_hits"] = s.core.partial_hits;
  d["joined"] = s.core.joined;
  d["misses"] = s.core.misses;
  d["waves"] = s.core.waves;
  d["reads"] = s.core.reads;
  d["bytes_read"] = s.core.bytes_read;
  d["demand_reads"] = s.core.demand_reads;
  d["demand_bytes"] = s.core.demand_bytes;
  d["prefetch_reads"] = s.core.prefetch_reads;
  d["prefetch_bytes"] = s.core.prefetch_bytes;
  d["upgrade_reads"] = s.core.upgrade_reads;
  d["upgrade_bytes"] = s.core.upgrade_bytes;
  d["prefetch_used_bytes"] = s.core.prefetch_used_bytes;
  d["prefetch_joined_bytes"] = s.core.prefetch_joined_bytes;
  d["wasted_prefetch_bytes"] = s.core.wasted_prefetch_bytes;
  d["coalesced"] = s.core.coalesced;
  d["cancelled"] = s.core.cancelled;
  d["dropped"] = s.core.dropped;
  d["failed_reads"] = s.core.failed_reads;
  d["corrupt_reads"] = s.core.corrupt_reads;
  d["failed_prefetches"] = s.core.failed_prefetches;
  d["evictions"] = s.core.evictions;
  d["evicted_bytes"] = s.core.evicted_bytes;
  d["relocated_pages"] = s.core.relocated_pages;
  d["bytes_from_disk"] = s.backend.bytes_from_disk;
  d["buffered_reads"] = s.backend.buffered_reads;
  d["retries"] = s.backend.retries;
  d["busy_seconds"] = s.backend.busy_seconds;
  d["io"] = s.backend.io;
  d["remote_bytes"] = s.backend.remote_bytes;
  d["remote_records"] = s.backend.remote_records;
  d["remote_refused"] = s.backend.remote_refused;
  d["cache_failures"] = s.backend.cache_failures;
  d["waits"] = s.waits;
  d["wait_seconds"] = s.wait_seconds;
  d["page_bytes"] = s.page_bytes;
  d["budget_bytes"] = s.budget_bytes;
  d["mapped_bytes"] = s.mapped_bytes;
  d["slabs"] = s.slabs;
  d["slabs_target"] = s.slabs_target;
  d["pages_used"] = s.pages_used;
  d["pages_free"] = s.pages_free;
  d["pages_reclaiming"] = s.pages_reclaiming;
  d["resident_bytes"] = s.resident_bytes;
  d["loading"] = s.loading;
  d["queued"] = s.queued;
  d["sessions"] = s.sessions;
  return d;
}

// Only reached while a thread that has given up Python's lock waits in the engine.
static void check_python_signals() {
  py::gil_scoped_acquire acquire;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

void bind_engine(py::module_& m) {
  m.def("crc32c", &crc32c_of, py::arg("buffer"), py::arg("seed") = 0,
        "CRC-32C of a contiguous buffer; seed: the checksum of what comes before it.");
  m.def("crc32c_isa", &crc32c_isa);
  m.def("raw_read_seconds", &raw_read_seconds, py::arg("path"), py::arg("begin"), py::arg("end"),
        py::arg("chunk_bytes") = 1 << 20, py::arg("depth") = 8,
        py::call_guard<py::gil_scoped_release>(),
        "Seconds that plain O_DIRECT reads of [begin, end) take: the measured ceiling of a disk.");

  py::register_exception<ReadError>(m, "ReadError", PyExc_OSError);
  py::register_exception<BudgetError>(m, "BudgetError", PyExc_ValueError);
  py::register_exception<EngineClosed>(m, "EngineClosed", PyExc_RuntimeError);
  Engine::set_interrupt_check(&check_python_signals);

  py::class_<Session>(m, "Session", "The needs of one MoE layer; see Engine.session.")
      .def(
          "next",
          [](Session& session) -> py::object {
            std::vector<Ready> ready;
            bool more;
            {
              py::gil_scoped_release release;
              more = session.next(ready);
            }
            if (!more) return py::none();
            py::list list(ready.size());
            for (size_t i = 0; i < ready.size(); ++i)
              list[i] = py::make_tuple(ready[i].need, static_cast<int>(ready[i].level));
            return std::move(list);
          },
          "Waits; all needs that are ready now as (index, level), or None when all were handed "
          "out. An empty list: "
          "nothing can come before done() is called for something that is held.")
      .def("done", &Session::done, py::arg("need"), py::call_guard<py::gil_scoped_release>(),
           "Unpins a need that next() has handed out.")
      .def("close", &Session::close, py::call_guard<py::gil_scoped_release>(),
           "Releases everything it still holds; the same happens when it is deleted.");

  py::class_<Engine>(
      m, "Engine",
      "Keeps records of the store resident in a paged pool under a budget (docs/engine.md).")
      .def(py::init([](int64_t page_bytes, int64_t slab_bytes, int64_t budget_bytes,
                       std::vector<uint32_t> level_masks, int io_threads, bool direct, bool verify,
                       std::string io, int uring_depth) {
             EngineConfig config;
             config.page_bytes = page_bytes;
             config.slab_bytes = slab_bytes;
             config.budget_bytes = budget_bytes;
             config.level_masks = std::move(level_masks);
             config.io_threads = io_threads;
             config.direct_io = direct;
             config.verify = verify;
             config.io = std::move(io);
             config.uring_depth = uring_depth;
             return std::make_unique<Engine>(config);
           }),
           py::arg("page_bytes"), py::arg("slab_bytes"), py::arg("budget_bytes"), py::kw_only(),
           py::arg("level_masks"), py::arg("io_threads") = 4, py::arg("direct") = true,
           py::arg("verify") = true, py::arg("io") = "auto", py::arg("uring_depth") = 16)
      .def("add_file", &Engine::add_file, py::arg("path"), py::call_guard<py::gil_scoped_release>())
      .def("add_remote_file", &Engine::add_remote_file, py::arg("path"),
           py::call_guard<py::gil_scoped_release>(),
           "A local copy of a remote file: of its size, perhaps full of holes. Its records come "
           "through remote_take and remote_done, but for those that set_local names.")
      .def("remote_take", &remote_take, py::arg("timeout"), py::arg("gap") = 0,
           py::arg("most_bytes") = 1, py::arg("most_others") = 1,
           "Waits, at most `timeout` seconds, for records of remote files to fetch: the most "
           "urgent, and those of its class that lie at most `gap` bytes from what is chosen "
           "already, `most_bytes` from the first to the last. Prefetches and upgrades only while "
           "fewer than `most_others` takes of them are open. A list, by offset, of (ticket, "
           "record, file, offset, nbytes, demand); None once the engine is closed.")
      .def("remote_done", &remote_done, py::arg("ticket"), py::arg("data"),
           "Hands a record's payload in: True. False if its checksum is wrong: then the ticket "
           "stays "
           "open, for the same bytes from elsewhere. None if the ticket was closed already.")
      .def(
          "remote_failed",
          [](Engine& engine, int64_t ticket, const std::string& message) {
            py::gil_scoped_release release;
            engine.remote().failed(ticket, message);
          },
          py::arg("ticket"), py::arg("message"), "The record fails as a read from disk does.")
      .def(
          "remote_expire",
          [](Engine& engine, const py::object& ids, const std::string& message) {
            if (ids.is_none()) {
              py::gil_scoped_release release;
              return engine.remote().expire(nullptr, 0, message);
            }
            const auto array = checked_array<int32_t>("remote_expire", "ids", ids);
            py::gil_scoped_release release;
            return engine.remote().expire(array.data(), array.size(), message);
          },
          py::arg("ids"), py::arg("message"),
          "Fails those of these records that are demanded and not here, None: all; returns how "
          "many.")
      .def(
          "remote_open",
          [](Engine& engine, int64_t ticket) { return engine.remote().is_open(ticket); },
          py::arg("ticket"), "Whether the record is still waited for.")
      .def(
          "remote_demanded",
          [](Engine& engine, int64_t ticket) { return engine.remote().is_demanded(ticket); },
          py::arg("ticket"), "Whether it is demanded by now.")
      .def(
          "remote_has_demand", [](Engine& engine) { return engine.remote().has_demand(); },
          "Whether demand waits to be taken.")
      .def(
          "set_local",
          [](Engine& engine, const py::object& ids, bool local) {
            const auto array = checked_array<int32_t>("set_local", "ids", ids);
            py::gil_scoped_release release;
            engine.set_local(array.data(), array.size(), local);
          },
          py::arg("ids"), py::arg("local"),
          "Whether these records' bytes are in the local copies of their files. One that turns "
          "out to be damaged there is fetched after all.")
      .def("add_records", &add_records, py::arg("file"), py::arg("offset"), py::arg("nbytes"),
           py::arg("crc"), "Returns the first id.")
      .def("add_experts", &add_experts, py::arg("records"),
           "Ids of the records of each expert in turn, -1 where it has none; several may have the "
           "same. Returns the first expert.")
      .def_property_readonly("records_per_expert", &Engine::records_per_expert)
      .def("session", &open_session, py::arg("experts"), py::arg("min_levels"),
           py::arg("want_levels"))
      .def(
          "request",
          [](Engine& engine, const py::object& ids, int priority, int32_t distance) {
            const auto array = checked_array<int32_t>("request", "ids", ids);
            const auto checked = checked_priority("request", priority);
            py::gil_scoped_release release;
            engine.request(array.data(), array.size(), checked, distance);
          },
          py::arg("ids"), py::arg("priority"), py::arg("distance") = 0)
      .def(
          "cancel",
          [](Engine& engine, int priority, const py::object& ids) {
            const auto checked = checked_priority("cancel", priority);
            if (ids.is_none()) {
              py::gil_scoped_release release;
              engine.cancel_all(checked);
              return;
            }
            const auto array = checked_array<int32_t>("cancel", "ids", ids);
            py::gil_scoped_release release;
            engine.cancel(checked, array.data(), array.size());
          },
          py::arg("priority"), py::arg("ids") = py::none())
      .def(
          "evict",
          [](Engine& engine, const py::object& ids) {
            const auto array = checked_array<int32_t>("evict", "ids", ids);
            py::gil_scoped_release release;
            return engine.evict(array.data(), array.size());
          },
          py::arg("ids"), "Bytes freed; what is in use or pinned stays.")
      .def(
          "pin",
          [](Engine& engine, const py::object& ids, bool pinned) {
            const auto array = checked_array<int32_t>("pin", "ids", ids);
            py::gil_scoped_release release;
            engine.pin(array.data(), array.size(), pinned);
          },
          py::arg("ids"), py::arg("pinned"))
      .def(
          "set_value",
          [](Engine& engine, const py::object& ids, const py::object& values) {
            const auto array = checked_array<int32_t>("set_value", "ids", ids);
            const auto value = checked_array<float>("set_value", "values", values, array.size());
            py::gil_scoped_release release;
            engine.set_value(array.data(), value.data(), array.size());
          },
          py::arg("ids"), py::arg("values"))
      .def("set_budget", &Engine::set_budget, py::arg("bytes"), py::arg("timeout") = 10.0,
           py::call_guard<py::gil_scoped_release>(),
           "Returns when the memory is back with the system; raises with the reason if it is not "
           "in time.")
      .def("forget_largest_need", &Engine::forget_largest_need,
           py::call_guard<py::gil_scoped_release>(),
           "Says that lower levels are asked for from now on, which need less room.")
      .def(
          "minimum_budget",
          [](const Engine& engine, std::optional<int> level) {
            if (level && *level < 0)
              throw std::invalid_argument("minimum_budget: level: expected >= 0");
            return engine.minimum_budget(level.value_or(-1));
          },
          py::arg("level") = py::none(),
          "Least budget for the largest need so far; with a level, for any expert at any level up "
          "to it.")
      .def(
          "resident",
          [](const Engine& engine) {
            const std::vector<uint8_t> states = engine.resident();
            return py::array_t<uint8_t>(static_cast<py::ssize_t>(states.size()), states.data());
          },
          "uint8 [num_records]: 0 absent, 1 loading, 2 resident.")
      .def(
          "read_pages",
          [](const Engine& engine, int32_t record, int64_t bytes) {
            // Copies a pinned record's first bytes out: for tests and tools.
            py::array_t<uint8_t> out(std::max<int64_t>(bytes, 0));
            engine.copy_out(record, bytes, out.mutable_data());
            return out;
          },
          py::arg("record"), py::arg("nbytes"))
      .def("stats", [](const Engine& engine) { return stats_dict(engine.stats()); })
      .def("wait_idle", &Engine::wait_idle, py::arg("timeout"),
           py::call_guard<py::gil_scoped_release>(), "True when no read is running.")
      .def("close", &Engine::close, py::call_guard<py::gil_scoped_release>());
}

}  // namespace comoe
