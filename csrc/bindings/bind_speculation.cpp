// What lookups guess from: texts that know where their end occurred before.
#include "bindings/bindings.h"
#include "text/recurring_text.h"

#include <nanobind/nanobind.h>

#include <algorithm>
#include <stdexcept>

namespace nb = nanobind;
using namespace nb::literals;

namespace setpoint {
namespace {

int32_t token_at(const nb::list& token_ids, size_t index) {
  const long token = PyLong_AsLong(PyList_GET_ITEM(token_ids.ptr(), static_cast<Py_ssize_t>(index)));
  if (token < 0 || token > INT32_MAX) {
    PyErr_Clear();
    throw std::invalid_argument("token ids are 0 and up");
  }
  return static_cast<int32_t>(token);
}

template <class Read>
void for_each_token(const nb::list& token_ids, size_t begin, size_t end, Read read) {
  if (begin > end || end > token_ids.size()) throw std::out_of_range("no such tokens");
  for (size_t index = begin; index < end; ++index) read(token_at(token_ids, index));
}

nb::list copy(const RecurringText& text, size_t source, size_t count) {
  const auto tokens = text.automaton().text();
  nb::list copied;
  for (size_t index = source; index < std::min(tokens.size(), source + count); ++index) copied.append(tokens[index]);
  return copied;
}

}  // namespace

void bind_speculation(nb::module_& m) {
  nb::class_<RecurringText>(m, "RecurringText")
      .def(nb::init<>())
      .def("__len__", [](const RecurringText& text) { return text.automaton().text().size(); })
      .def_prop_ro("matched", &RecurringText::matched)
      .def_prop_ro("source", &RecurringText::source)
      .def("copy", &copy, "source"_a, "count"_a)
      .def(
          "extend",
          [](RecurringText& text, const nb::list& token_ids, size_t begin, size_t end) {
            for_each_token(token_ids, begin, end, [&](int32_t token) { text.append(token); });
          },
          "token_ids"_a, "begin"_a, "end"_a);
  nb::class_<Follower>(m, "TextFollower")
      .def(nb::init<>())
      .def_prop_ro("matched", &Follower::matched)
      .def(
          "source", [](Follower& follower, const RecurringText& text) { return follower.source(text.automaton()); }, "text"_a)
      .def(
          "read",
          [](Follower& follower, const RecurringText& text, const nb::list& token_ids, size_t begin, size_t end) {
            for_each_token(token_ids, begin, end, [&](int32_t token) { follower.read(text.automaton(), token); });
          },
          "text"_a, "token_ids"_a, "begin"_a, "end"_a);
}

}  // namespace setpoint
