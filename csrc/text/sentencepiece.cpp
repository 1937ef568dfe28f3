#include "text/sentencepiece.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <numeric>
#include <queue>
#include <random>
#include <stdexcept>
#include <utility>

namespace setpoint {
namespace {

constexpr uint32_t kNotMergeable = UINT32_MAX;
constexpr std::string_view kSpace = "\xE2\x96\x81";  // U+2581
constexpr size_t kMaxAddedBytes = 1024;              // bounds the work per character of a text
constexpr size_t kMaxProbes = 4096;

// Seeded, so that nobody can write a vocabulary whose texts all meet in one place.
uint64_t hash_of(std::string_view text, uint64_t seed) {
  constexpr uint64_t kFactor = 0x9E3779B97F4A7C15;
  uint64_t h = seed ^ text.size() * kFactor;
  auto mix = [&](uint64_t word) {
    h = (h ^ word) * kFactor;
    h ^= h >> 32;
  };
  const char* at = text.data();
  size_t left = text.size();
  for (; left >= 8; at += 8, left -= 8) {
    uint64_t word;
    std::memcpy(&word, at, 8);
    mix(word);
  }
  uint64_t word = 0;
  std::memcpy(&word, at, left);
  mix(word);
  return h * kFactor >> 20;
}

uint64_t random_seed() {
  std::random_device device;
  return uint64_t(device()) << 32 | device();
}

size_t character_bytes(char first) {
  const auto byte = uint8_t(first);
  return byte < 0xC0 ? 1 : byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4;
}

}  // namespace

TextTable::TextTable(std::vector<std::string_view> texts) : texts_(std::move(texts)), seed_(random_seed()) {
  size_t bytes = 0;
  for (const std::string_view text : texts_) bytes += text.size();
  storage_.reserve(bytes);
  slots_.assign(std::bit_ceil(texts_.size() * 2 + 2), kNoToken);
  const size_t mask = slots_.size() - 1;
  for (size_t id = 0; id < texts_.size(); ++id) {
    const size_t begin = storage_.size();
    storage_.append(texts_[id]);
    const std::string_view own(storage_.data() + begin, texts_[id].size());
    size_t slot = hash_of(own, seed_) & mask;
    for (size_t probes = 0; slots_[slot] != kNoToken; slot = (slot + 1) & mask) {
      if (texts_[size_t(slots_[slot])] == own) throw std::invalid_argument("the same token appears twice");
      if (++probes == kMaxProbes) throw std::invalid_argument("too many tokens with one hash");
    }
    slots_[slot] = int32_t(id);
    texts_[id] = own;
    longest_ = std::max(longest_, own.size());
  }
}

int32_t TextTable::find(std::string_view text) const {
  const size_t mask = slots_.size() - 1;
  for (size_t slot = hash_of(text, seed_) & mask; slots_[slot] != kNoToken; slot = (slot + 1) & mask)
    if (texts_[size_t(slots_[slot])] == text) return slots_[slot];
  return kNoToken;
}

SentencePiece::SentencePiece(std::vector<std::string_view> texts, std::span<const float> scores, std::span<const uint8_t> mergeable,
                             std::span<const int32_t> added, SentencePieceOptions options)
    : table_(std::move(texts)), rank_(table_.size(), kNotMergeable), options_(options) {
  const size_t size = table_.size();
  if (scores.size() != size || mergeable.size() != size) throw std::invalid_argument("scores and kinds must be one per token");
  if (size > size_t(INT32_MAX) || options.unknown < kNoToken || options.unknown >= int64_t(size))
    throw std::invalid_argument("the unknown token is outside the vocabulary");

  std::vector<uint32_t> order(size);
  std::iota(order.begin(), order.end(), 0u);
  auto better = [&](uint32_t a, uint32_t b) { return scores[a] > scores[b]; };
  if (!std::is_sorted(order.begin(), order.end(), better)) std::stable_sort(order.begin(), order.end(), better);
  for (size_t i = 0; i < size; ++i)
    if (mergeable[order[i]]) rank_[order[i]] = uint32_t(i);

  static constexpr char kHex[] = "0123456789ABCDEF";
  for (int byte = 0; byte < 256; ++byte) {
    const char name[] = {'<', '0', 'x', kHex[byte >> 4], kHex[byte & 15], '>'};
    byte_tokens_[byte] = table_.find({name, sizeof name});
  }
  trie_.emplace_back();
  for (const int32_t token : added) {
    if (token < 0 || size_t(token) >= size) throw std::invalid_argument("an added token is outside the vocabulary");
    add_to_trie(table_.text(size_t(token)), token);
  }
}

void SentencePiece::add_to_trie(std::string_view text, int32_t token) {
  if (text.empty()) return;
  if (text.size() > kMaxAddedBytes)
    throw std::invalid_argument("an added token is longer than " + std::to_string(kMaxAddedBytes) + " bytes");
  size_t node = 0;
  for (const char c : text) {
    int32_t child = trie_[node].child;
    while (child >= 0 && trie_[size_t(child)].byte != uint8_t(c)) child = trie_[size_t(child)].sibling;
    if (child < 0) {
      child = int32_t(trie_.size());
      trie_.push_back({uint8_t(c), kNoToken, -1, trie_[node].child});
      trie_[node].child = child;
    }
    node = size_t(child);
  }
  trie_[node].token = token;
}

// The longest added token that `text` begins with, and its bytes.
std::pair<int32_t, size_t> SentencePiece::longest_added(std::string_view text) const {
  std::pair<int32_t, size_t> best{kNoToken, 0};
  size_t node = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    int32_t child = trie_[node].child;
    while (child >= 0 && trie_[size_t(child)].byte != uint8_t(text[i])) child = trie_[size_t(child)].sibling;
    if (child < 0) break;
    node = size_t(child);
    if (trie_[node].token != kNoToken) best = {trie_[node].token, i + 1};
  }
  return best;
}

