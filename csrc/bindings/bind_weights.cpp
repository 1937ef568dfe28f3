// The store of a model's packed weights.
#include "bindings/bindings.h"
#include "bindings/weight.h"
#include "quant/weight_store.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <span>
#include <string>
#include <utility>
#include <vector>

namespace nb = nanobind;
using namespace nb::literals;

namespace setpoint {
namespace {

using RawArray = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Sources = std::vector<std::pair<std::string, RawArray>>;
using Image = nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>>;

Weight add(WeightStore& store, const Sources& sources, int64_t cols, bool as_float) {
  std::vector<RawRows> rows;
  for (const auto& [format, raw] : sources) rows.push_back({&block_format(format), raw.data(), raw.size(), int64_t(raw.shape(0))});
  return Weight{store.add(std::move(rows), cols, as_float)};
}

size_t room(const std::string& format, int64_t rows, int64_t cols, bool as_float) {
  const BlockFormat& block = block_format(format);
  const RawRows source{&block, nullptr, rows < 0 ? 0 : size_t(rows) * bytes_per_row(block, cols), rows};
  return WeightStore::room(std::span(&source, 1), cols, as_float);
}

Image image(nb::handle_t<WeightStore> self) {
  const std::span<const uint8_t> bytes = nb::cast<const WeightStore&>(self).image();
  return Image(bytes.data(), {bytes.size()}, self);
}

nb::bytes description(const WeightStore& store) {
  const std::string bytes = store.description();
  return nb::bytes(bytes.data(), bytes.size());
}

}  // namespace

void bind_weights(nb::module_& m) {
  m.def("packed_room", &room, "format"_a, "rows"_a, "cols"_a, "as_float"_a, "Bytes that a matrix takes in a WeightStore.");

  nb::class_<WeightStore>(m, "WeightStore", "All packed matrices of a model; see csrc/quant/weight_store.h.")
      .def(nb::init<size_t>(), "capacity"_a)
      .def("add", &add, "sources"_a, "cols"_a, "as_float"_a,
           "A Weight of the stacked (format, raw) pairs that is not packed yet. The arrays must live until it is. Raises ValueError.")
      .def("pack", &WeightStore::pack, "num_threads"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("checksums", &WeightStore::checksums, "num_threads"_a, nb::call_guard<nb::gil_scoped_release>(), "One per chunk of the image.")
      .def(
          "load",
          [](WeightStore& store, int file, uint64_t offset, const std::vector<uint64_t>& checksums, int num_threads) {
            return store.load(file, offset, checksums, num_threads);
          },
          "file"_a, "offset"_a, "checksums"_a, "num_threads"_a, nb::call_guard<nb::gil_scoped_release>(),
          "Takes the image from an open file; False when that is too short or damaged.")
      .def("move_to_huge_pages", &WeightStore::move_to_huge_pages, "slice"_a, nb::call_guard<nb::gil_scoped_release>(),
           "Moves one of `num_slices` parts of a mapped image into memory that is read faster, while others may read it.")
      .def_prop_ro("num_slices", &WeightStore::num_slices)
      .def_prop_ro("image", &image, "All bytes of the matrices; uint8, read-only.")
      .def_prop_ro("description", &description, "What an image depends on, besides the contents of its sources.")
      .def_prop_ro("num_chunks", &WeightStore::num_chunks)
      .def_ro_static("CHUNK_BYTES", &WeightStore::kChunkBytes);
}

}  // namespace setpoint
