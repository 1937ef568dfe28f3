"""What it costs to compute a prefix again, and what to read it back: measured while the engine runs."""

from __future__ import annotations

from dataclasses import dataclass

FEWEST_TOKENS = 32  # of a step that says something about the price of a prompt's token
FEWEST_BYTES = 1 << 16  # of a read that says something about a bandwidth
WEIGHT = 0.2  # of a new reading
DISK_BYTES_PER_S = 3e8  # believed of a disk before the first reading
FORGIVENESS = 1.02  # a disk that was found too slow is believed to be faster by so much each time it is left alone
STALL_S = 0.005  # restores may take so long of a step that others wait for
ALONE_S = 0.1  # and so long of one that computes nothing for others
BEHIND_S = 0.001  # copies that could as well be made later, beside others
IDLE_S = 0.005  # and in an engine without work


@dataclass(slots=True)
class RestoreCost:
    """Rates, as moving averages of what was observed. Before that: priors, and computing counts as dear.

    `learns=False` keeps them as given, for tests and simulations.
    """

    compute_s_per_token: float | None = None  # None = not known yet: reading is tried, and measured
    memory_bytes_per_s: float = 4e9  # from memory into the pool
    save_bytes_per_s: float = 1e9  # the other way, into memory that is new
    disk_bytes_per_s: float = DISK_BYTES_PER_S
    learns: bool = True

    def saved_s(self, num_tokens: int) -> float:
        """What computing these tokens would take."""
        per_token = 1.0 if self.compute_s_per_token is None else self.compute_s_per_token
        return num_tokens * per_token

    def read_s(self, memory_bytes: int, disk_bytes: int) -> float:
        """What restoring takes: everything is copied into the pool, a part is read from disk before that."""
        return (memory_bytes + disk_bytes) / self.memory_bytes_per_s + disk_bytes / self.disk_bytes_per_s

    def restore_bytes_in(self, seconds: float) -> int:
        return int(self.memory_bytes_per_s * seconds)

    def save_bytes_in(self, seconds: float) -> int:
        return int(self.save_bytes_per_s * seconds)

    def observe_step(self, num_tokens: int, seconds: float) -> None:
        if self.learns and num_tokens >= FEWEST_TOKENS and seconds > 0:
            self.compute_s_per_token = _average(self.compute_s_per_token, seconds / num_tokens)

    def observe_moves(self, saved_bytes: int, restored_bytes: int, seconds: float) -> None:
        """Copies between the pool and memory in one step; of a mixed one, the share of either is not known."""
        if not self.learns or seconds <= 0 or saved_bytes + restored_bytes < FEWEST_BYTES:
            return
        if not restored_bytes:
            self.save_bytes_per_s = _average(self.save_bytes_per_s, saved_bytes / seconds)
        elif not saved_bytes:
            self.memory_bytes_per_s = _average(self.memory_bytes_per_s, restored_bytes / seconds)

    def observe_disk(self, num_bytes: int, seconds: float) -> None:
        if self.learns and num_bytes >= FEWEST_BYTES and seconds > 0:
            self.disk_bytes_per_s = _average(self.disk_bytes_per_s, num_bytes / seconds)

    def left_on_disk(self) -> None:
        """A prefix was computed because of what reading would have cost: without another reading that stays so."""
        if self.learns and self.disk_bytes_per_s < DISK_BYTES_PER_S:
            self.disk_bytes_per_s = min(self.disk_bytes_per_s * FORGIVENESS, DISK_BYTES_PER_S)


def _average(old: float | None, new: float) -> float:
    return new if old is None else old + WEIGHT * (new - old)
