// Attention and kv_store over paged caches: each thread has sequences of its own, so that nothing but the kernel counts.
// decode: one row a sequence; prefill: a tile of rows at the end of the context. All layers attend to everything.
#include "bench/models.h"
#include "bench/random.h"
#include "bench/workload.h"
#include "core/memory.h"
#include "kernels/attention.h"
#include "kernels/kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

namespace setpoint::bench {
namespace {

constexpr int kContexts[] = {256, 1024, 4096, 8192};
// Whose pages: the same again and again; ever other ones; ever other ones at random places, as after hours of serving.
enum class Pages { warm, cold, scattered };

struct Shape {
  const ModelShape* model;
  KvFormat format;
  int context, rows;
};

// One layer's cache with the block tables of many sequences of `context` tokens, all filled.
class CachedSequences {
 public:
  CachedSequences(const Shape& shape, int sequences, bool scattered) : shape_(shape), pages_(shape.context / kPageTokens) {
    const ModelShape& m = *shape.model;
    const size_t blocks = size_t(sequences) * size_t(pages_);
    const size_t bytes = blocks * size_t(m.kv_heads) * kv_page_bytes(shape.format, m.head_dim);
    k_ = MappedArray<uint8_t>(bytes);
    v_ = MappedArray<uint8_t>(bytes);
    tables_.resize(blocks);
    std::iota(tables_.begin(), tables_.end(), 0);
    Random random(5);
    for (size_t i = blocks; scattered && i > 1; --i) std::swap(tables_[i - 1], tables_[size_t(random.below(int(i)))]);
    fill(sequences);
  }

  KvView view() {
    const int heads = shape_.model->kv_heads, head_dim = shape_.model->head_dim;
    return {shape_.format, heads, head_dim, k_.data(), v_.data(), kv_span_bytes(shape_.format, heads, head_dim)};
  }
  const int32_t* table(size_t sequence) const { return tables_.data() + sequence * size_t(pages_) % tables_.size(); }

 private:
  void fill(int sequences) {
    const size_t width = size_t(shape_.model->kv_heads) * size_t(shape_.model->head_dim);
    std::vector<float> k(size_t(shape_.context) * width), v(k.size());
    Random random(6);
    random.fill_activations(k.data(), k.size());
    random.fill_activations(v.data(), v.size());
    for (int sequence = 0; sequence < sequences; ++sequence) {
      KvStoreArgs args;
      args.kv = view();
      args.block_table = table(size_t(sequence));
      args.rows = shape_.context;
      args.k = k.data();
      args.v = v.data();
      args.k_stride = args.v_stride = width;
      kernel_table("auto").kv_store(args);
    }
  }

  Shape shape_;
  int pages_;
  MappedArray<uint8_t> k_, v_;
  std::vector<int32_t> tables_;
};

class AttentionWorkload : public Workload {
 public:
  AttentionWorkload(const Shape& shape, Pages pages, const char* isa, size_t cold_bytes, int threads)
      : shape_(shape),
        kernels_(kernel_table(isa)),
        threads_(threads),
        cold_(pages != Pages::warm),
        width_(size_t(shape.model->heads) * size_t(shape.model->head_dim)),
        sequences_(threads * (cold_ ? int(std::max<size_t>(1, cold_bytes / size_t(threads) / size_t(kv_bytes()) + 1)) : 1)),
        caches_(shape, sequences_, pages == Pages::scattered),
        q_(size_t(shape.rows) * width_) {
    Random random(8);
    random.fill_activations(q_.data(), q_.size());
    for (int thread = 0; thread < threads; ++thread) {
      out_.emplace_back(q_.size());
      scratch_.emplace_back(attention_scratch_floats(shape.rows, shape.model->heads, shape.model->head_dim));
    }
  }

  Work work() const override {
    const ModelShape& m = *shape_.model;
    const double seen = shape_.context - (shape_.rows - 1) / 2.;  // tokens, by a row
    return {4. * m.heads * m.head_dim * seen * shape_.rows * threads_, threads_ * (kv_bytes() + 8. * double(q_.size())),
            shape_.format == KvFormat::s16 ? Peak::int16 : Peak::fp32, cold_ ? 0 : size_t(kv_bytes())};
  }
  void prepare(int repetitions, int) override {
    first_ += prepared_;
    prepared_ = size_t(repetitions);
  }
  void run(int index, int thread) override {
    const size_t sequence = cold_ ? (first_ + size_t(index)) * size_t(threads_) + size_t(thread) : size_t(thread);
    kernels_.attention(arguments(sequence % size_t(sequences_), out_[size_t(thread)].data(), scratch_[size_t(thread)].data()));
  }
  // Every sequence holds the same keys and values, so every thread must have the same result.
  bool matches_reference() override {
    std::vector<float> expected(q_.size()), scratch(scratch_[0].size());
    kernel_table("ref").attention(arguments(0, expected.data(), scratch.data()));
    return std::all_of(out_.begin(), out_.end(), [&](const std::vector<float>& out) {
      return std::memcmp(out.data(), expected.data(), out.size() * sizeof(float)) == 0;
    });
  }

 private:
  double kv_bytes() const {
    return 2. * shape_.context / kPageTokens * shape_.model->kv_heads * double(kv_page_bytes(shape_.format, shape_.model->head_dim));
  }
  AttentionArgs arguments(size_t sequence, float* out, float* scratch) {
    AttentionArgs args;
    args.kv = caches_.view();
    args.block_table = caches_.table(sequence);
    args.position = shape_.context - shape_.rows;
    args.rows = shape_.rows;
    args.kv_head_end = shape_.model->kv_heads;
    args.group = shape_.model->heads / shape_.model->kv_heads;
    args.scale = 1.f / std::sqrt(float(shape_.model->head_dim));
    args.q = q_.data();
    args.out = out;
    args.q_stride = args.out_stride = width_;
    args.split_end = (shape_.context + kSplitTokens - 1) / kSplitTokens;
    args.scratch = scratch;
    return args;
  }

