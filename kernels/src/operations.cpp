#include "operations.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mlk {

namespace {

#if defined(__x86_64__)
// Asked by hand: Clang's __builtin_cpu_supports does not know the name before release 18.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

bool has_avx_vnni() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
}

// Whether tiles of bfloat16 can be multiplied, which Linux wants to be asked for: their state is
// large, and a signal's stack must hold it.
bool may_use_tiles() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (~d & (1u << 22 | 1u << 24))) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & 1u << 5)) return false;  // AVX512_BF16
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return false;
  asm volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  if (~a & (1u << 17 | 1u << 18)) return false;
#if defined(__linux__)
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
  return false;
#endif
}
#endif

std::vector<const Table*> find_tables() {
  std::vector<const Table*> tables{table_baseline()};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      has_f16c()) {
    tables.push_back(table_avx2());
    if (has_avx_vnni()) tables.push_back(table_avxvnni());
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      tables.push_back(table_avx512());
      if (__builtin_cpu_supports("avx512vnni")) {
        tables.push_back(table_vnni());
        if (__builtin_cpu_supports("avx512vbmi")) {
          tables.push_back(table_vbmi());
          if (may_use_tiles()) tables.push_back(table_amx());
        }
      }
    }
  }
#elif defined(__aarch64__) && defined(__linux__)
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) {
    tables.push_back(table_dotprod());
    if (getauxval(AT_HWCAP2) & HWCAP2_I8MM) tables.push_back(table_i8mm());
  }
#endif
  return tables;
}

const std::vector<const Table*>& available() {
  static const std::vector<const Table*> tables = find_tables();
  return tables;
}

std::atomic<const Table*>& choice() {
  static std::atomic<const Table*> table{available().back()};
  return table;
}

// Work below this many numbers is not worth waking another thread.
constexpr size_t ALONE = 1 << 14;

size_t rows_at_once(size_t row) { return std::max<size_t>(1, ALONE / std::max<size_t>(1, row)); }

}  // namespace

const Table& chosen() { return *choice().load(); }

bool choose(const char* name) {
  for (const Table* table : available()) {
    if (std::strcmp(table->name, name) == 0) {
      choice() = table;
      return true;
    }
  }
  return false;
}

Scratch product_scratch(const Table& table, const Matrix& a, const Rows& x) {
  if (x.m <= few_rows) return {table.prepared_floats(a, x.m), 0};
  return {table.packed_floats(a, x), table.panel_floats(a, x, table.most_panels)};
}

Scratch attention_scratch(const Table& table, const Attention& a) {
  return {table.attention_partial_floats(a), table.attention_floats(a)};
}

// Cosines and sines.
Scratch rotation_scratch(const Heads& x) { return {2 * x.m * (x.dim / 2), 0}; }

void matrix_product(Pool& pool, const Table& table, const Matrix& a, const Rows& x, void* y) {
  if (x.m == 0 || a.rows == 0) return;
  auto held = pool.lock();
  const Scratch needed = product_scratch(table, a, x);
  if (x.m <= few_rows) {
    float* prepared = pool.common(needed.common);
    table.prepare(a, x, prepared);
    size_t grain = std::max<size_t>(rows_at_once(a.columns), a.rows / (16 * pool.threads()));
    pool.each(a.rows, grain, [&](size_t first, size_t last, size_t) {
      table.few(a, x, prepared, y, first, last);
    });
    return;
  }
  float* packed = pool.common(needed.common);
  pool.each(table.pack_blocks(x), 1, [&](size_t first, size_t last, size_t) {
    table.pack(a, x, packed, first, last);
  });
  size_t panels = (a.rows + table.panel_rows - 1) / table.panel_rows;
  size_t grain = std::clamp<size_t>(panels / (4 * pool.threads()), 1, table.most_panels);
  pool.each(panels, grain, [&](size_t first, size_t last, size_t thread) {
    float* scratch = pool.scratch(thread, needed.each);
    for (; first < last; first += table.most_panels) {
      table.panels(a, x, packed, scratch, y, first, std::min(last, first + table.most_panels));
    }
  });
}

void rms_norm(Pool& pool, const Table& table, const Rows& x, const void* weight, Type type,
              float eps, void* y) {
  pool.each(x.m, rows_at_once(x.n), [&](size_t first, size_t last, size_t) {
    table.rms_norm(x, weight, type, eps, y, first, last);
  });
}

void swiglu(Pool& pool, const Table& table, const Rows& x, void* y) {
  pool.each(x.m, rows_at_once(x.n), [&](size_t first, size_t last, size_t) {
    table.swiglu(x, y, first, last);
  });
}

void turn_of(const float* periods, size_t half, int position, float* cosines, float* sines) {
  for (size_t i = 0; i < half; ++i) {
    float angle = float(position) * (1.0f / periods[i]);
    cosines[i] = std::cos(angle);
    sines[i] = std::sin(angle);
  }
}

void rotate(Pool& pool, const Table& table, const Heads& x, const float* periods, int offset,
            void* y) {
  size_t half = x.dim / 2;
  auto held = pool.lock();
  float* angles = pool.common(rotation_scratch(x).common);
  for (size_t m = 0; m < x.m; ++m) {
    turn_of(periods, half, offset + int(m), angles + m * half, angles + (x.m + m) * half);
  }
  pool.each(x.batch * x.heads, rows_at_once(x.m * x.dim), [&](size_t first, size_t last, size_t) {
    table.rotate(x, angles, y, first, last);
  });
}

void append(Pool& pool, const Table& table, const Heads& x, const Buffer& to) {
  pool.each(x.batch * x.heads, rows_at_once(x.m * x.dim), [&](size_t first, size_t last, size_t) {
    table.append(x, to, first, last);
  });
}

void append_packed(Pool& pool, const Table& table, const Heads& x, const PackedBuffer& to) {
  pool.each(x.batch * x.heads, rows_at_once(x.m * x.dim), [&](size_t first, size_t last, size_t) {
    table.append_packed(x, to, first, last);
  });
}

void attention(Pool& pool, const Table& table, const Attention& a) {
  size_t parts = table.attention_parts(a), joins = table.attention_joins(a);
  if (parts == 0) return;
  auto held = pool.lock();
  const Scratch needed = attention_scratch(table, a);
  float* partial = pool.common(needed.common);
  size_t work = a.rows * a.q.dim * a.q.heads * a.q.batch * a.q.m / parts;
  size_t share = (parts + pool.threads() - 1) / pool.threads();
  pool.each(parts, std::min(rows_at_once(work), share), [&](size_t first, size_t last, size_t thread) {
    table.attention(a, pool.scratch(thread, needed.each), partial, first, last);
  });
  if (parts == joins) return;
  size_t numbers = needed.common / joins;
  pool.each(joins, rows_at_once(numbers), [&](size_t first, size_t last, size_t) {
    table.attention_join(a, partial, first, last);
  });
}

void quantize(Pool& pool, const Table& table, const Groups& g, const PackedGroups& to) {
  pool.each(g.n, rows_at_once(g.group), [&](size_t first, size_t last, size_t) {
    table.quantize(g, to, first, last);
  });
}

void dequantize(Pool& pool, const Table& table, const Matrix& a, void* y) {
  if (a.columns == 0) return;
  size_t groups = a.rows * (a.columns / a.group);
  pool.each(groups, rows_at_once(a.group), [&](size_t first, size_t last, size_t) {
    table.dequantize(a, y, first, last);
  });
}

}  // namespace mlk