std::vector<int32_t> SentencePiece::encode(std::string_view text) const {
  std::array<bool, 256> starts{};  // first bytes of added tokens
  for (int32_t child = trie_[0].child; child >= 0; child = trie_[size_t(child)].sibling) starts[trie_[size_t(child)].byte] = true;
  std::vector<int32_t> ids;
  size_t plain = 0;
  for (size_t at = 0; at < text.size();) {
    const auto [token, bytes] = starts[uint8_t(text[at])] ? longest_added(text.substr(at)) : std::pair<int32_t, size_t>{kNoToken, 0};
    if (token == kNoToken) {
      ++at;
      continue;
    }
    encode_plain(text.substr(plain, at - plain), ids);
    ids.push_back(token);
    plain = at += bytes;
  }
  encode_plain(text.substr(plain), ids);
  return ids;
}

struct SentencePiece::Symbol {
  uint32_t begin, bytes;  // in the text; 0 bytes: merged into the one before
  int32_t token;
  bool merges;            // false: no piece, though its text could be part of one
  int32_t before, after;  // neighbours
};

std::vector<SentencePiece::Symbol> SentencePiece::characters(std::string_view text) const {
  std::vector<Symbol> symbols;
  int64_t unknown = -1;  // where the run of unknown characters began
  auto add = [&](size_t begin, size_t bytes, int32_t token, bool merges) {
    const auto index = int32_t(symbols.size());
    symbols.push_back({uint32_t(begin), uint32_t(bytes), token, merges, index - 1, index + 1});
  };
  auto end_unknown = [&](size_t at) {
    if (unknown >= 0) add(size_t(unknown), at - size_t(unknown), options_.unknown, false);
    unknown = -1;
  };
  auto has_token = [&](char byte) { return byte_tokens_[uint8_t(byte)] != kNoToken; };
  for (size_t at = 0, bytes; at < text.size(); at += bytes) {
    bytes = std::min(character_bytes(text[at]), text.size() - at);
    const std::string_view character = text.substr(at, bytes);
    if (const int32_t token = table_.find(character); token != kNoToken) {
      end_unknown(at);
      add(at, bytes, token, rank_[size_t(token)] != kNotMergeable);
    } else if (std::all_of(character.begin(), character.end(), has_token)) {
      end_unknown(at);
      for (size_t i = 0; i < bytes; ++i) add(at + i, 1, byte_tokens_[uint8_t(character[i])], false);
    } else if (unknown < 0 && options_.unknown != kNoToken) {
      unknown = int64_t(at);
    }
  }
  end_unknown(text.size());
  if (!symbols.empty()) symbols.back().after = -1;
  return symbols;
}

void SentencePiece::encode_plain(std::string_view plain, std::vector<int32_t>& out) const {
  if (plain.empty()) return;
  std::string text(options_.space_prefix ? kSpace : std::string_view());
  text.reserve(plain.size() * 2);
  for (const char c : plain) c == ' ' ? void(text.append(kSpace)) : text.push_back(c);
  if (text.size() > size_t(INT32_MAX)) throw std::invalid_argument("the text is too long");

  std::vector<Symbol> symbols = characters(text);
  struct Merge {
    uint64_t rank;  // of the joined piece, then the longest left part
    int32_t left;
    uint32_t bytes;  // of both: tells a merge that is out of date
    int32_t token;
    bool operator<(const Merge& other) const { return std::pair(rank, left) > std::pair(other.rank, other.left); }
  };
  std::priority_queue<Merge> merges;
  auto consider = [&](int32_t left) {
    if (left < 0 || symbols[size_t(left)].after < 0) return;
    const Symbol& a = symbols[size_t(left)];
    const Symbol& b = symbols[size_t(a.after)];
    const uint32_t bytes = a.bytes + b.bytes;
    if (bytes > table_.longest() || !a.merges || !b.merges) return;
    const int32_t token = table_.find(std::string_view(text).substr(a.begin, bytes));
    if (token == kNoToken || rank_[size_t(token)] == kNotMergeable) return;
    merges.push({uint64_t(rank_[size_t(token)]) << 32 | (UINT32_MAX - a.bytes), left, bytes, token});
  };
  for (size_t i = 0; i < symbols.size(); ++i) consider(int32_t(i));
  while (!merges.empty()) {
    const Merge merge = merges.top();
    merges.pop();
    Symbol& left = symbols[size_t(merge.left)];
    if (left.bytes == 0 || left.after < 0) continue;
    Symbol& right = symbols[size_t(left.after)];
    if (left.bytes + right.bytes != merge.bytes) continue;
    left.bytes = merge.bytes;
    left.token = merge.token;
    right.bytes = 0;
    left.after = right.after;
    if (left.after >= 0) symbols[size_t(left.after)].before = merge.left;
    consider(left.before);
    consider(merge.left);
  }
  for (const Symbol& symbol : symbols)
    if (symbol.bytes > 0) out.push_back(symbol.token);
}

}  // namespace setpoint
