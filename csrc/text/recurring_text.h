// A text of token ids that grows at its end and knows where its end, or the end of another text, occurred before.
//
// The native twin of engine/speculation/recurring_text.py, which says what it does and is compared with it call by call.
// A suffix automaton (Blumer et al. 1985) of at most two states a token; most have one way out, which lies in the state.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

namespace setpoint {

class SuffixAutomaton {
 public:
  SuffixAutomaton() : states_(1) {}

  void append(int32_t token);
  int32_t target(int32_t state, int32_t token) const;  // the state behind `token`, or -1
  int32_t link(int32_t state) const { return states_[state].link; }
  int32_t length(int32_t state) const { return states_[state].length; }
  int32_t after(int32_t state) const { return states_[state].after; }
  void occurred(int32_t state, int32_t after) { states_[state].after = after; }
  std::span<const int32_t> text() const { return text_; }

 private:
  struct State {
    int32_t link = -1;
    int32_t length = 0;
    int32_t after = 0;                // the position behind one of its places
    int32_t token = -1, target = -1;  // the first way out
  };

  int32_t add_state(int32_t length, int32_t link);
  void set_target(int32_t state, int32_t token, int32_t target);
  int32_t exactly(int32_t state, int32_t token, int32_t behind);

  std::vector<int32_t> text_;
  std::vector<State> states_;
  std::unordered_map<int32_t, std::unordered_map<int32_t, int32_t>> others_;  // further ways out
  int32_t last_ = 0;
};

// The longest end of a text, read token by token, that occurs in an automaton, which may grow meanwhile.
class Follower {
 public:
  void read(const SuffixAutomaton& automaton, int32_t token);
  int32_t settle(const SuffixAutomaton& automaton);  // the state of the match: its string may have been split off
  int32_t source(const SuffixAutomaton& automaton) { return automaton.after(settle(automaton)); }
  int32_t matched() const { return matched_; }

 private:
  int32_t state_ = 0;
  int32_t matched_ = 0;  // tokens
};

class RecurringText {
 public:
  void append(int32_t token);
  const SuffixAutomaton& automaton() const { return automaton_; }
  int32_t matched() const { return matched_; }
  int32_t source() const { return source_; }

 private:
  SuffixAutomaton automaton_;
  Follower reader_;
  int32_t source_ = 0, matched_ = 0;
};

}  // namespace setpoint
