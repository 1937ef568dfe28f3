// The lowered program, built by runtime/cpu/lower.py and stepped by
// runtime/cpu/runner.py; the machine's features.
#include "bindings/bindings.h"
#include "bindings/weight.h"
#include "core/affinity.h"
#include "core/cpu_features.h"
#include "program/program.h"
#include "quant/weight_store.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cxxabi.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace nb = nanobind;
using namespace nb::literals;

namespace setpoint {
namespace {

template <class T>
using Vector = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using LogitsArray = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// Python ends a thread that asks for the GIL after the interpreter's end by
// unwinding it, which would abort the process in a destructor: such a thread
// waits here for the process to end. (A daemon thread may be in a step then.)
class ReleasedGil {
 public:
  ReleasedGil() : state_(PyEval_SaveThread()) {}
  ~ReleasedGil() {
    try {
      PyEval_RestoreThread(state_);
    } catch (const abi::__forced_unwind&) {
      for (;;) pause();
    }
  }
  ReleasedGil(const ReleasedGil&) = delete;
  ReleasedGil& operator=(const ReleasedGil&) = delete;

 private:
  PyThreadState* state_;
};

template <class T>
std::span<const T> span_of(const Vector<T>& v) {
  return {v.data(), v.size()};
}

template <class T>
std::vector<T> copy_of(const Vector<T>& v) {
  return {v.data(), v.data() + v.size()};
}

KvFormat kv_format(const std::string& name) {
  if (name == "f32") return KvFormat::f32;
  if (name == "f16") return KvFormat::f16;
  if (name == "bf16") return KvFormat::bf16;
  if (name == "s16") return KvFormat::s16;
  throw std::invalid_argument("unknown KV format '" + name + "'; one of f16, bf16, f32, s16");
}

Activation activation(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  throw std::invalid_argument("unknown activation '" + name + "'");
}

Program* make_program(const std::string& isa, int num_threads, const std::string& kv, int vocab, int max_tokens, int max_entries,
                      int max_rows, int max_model_len) {
  return new Program({isa, num_threads, kv_format(kv), {vocab, max_tokens, max_entries, max_rows, max_model_len}});
}

void embed(Program& program, const std::string& format, const Bytes& table, float scale, int out) {
  program.embed(block_format(format), table.data(), table.size(), scale, out);
}

void matmul(Program& program, const Weight& weight, int in, int out, const std::optional<Vector<float>>& bias, bool accumulate) {
  program.matmul(weight.matrix.weight(), in, out, bias ? copy_of(*bias) : std::vector<float>(), accumulate);
}

// Program::step or Program::check over numpy arrays; from the penalties on they are flat
// lists that the row records index.
template <void (Program::*Run)(const StepInputs&)>
void with_inputs(Program& program, const Vector<int32_t>& tokens, const Vector<int32_t>& entry_starts,
                 const Vector<int32_t>& entry_positions, const std::vector<Table>& tables, const Bytes& rows,
                 const Vector<int32_t>& penalty_ids, const Vector<int32_t>& penalty_counts, const Vector<int32_t>& bias_ids,
                 const Vector<float>& bias_values, const Vector<int32_t>& banned, const Vector<int32_t>& allowed,
                 const Vector<uint32_t>& masks, const std::optional<LogitsArray>& logits, Gate* masks_ready) {
  if (rows.size() > 0 && rows.shape(1) != sizeof(RowRecord)) throw std::invalid_argument("rows: records of another layout");
  if (reinterpret_cast<uintptr_t>(rows.data()) % alignof(RowRecord) != 0) throw std::invalid_argument("rows: misaligned");
  if (logits && (logits->shape(0) < rows.shape(0) || logits->shape(1) != static_cast<size_t>(program.limits().vocab)))
    throw std::invalid_argument("logits: must be [rows, vocab]");
  std::vector<BlockTables> views;
  for (const Table& table : tables) {
    if (table.shape(0) < entry_positions.size()) throw std::invalid_argument("block tables: one row per entry");
    views.push_back({table.data(), static_cast<int>(table.shape(1))});
  }
  StepInputs inputs;
  inputs.tokens = span_of(tokens);
  inputs.entry_starts = span_of(entry_starts);
  inputs.entry_positions = span_of(entry_positions);
  inputs.tables = views;
  inputs.rows = {reinterpret_cast<const RowRecord*>(rows.data()), rows.shape(0)};
  inputs.penalty_ids = span_of(penalty_ids);
  inputs.penalty_counts = span_of(penalty_counts);
  inputs.bias_ids = span_of(bias_ids);
  inputs.bias_values = span_of(bias_values);
  inputs.banned = span_of(banned);
  inputs.allowed = span_of(allowed);
  inputs.masks = span_of(masks);
  inputs.masks_ready = masks_ready;
  inputs.logits = logits ? logits->data() : nullptr;
  const ReleasedGil released;
  (program.*Run)(inputs);
}

nb::ndarray<nb::numpy, const uint8_t> outputs(nb::handle_t<Program> self) {
  const Program& program = nb::cast<const Program&>(self);
  const size_t rows = static_cast<size_t>(program.limits().max_rows);
  return nb::ndarray<nb::numpy, const uint8_t>(reinterpret_cast<const uint8_t*>(program.outputs()), {rows, sizeof(RowOutput)}, self);
}

nb::bytes read_kv(Program& program, int group, int block) {
  const size_t size = program.kv_block_bytes(group);
  PyObject* made = PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(size));
  if (made == nullptr) throw nb::python_error();
  nb::bytes record = nb::steal<nb::bytes>(made);
  uint8_t* out = reinterpret_cast<uint8_t*>(PyBytes_AS_STRING(made));
  const ReleasedGil released;
  program.read_kv(group, block, out, size);
  return record;
}

void write_kv(Program& program, int group, int block, const nb::bytes& record) {
  const uint8_t* in = reinterpret_cast<const uint8_t*>(record.c_str());
  const size_t size = record.size();
  const ReleasedGil released;
  program.write_kv(group, block, in, size);
}

nb::dict seconds(const Program& program) {
  static const char* const names[kStageKinds] = {"rows", "matmul", "attention", "head"};
  nb::dict result;
  for (int i = 0; i < kStageKinds; ++i) result[names[i]] = program.seconds()[static_cast<size_t>(i)];
  return result;
}

std::vector<std::string> features() {
  std::vector<std::string> names;
  if (cpu_features().avx2) names.emplace_back("avx2");
  if (cpu_features().avx512_vnni) names.emplace_back("avx512_vnni");
  if (cpu_features().avx512_bf16) names.emplace_back("avx512_bf16");
  return names;
}

// CPUs this process may run on: affinity masks and containers count, machine
// size does not.
int num_cpus() {
  if (const size_t allowed = allowed_cpus().size(); allowed > 0) return static_cast<int>(allowed);
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

// Runs a pool as a step does and counts what a thread saw of the others after
// each barrier; for tests. At round `failing_round` the last thread throws
// instead. Returns the number of rounds every thread saw complete.
int rehearse_thread_pool(ThreadPool& pool, int rounds, int failing_round) {
  const int threads = pool.size();
  std::vector<int> written(static_cast<size_t>(threads), -1), seen(static_cast<size_t>(threads), 0);
  const nb::gil_scoped_release release;
  pool.run([&](int thread) {
    for (int round = 0; round < rounds; ++round) {
      if (round == failing_round && thread == threads - 1) throw std::runtime_error("failed as asked");
      written[static_cast<size_t>(thread)] = round;
      pool.barrier();
      seen[static_cast<size_t>(thread)] += std::all_of(written.begin(), written.end(), [&](int w) { return w == round; });
      pool.barrier();
    }
  });
  return *std::min_element(seen.begin(), seen.end());
}

// The same for stages and the teams that run them: each stage must be run once by every number below the team's size,
// which may only grow. Returns the stages for which that is so, and the size of the last team. A team that is not
// complete takes a millisecond a stage, if it shall be slow.
std::pair<int, int> rehearse_stages(ThreadPool& pool, int stages, int failing_stage, bool slow) {
  std::vector<std::atomic<int>> runs(static_cast<size_t>(stages));
  std::vector<int> teams(static_cast<size_t>(stages), 0), seen(static_cast<size_t>(stages), 0);
  const nb::gil_scoped_release release;
  pool.run_stages(
      stages,
      [&](int stage, int thread) {
        const size_t i = static_cast<size_t>(stage);
        if (stage == failing_stage && thread == pool.team() - 1) throw std::runtime_error("failed as asked");
        runs[i].fetch_add(1 << 4 * thread);  // a digit a thread
        if (slow && thread == 0 && pool.team() < pool.size()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        pool.barrier();
        if (thread == 0) {
          teams[i] = pool.team();
          seen[i] = runs[i].load();
        }
      },
      [](int) { return false; });
  int complete = 0;
  for (size_t i = 0; i < teams.size(); ++i) {
    int expected = 0;
    for (int thread = 0; thread < teams[i]; ++thread) expected += 1 << 4 * thread;
    complete += seen[i] == expected && runs[i].load() == expected && (i == 0 || teams[i] >= teams[i - 1]);
  }
  return {complete, stages == 0 ? 0 : teams.back()};
}

// The sizes that a team would have after runs of one second that stalled as long as given.
std::vector<int> rehearse_team_size(int threads, const std::vector<double>& stalled) {
  TeamSize size(threads);
  std::vector<int> sizes;
  for (const double each : stalled) {
    size.note(1.0, each);
    sizes.push_back(size.size());
  }
  return sizes;
}

}  // namespace

void bind_program(nb::module_& m) {
  m.def("cpu_features", &features, "Names of the instruction sets this CPU and operating system can run.");
  m.def("num_cpus", &num_cpus, "CPUs that this process may run on.");
  m.attr("ROW_RECORD_BYTES") = sizeof(RowRecord);
  m.attr("ROW_OUTPUT_BYTES") = sizeof(RowOutput);
  m.attr("NUMERIC_VERSION") = kNumericVersion;

  m.def("rehearse_team_size", &rehearse_team_size, "threads"_a, "stalled"_a,
        "Sizes of a team after each of some runs of a second that stalled so many seconds; for tests.");
  nb::class_<ThreadPool>(m, "ThreadPool", "The threads of a program alone, for tests.")
      .def(nb::init<int>(), "num_threads"_a)
      .def("rehearse", &rehearse_thread_pool, "rounds"_a, "failing_round"_a = -1,
           "Number of rounds in which every thread saw all the others' writes "
           "after a barrier.")
      .def("rehearse_stages", &rehearse_stages, "stages"_a, "failing_stage"_a = -1, "slow"_a = false,
           "(stages that every member of the team ran once, size of the last team).")
      .def("set_patient", &ThreadPool::set_patient, "on"_a);

  nb::class_<Gate>(m, "Gate", "Shut until it is opened; a step waits at it for `patience_s` at most.")
      .def(nb::init<double>(), "patience_s"_a)
      .def("open", &Gate::open);

  nb::class_<Program>(m, "Program",
                      "A lowered model. Slots, KV groups, layers and rope "
                      "tables are numbered from 0.")
      .def(nb::new_(&make_program), "isa"_a, "num_threads"_a, "kv_format"_a, "vocab"_a, "max_tokens"_a, "max_entries"_a, "max_rows"_a,
           "max_model_len"_a)
      .def("slot", &Program::slot, "width"_a)
      .def("kv_group", &Program::kv_group, "num_blocks"_a, "window"_a)
      .def("kv_layer", &Program::kv_layer, "group"_a, "kv_heads"_a, "head_dim"_a)
      .def(
          "rope_table", [](Program& p, const Vector<float>& inv_freq, float factor) { return p.rope_table(copy_of(inv_freq), factor); },
          "inv_freq"_a, "factor"_a)
      .def("embed", &embed, nb::keep_alive<1, 3>(), "format"_a, "table"_a, "scale"_a, "out"_a)
      .def(
          "rms_norm",
          [](Program& p, int in, const Vector<float>& weight, float eps, int out) { p.rms_norm(in, copy_of(weight), eps, out); }, "in_"_a,
          "weight"_a, "eps"_a, "out"_a)
      .def(
          "head_norm", [](Program& p, int slot, const Vector<float>& weight, float eps) { p.head_norm(slot, copy_of(weight), eps); },
          "slot"_a, "weight"_a, "eps"_a)
      .def("rope", &Program::rope, "slot"_a, "head_dim"_a, "table"_a)
      .def("matmul", &matmul, nb::keep_alive<1, 2>(), "weight"_a, "in_"_a, "out"_a, "bias"_a = nb::none(), "accumulate"_a = false)
      .def("kv_store", &Program::kv_store, "layer"_a, "k"_a, "v"_a)
      .def("attention", &Program::attention, "layer"_a, "scale"_a, "q"_a, "out"_a)
      .def(
          "gated_multiply", [](Program& p, const std::string& act, int gate, int up) { p.gated_multiply(activation(act), gate, up); },
          "act"_a, "gate"_a, "up"_a)
      .def("add", &Program::add, "a"_a, "b"_a, "out"_a)
      .def("select_rows", &Program::select_rows, "in_"_a, "out"_a)
      .def(
          "head",
          [](Program& p, int in, const Vector<float>& norm, float eps, const Weight& weight) {
            p.head(in, copy_of(norm), eps, weight.matrix.weight());
          },
          nb::keep_alive<1, 5>(), "in_"_a, "norm"_a, "eps"_a, "weight"_a)
      .def(
          "shorten_head",
          [](Program& program, const Vector<int32_t>& tokens) {
            const std::span<const int32_t> ids = span_of(tokens);
            const ReleasedGil released;
            return program.shorten_head(ids);
          },
          "tokens"_a,
          "Learns from a run over `tokens`, one sequence from position 0 in blocks 0, 1, ... of every group, how to find a greedy row's "
          "token without reading the whole head. Returns the bytes it took, 0 where that would not help. Tokens stay the same.")
      .def(
          "put_shortlist",
          [](Program& program, WeightStore& store) {
            if (const size_t bytes = program.shortlist_bytes(); bytes > 0)
              program.put_shortlist(store.add_bytes(bytes, Shortlist::kVersion));
          },
          nb::keep_alive<1, 2>(), "store"_a, "Lets shorten_head keep what it learns in the store, if there will be anything.")
      .def("take_up_shortlist", &Program::take_up_shortlist,
           "Takes up what lies in the store from a run before instead of shorten_head; returns its bytes, 0 for none.")
      .def_prop_ro("shortlist_bytes", &Program::shortlist_bytes)
      .def("step", &with_inputs<&Program::step>, "tokens"_a, "entry_starts"_a, "entry_positions"_a, "tables"_a, "rows"_a, "penalty_ids"_a,
           "penalty_counts"_a, "bias_ids"_a, "bias_values"_a, "banned"_a, "allowed"_a, "masks"_a, "logits"_a.noconvert() = nb::none(),
           "masks_ready"_a = nb::none(),
           "Runs one step without the GIL. Raises ValueError on inputs out of "
           "bounds, before anything is computed. With a gate, `masks` are read when it is open; they may be out of "
           "bounds then, and RuntimeError says that it stayed shut.")
      .def("check", &with_inputs<&Program::check>, "tokens"_a, "entry_starts"_a, "entry_positions"_a, "tables"_a, "rows"_a, "penalty_ids"_a,
           "penalty_counts"_a, "bias_ids"_a, "bias_values"_a, "banned"_a, "allowed"_a, "masks"_a, "logits"_a.noconvert() = nb::none(),
           "masks_ready"_a = nb::none(), "Raises what step would raise, and computes nothing.")
      .def_prop_ro("outputs", &outputs,
                   "uint8 [max_rows, ROW_OUTPUT_BYTES]: records of the last "
                   "step's rows; rewritten by the next.")
      .def("set_patient", &Program::set_patient, "on"_a, "Whether a step waits for all its threads before it starts; for tests.")
      .def("set_profiling", &Program::set_profiling, "on"_a)
      .def_prop_ro("seconds", &seconds, "Seconds spent per kind of stage while profiling.")
      .def_prop_ro("head_retried_part", &Program::head_retried_part,
                   "Part of the head that greedy rows had to multiply in full, after screening it.")
      .def_prop_ro("isa", &Program::isa)
      .def_prop_ro("num_threads", &Program::num_threads)
      .def_prop_ro("last_team", &Program::last_team, "Threads that worked at the end of the last step.")
      .def_prop_ro("kv_bytes", &Program::kv_bytes)
      .def("commit_kv", &Program::commit_kv, nb::call_guard<nb::gil_scoped_release>(), "Readies the memory of the first blocks.")
      .def("kv_block_bytes", &Program::kv_block_bytes, "group"_a)
      .def("read_kv", &read_kv, "group"_a, "block"_a, "What a KV block holds, as bytes that write_kv takes back.")
      .def("write_kv", &write_kv, "group"_a, "block"_a, "record"_a)
      .def_prop_ro("slot_bytes", &Program::slot_bytes, "What a step works in, as far as that grows with the largest step.");
}

}  // namespace setpoint
