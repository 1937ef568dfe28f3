#include "text/recurring_text.h"

namespace setpoint {

int32_t SuffixAutomaton::target(int32_t state, int32_t token) const {
  const State& from = states_[state];
  if (from.token == token) return from.target;
  if (from.token < 0) return -1;
  const auto others = others_.find(state);
  if (others == others_.end()) return -1;
  const auto found = others->second.find(token);
  return found == others->second.end() ? -1 : found->second;
}

void SuffixAutomaton::append(int32_t token) {
  text_.push_back(token);
  const int32_t added = add_state(states_[last_].length + 1, 0);
  int32_t state = last_;
  last_ = added;
  for (; state >= 0; state = states_[state].link) {
    const int32_t behind = target(state, token);
    if (behind >= 0) {
      const int32_t link = exactly(state, token, behind);
      states_[added].link = link;
      return;
    }
    set_target(state, token, added);
  }
}

int32_t SuffixAutomaton::add_state(int32_t length, int32_t link) {
  states_.push_back({.link = link, .length = length, .after = static_cast<int32_t>(text_.size())});
  return static_cast<int32_t>(states_.size()) - 1;
}

void SuffixAutomaton::set_target(int32_t state, int32_t token, int32_t target) {
  State& from = states_[state];
  if (from.token < 0 || from.token == token) {
    from.token = token;
    from.target = target;
  } else {
    others_[state][token] = target;
  }
}

// The state of the strings that are one token longer than those of `state`, split off where need be.
int32_t SuffixAutomaton::exactly(int32_t state, int32_t token, int32_t behind) {
  if (states_[behind].length == states_[state].length + 1) return behind;
  const int32_t split = add_state(states_[state].length + 1, states_[behind].link);
  states_[split].after = states_[behind].after;
  states_[split].token = states_[behind].token;
  states_[split].target = states_[behind].target;
  if (const auto others = others_.find(behind); others != others_.end()) {
    auto copy = others->second;  // by value: a new entry may move the old one
    others_.emplace(split, std::move(copy));
  }
  states_[behind].link = split;
  for (; state >= 0 && target(state, token) == behind; state = states_[state].link) set_target(state, token, split);
  return split;
}

void Follower::read(const SuffixAutomaton& automaton, int32_t token) {
  int32_t state = settle(automaton), matched = matched_, behind;
  while ((behind = automaton.target(state, token)) < 0 && state > 0) {
    state = automaton.link(state);
    matched = automaton.length(state);
  }
  state_ = behind >= 0 ? behind : 0;
  matched_ = behind >= 0 ? matched + 1 : 0;
  settle(automaton);
}

int32_t Follower::settle(const SuffixAutomaton& automaton) {
  while (state_ > 0 && matched_ <= automaton.length(automaton.link(state_))) state_ = automaton.link(state_);
  return state_;
}

void RecurringText::append(int32_t token) {
  reader_.read(automaton_, token);  // before it is part of the text
  source_ = reader_.source(automaton_);
  matched_ = reader_.matched();
  automaton_.append(token);
  const int32_t state = reader_.settle(automaton_);
  if (state > 0) automaton_.occurred(state, static_cast<int32_t>(automaton_.text().size()));  // the latest place
}

}  // namespace setpoint
