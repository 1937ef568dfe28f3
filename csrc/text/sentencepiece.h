// Byte-pair encoding of a SentencePiece vocabulary: pieces with scores instead of a list of merges.
//
// Two neighbours may merge when both are pieces and so is their joined text; the best score merges first, then the
// smaller id, then the longest left part, then the leftmost place. That is the order of the merges that the
// `tokenizers` library is given for such a vocabulary, without writing half a million of them down.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace setpoint {

constexpr int32_t kNoToken = -1;

// Texts numbered from 0, and the way back.
class TextTable {
 public:
  // Throws std::invalid_argument when a text occurs twice or finds no place near its own: the texts are a stranger's.
  explicit TextTable(std::vector<std::string_view> texts);

  size_t size() const { return texts_.size(); }
  std::string_view text(size_t id) const { return texts_[id]; }
  int32_t find(std::string_view text) const;
  size_t longest() const { return longest_; }  // bytes

 private:
  std::string storage_;
  std::vector<std::string_view> texts_;
  std::vector<int32_t> slots_;  // open addressing
  uint64_t seed_;
  size_t longest_ = 0;
};

struct SentencePieceOptions {
  int32_t unknown = kNoToken;  // one token stands for a whole run of characters that have none
  bool space_prefix = false;   // a space goes before every run of plain text
};

class SentencePiece {
 public:
  // `scores` and `mergeable` have one entry per text; `added` tokens are found verbatim in a text before anything else,
  // the longest first. Bytes of characters without a token become the tokens <0x00> to <0xFF> where there are such.
  SentencePiece(std::vector<std::string_view> texts, std::span<const float> scores, std::span<const uint8_t> mergeable,
                std::span<const int32_t> added, SentencePieceOptions options);

  const TextTable& table() const { return table_; }
  // `text` must be UTF-8.
  std::vector<int32_t> encode(std::string_view text) const;

 private:
  struct Node {  // of the added tokens' trie: children are a linked list
    uint8_t byte = 0;
    int32_t token = kNoToken;
    int32_t child = -1, sibling = -1;
  };
  struct Symbol;

  void add_to_trie(std::string_view text, int32_t token);
  std::pair<int32_t, size_t> longest_added(std::string_view text) const;
  void encode_plain(std::string_view text, std::vector<int32_t>& out) const;
  std::vector<Symbol> characters(std::string_view text) const;
  int32_t merged(std::string_view text) const;

  TextTable table_;
  std::vector<uint32_t> rank_;  // of a piece among all by score; kNotMergeable
  std::vector<Node> trie_;
  int32_t byte_tokens_[256];
  SentencePieceOptions options_;
};

}  // namespace setpoint
