"""What the machine can do at this moment, as a worker of its own: short probes, no engine in the process."""

from __future__ import annotations

import argparse

from protocol import Answer, serve
from setpoint.tune.probe.ceilings import Probe


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, required=True)
    threads = parser.parse_args().threads
    probe = Probe()
    probe.dram(threads, 1)  # the first touch of its buffer is no measurement

    def measure() -> Answer:
        vnni = probe.vnni(threads)
        if vnni is None:
            raise RuntimeError("this CPU has no 8-bit products to compare with; AVX2 is the least")
        return {"vnni_gops": vnni, "dram_gb_s": probe.dram(threads)}

    serve({}, {"probe": measure})


if __name__ == "__main__":
    main()
