// Runs every test at every instruction-set level that this CPU has.
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "harness.h"

namespace geco::test {

namespace {

struct Entry {
  const char* name;
  Test test;
  const char* only;
};

std::vector<Entry>& entries() {
  static std::vector<Entry> list;
  return list;
}

const char* running = "";
const char* running_level = "";
long checks = 0, failures = 0;

std::size_t page_size() { return std::size_t(sysconf(_SC_PAGESIZE)); }

// A guard page was touched: say where, as the program can't go on.
void report_fault(int signal) {
  for (const char* text : {"FAILED ", running, " ", running_level, ": touched a guard page\n"})
    if (write(STDERR_FILENO, text, std::strlen(text)) < 0) break;
  ::signal(signal, SIG_DFL);
  raise(signal);
}

// `mantissa` stored bits below an exponent of the given bias, in 16 bits.
double decode_small(std::uint16_t bits, int mantissa, int bias) {
  const int largest = (1 << (15 - mantissa)) - 1;
  const int exponent = (bits >> mantissa) & largest, fraction = bits & ((1 << mantissa) - 1);
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == largest) return fraction ? std::nan("") : sign * HUGE_VAL;
  const int significand = exponent ? fraction + (1 << mantissa) : fraction;
  return sign * std::ldexp(significand, (exponent ? exponent : 1) - bias - mantissa);
}

std::uint16_t encode_small(double x, int mantissa, int bias) {
  const int infinity = ((1 << (15 - mantissa)) - 1) << mantissa;
  const int sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return std::uint16_t(sign | infinity | 1 << (mantissa - 1));
  if (std::isinf(x) || x == 0) return std::uint16_t(sign | (x == 0 ? 0 : infinity));
  int exponent;
  std::frexp(x, &exponent);
  --exponent;
  if (exponent < 1 - bias) exponent = 1 - bias;
  // Adjacent numbers have adjacent bits: a carry out of the significand is right as it is.
  const long significand = std::lrint(std::ldexp(std::fabs(x), mantissa - exponent));
  const long bits = significand + (long(exponent + bias - 1) << mantissa);
  return std::uint16_t(sign | (bits > infinity ? infinity : bits));
}

}  // namespace

Register::Register(const char* name, Test test, const char* only) {
  entries().push_back({name, test, only});
}

void count_check() { ++checks; }

void report(const char* what, const std::string& detail) {
  if (++failures > 20) return;
  std::fprintf(stderr, "FAILED %s %s: %s: %s\n", running, running_level, what, detail.c_str());
}

std::string number(double x) {
  char text[80];
  std::snprintf(text, sizeof(text), "%.17g (%a)", x, x);
  return text;
}

std::uint64_t Random::bits() {
  std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

double Random::normal() {
  const double u = (double(bits() >> 11) + 1) * 0x1p-53, v = double(bits() >> 11) * 0x1p-53;
  return std::sqrt(-2 * std::log(u)) * std::cos(6.283185307179586 * v);
}

std::size_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}
DType compute_dtype(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}
double epsilon(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 0x1p-23;
    case DType::kFloat64:
      return 0x1p-52;
    case DType::kBFloat16:
      return 0x1p-7;
    case DType::kFloat16:
      return 0x1p-10;
  }
  return 0;
}
double compute_epsilon(DType dtype) { return epsilon(compute_dtype(dtype)); }

double decode(DType dtype, const void* element) {
  std::uint16_t bits;
  float single;
  double value;
  switch (dtype) {
    case DType::kFloat32:
      std::memcpy(&single, element, sizeof(single));
      return single;
    case DType::kFloat64:
      std::memcpy(&value, element, sizeof(value));
      return value;
    default:
      std::memcpy(&bits, element, sizeof(bits));
      return dtype == DType::kBFloat16 ? decode_small(bits, 7, 127) : decode_small(bits, 10, 15);
  }
}

void encode(DType dtype, double value, void* element) {
  if (dtype == DType::kFloat64) {
    std::memcpy(element, &value, sizeof(value));
  } else if (dtype == DType::kFloat32) {
    const float single = float(value);
    std::memcpy(element, &single, sizeof(single));
  } else {
    const std::uint16_t bits =
        dtype == DType::kBFloat16 ? encode_small(value, 7, 127) : encode_small(value, 10, 15);
    std::memcpy(element, &bits, sizeof(bits));
  }
}

Guarded::Guarded(std::size_t bytes, Edge edge) : bytes_(bytes) {
  const std::size_t page = page_size();
  usable_ = (bytes + page - 1) / page * page;
  pages_ = static_cast<unsigned char*>(
      mmap(nullptr, usable_ + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (pages_ == MAP_FAILED ||
      (usable_ != 0 && mprotect(pages_ + page, usable_, PROT_READ | PROT_WRITE) != 0)) {
    std::perror("guarded memory");
    std::abort();
  }
  std::memset(pages_ + page, 0xff, usable_);
  data_ = pages_ + page + (edge == Edge::kEnd ? usable_ - bytes : 0);
}

Guarded::Guarded(Guarded&& other) noexcept
    : pages_(other.pages_), data_(other.data_), bytes_(other.bytes_), usable_(other.usable_) {
  other.pages_ = nullptr;
}

Guarded::~Guarded() {
  if (pages_ == nullptr) return;
  const std::size_t page = page_size();
  bool kept = true;
  for (unsigned char* p = pages_ + page; p < pages_ + page + usable_; ++p)
    if ((p < data_ || p >= data_ + bytes_) && *p != 0xff) kept = false;
  expect(kept, "write outside an operand",
         [] { return std::string("memory beside it has changed"); });
  munmap(pages_, usable_ + 2 * page);
}

void expect_close(DType dtype, double got, Exact exact, double units, const char* what) {
  const double value = double(exact.value);
  // The last term is the rounding of numbers below the normal range.
  const double bound = units * compute_epsilon(dtype) * double(exact.terms) +
                       epsilon(dtype) * std::fabs(value) +
                       (dtype == DType::kFloat16 ? 0x1p-24 : 0x1p-120);
  const bool holds = std::isfinite(value) ? std::fabs(got - value) <= bound
                     : std::isnan(value)  ? std::isnan(got)
                                          : got == value;
  // Near the end of the range and past it infinity is right, too.
  const bool beyond = dtype == DType::kFloat16 && std::fabs(value) + bound >= 65504 &&
                      std::isinf(got) && std::signbit(got) == std::signbit(value);
  expect(holds || beyond, what, [&] {
    return number(got) + " instead of " + number(value) + ", off by " +
           number(std::fabs(got - value) / bound) + " times the bound";
  });
}

}  // namespace geco::test

int main() {
  using namespace geco::test;
  signal(SIGSEGV, report_fault);
  signal(SIGBUS, report_fault);
  int count = 0;
  const geco::cpu::Level* levels = geco::cpu::levels(&count);
  for (int k = 0; k < count; ++k) {
    if (!levels[k].supported()) {
      std::printf("skipped %s: not on this CPU\n", levels[k].name);
      continue;
    }
    for (const Entry& entry : entries()) {
      if (entry.only != nullptr && std::strcmp(entry.only, levels[k].name) != 0) continue;
      running = entry.name;
      running_level = levels[k].name;
      const long before = checks;
      entry.test(levels[k]);
      std::printf("ran %s %s: %ld checks\n", entry.name, levels[k].name, checks - before);
      std::fflush(stdout);
    }
  }
  std::printf("%ld checks, %ld failed\n", checks, failures);
  return failures != 0;
}