  Shape shape_;
  const KernelTable& kernels_;
  int threads_;
  bool cold_;
  size_t width_;
  int sequences_;
  CachedSequences caches_;
  std::vector<float> q_;
  std::vector<std::vector<float>> out_, scratch_;  // per thread
  size_t first_ = 0, prepared_ = 0;
};

// Storing one row (decode) or a chunk of rows (prefill) of each thread's sequence.
class KvStoreWorkload : public Workload {
 public:
  KvStoreWorkload(const ModelShape& model, KvFormat format, int rows, const char* isa, int threads)
      : model_(model),
        format_(format),
        kernels_(kernel_table(isa)),
        rows_(rows),
        pages_((rows + kPageTokens - 1) / kPageTokens + 1),
        width_(size_t(model.kv_heads) * size_t(model.head_dim)),
        threads_(threads),
        k_(size_t(rows) * width_),
        v_(k_.size()),
        table_(size_t(pages_ * threads)) {
    Random random(9);
    random.fill_activations(k_.data(), k_.size());
    random.fill_activations(v_.data(), v_.size());
    std::iota(table_.begin(), table_.end(), 0);
    cache_k_ = cache_v_ = std::vector<uint8_t>(table_.size() * size_t(model.kv_heads) * kv_page_bytes(format, model.head_dim));
  }
  Work work() const override {
    const double stored = 2. * rows_ * model_.kv_heads * double(kv_page_bytes(format_, model_.head_dim)) / kPageTokens;
    const double bytes = 2. * 4 * double(k_.size()) + stored;
    return {0, bytes * threads_, Peak::fp32, size_t(bytes)};
  }
  void prepare(int, int) override {}
  void run(int, int thread) override { store(kernels_, thread, cache_k_, cache_v_); }
  bool matches_reference() override {
    std::vector<uint8_t> k(cache_k_.size()), v(cache_v_.size());
    for (int thread = 0; thread < threads_; ++thread) store(kernel_table("ref"), thread, k, v);
    return k == cache_k_ && v == cache_v_;
  }

 private:
  void store(const KernelTable& kernels, int thread, std::vector<uint8_t>& k, std::vector<uint8_t>& v) {
    KvStoreArgs args;
    const size_t span_bytes = kv_span_bytes(format_, model_.kv_heads, model_.head_dim);
    args.kv = {format_, model_.kv_heads, model_.head_dim, k.data(), v.data(), span_bytes};
    args.block_table = table_.data() + thread * pages_;
    args.position = 3;  // not at the begin of a page
    args.rows = rows_;
    args.k = k_.data();
    args.v = v_.data();
    args.k_stride = args.v_stride = width_;
    kernels.kv_store(args);
  }

  const ModelShape& model_;
  KvFormat format_;
  const KernelTable& kernels_;
  int rows_, pages_;
  size_t width_;
  int threads_;
  std::vector<float> k_, v_;
  std::vector<int32_t> table_;
  std::vector<uint8_t> cache_k_, cache_v_;
};

constexpr std::pair<const char*, KvFormat> kFormats[] = {
    {"s16", KvFormat::s16}, {"f16", KvFormat::f16}, {"bf16", KvFormat::bf16}, {"f32", KvFormat::f32}};
constexpr std::pair<const char*, Pages> kPages[] = {{"cold", Pages::cold}, {"scattered", Pages::scattered}, {"warm", Pages::warm}};

bool is_standard(const Shape& shape, Pages pages) {
  if ((shape.format != KvFormat::s16 && shape.format != KvFormat::f16) || (shape.model->hidden != 576 && shape.context != 4096))
    return false;
  if (shape.rows > 1) return pages == Pages::warm && shape.context <= 4096 && shape.model->hidden != 896;
  return shape.model->hidden == 576 ? pages != Pages::scattered || shape.context == 8192 : pages == Pages::cold;
}

}  // namespace

void add_attention_cases(Cases& cases, size_t cold_bytes) {
  for (const auto& [name, format] : kFormats)
    for (const ModelShape& model : kModels)
      for (const char* const* isa = available_isas(); *isa != nullptr; ++isa) {
        const std::string middle = std::string("/") + name + "/" + model.name + "/";
        for (const auto& [phase, rows] : {std::pair{"decode", 1}, std::pair{"prefill", kAttentionTileRows}})
          for (int context : kContexts)
            for (const auto& [state, pages] : kPages) {
              const Shape shape{&model, format, context, rows};
              cases.push_back({"attention" + middle + phase + "/c" + std::to_string(context) + "/" + *isa + "/" + state,
                               is_best_isa(*isa) && is_standard(shape, pages),
                               [=, isa = *isa, pages = pages](int threads) -> std::unique_ptr<Workload> {
                                 return std::make_unique<AttentionWorkload>(shape, pages, isa, cold_bytes, threads);
                               }});
            }
        for (int rows : {1, 512})
          cases.push_back({"kv_store" + middle + "m" + std::to_string(rows) + "/" + *isa + "/warm",
                           is_best_isa(*isa) && (format == KvFormat::s16 || format == KvFormat::f16) && model.hidden == 576,
                           [&model, format = format, rows, isa = *isa](int threads) -> std::unique_ptr<Workload> {
                             return std::make_unique<KvStoreWorkload>(model, format, rows, isa, threads);
                           }});
      }
}

}  // namespace setpoint::bench
