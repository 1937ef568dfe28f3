// Fills one table per ISA, once. A faster kernel is one file in x86/ and one line in its register function.
#include "core/cpu_features.h"
#include "kernels/kernels.h"

#include <stdexcept>
#include <string>

namespace setpoint {

void register_ref(KernelTable& t) {
  register_ref_matmul(t);
  register_ref_layers(t);
}

namespace {

struct Tables {
  KernelTable ref, avx2, avx512;
  const char* names[4] = {nullptr, nullptr, nullptr, nullptr};

  Tables() {
    const CpuFeatures& cpu = cpu_features();
    int count = 0;
    register_ref(ref);
    names[count++] = ref.isa;
    avx2 = ref;
    avx2.isa = "avx2";
    if (cpu.avx2) {
      register_avx2_matmul(avx2);
      register_avx2_layers(avx2);
      names[count++] = avx2.isa;
    }
    avx512 = avx2;
    avx512.isa = "avx512_vnni";
    if (cpu.avx512_vnni) {
      register_avx512_matmul(avx512);
      register_avx512_layers(avx512);
      names[count++] = avx512.isa;
    }
  }
};

const Tables& tables() {
  static const Tables instance;
  return instance;
}

}  // namespace

const char* const* available_isas() { return tables().names; }

const KernelTable& kernel_table(const char* isa) {
  const std::string wanted = isa;
  const Tables& all = tables();
  const CpuFeatures& cpu = cpu_features();
  if (wanted == "auto") return cpu.avx512_vnni ? all.avx512 : cpu.avx2 ? all.avx2 : all.ref;
  if (wanted == "ref") return all.ref;
  if (wanted == "avx2") {
    if (!cpu.avx2) throw std::runtime_error("this CPU has no AVX2 and FMA; use isa=ref or isa=auto");
    return all.avx2;
  }
  if (wanted == "avx512_vnni") {
    if (!cpu.avx512_vnni) throw std::runtime_error("this CPU has no AVX-512 VNNI; use isa=auto");
    return all.avx512;
  }
  throw std::runtime_error("unknown isa '" + wanted + "'; one of auto, ref, avx2, avx512_vnni");
}

}  // namespace setpoint
