// Vocabularies: the string arrays of a GGUF file, and byte-pair encoding of SentencePiece pieces.
#include "bindings/bindings.h"
#include "text/sentencepiece.h"
#include "text/string_array.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <string_view>
#include <vector>

namespace nb = nanobind;
using namespace nb::literals;

namespace setpoint {
namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ids = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

std::string_view utf8(nb::handle text) {
  Py_ssize_t size;
  const char* data = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
  if (data == nullptr) throw nb::python_error();
  return {data, size_t(size)};
}

nb::tuple skip_strings(const Bytes& bytes, size_t position, int64_t count) {
  StringArrayReader reader({bytes.data(), bytes.size()}, position);
  std::string_view text;
  int64_t read = 0;
  while (read < count && reader.next(text)) ++read;
  return nb::make_tuple(read, reader.position());
}

nb::list read_strings(const Bytes& bytes, size_t position, int64_t count) {
  StringArrayReader reader({bytes.data(), bytes.size()}, position);
  nb::list strings;
  for (std::string_view text; count > 0 && reader.next(text); --count) {
    PyObject* string = PyUnicode_DecodeUTF8(text.data(), Py_ssize_t(text.size()), nullptr);
    if (string == nullptr) {
      PyErr_Clear();  // the caller sees a short list
      break;
    }
    strings.append(nb::steal(string));
  }
  return strings;
}

SentencePiece* make_sentencepiece(const nb::list& tokens, const Floats& scores, const Bytes& mergeable, const Ids& added,
                                  std::optional<int32_t> unknown, bool space_prefix) {
  std::vector<std::string_view> texts;  // of `tokens`, which stays alive until they are copied
  texts.reserve(tokens.size());
  for (const nb::handle token : tokens) texts.push_back(utf8(token));
  const nb::gil_scoped_release release;
  return new SentencePiece(std::move(texts), {scores.data(), scores.size()}, {mergeable.data(), mergeable.size()},
                           {added.data(), added.size()}, {unknown.value_or(kNoToken), space_prefix});
}

std::vector<int32_t> encode(const SentencePiece& pieces, const nb::str& text) {
  const std::string_view view = utf8(text);
  const nb::gil_scoped_release release;
  return pieces.encode(view);
}

std::optional<std::string_view> id_to_token(const SentencePiece& pieces, int64_t id) {
  if (id < 0 || size_t(id) >= pieces.table().size()) return std::nullopt;
  return pieces.table().text(size_t(id));
}

std::optional<int32_t> token_to_id(const SentencePiece& pieces, const nb::str& token) {
  const int32_t id = pieces.table().find(utf8(token));
  return id == kNoToken ? std::nullopt : std::optional(id);
}

}  // namespace

void bind_text(nb::module_& m) {
  m.def("skip_strings", &skip_strings, "bytes"_a, "position"_a, "count"_a,
        "(number of whole strings of a GGUF array of `count` at `position`, where the last of them ends).");
  m.def("read_strings", &read_strings, "bytes"_a, "position"_a, "count"_a,
        "The strings of such an array, up to the first that is not UTF-8 or not whole.");

  nb::class_<SentencePiece>(m, "SentencePiece", "Byte-pair encoding of pieces with scores; safe to use from several threads.")
      .def(nb::new_(&make_sentencepiece), "tokens"_a, "scores"_a, "mergeable"_a, "added"_a, "unknown"_a.none(), "space_prefix"_a,
           "One score and one flag (may it merge, and be merged into) per token; `added` are ids of tokens found verbatim. "
           "Raises ValueError.")
      .def_prop_ro(
          "longest", [](const SentencePiece& pieces) { return pieces.table().longest(); }, "Bytes of the longest token.")
      .def("encode", &encode, "text"_a)
      .def("id_to_token", &id_to_token, "token_id"_a)
      .def("token_to_id", &token_to_id, "token"_a);
}

}  // namespace setpoint
