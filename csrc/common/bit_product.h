// Products with a matrix of bits, four bits at a time: the sums of every subset of four rows are tabulated, and one
// addition does the work of four multiplications. Compiled once per instruction set (BTINET_ISA).
#pragma once

namespace btinet {
namespace BTINET_ISA {

constexpr int64_t kSubsets = 16;  // of four rows

// table[s] = sum of the rows whose bit is set in s, for V vectors of columns. `row(i)` gives row i's columns.
template <class T, int V, class Row>
inline void tabulate_subsets(const Row& row, T* table) {
  constexpr int64_t lanes = Lanes<T>::count;
  for (int v = 0; v < V; ++v) {
    Vector<T> sums[kSubsets] = {};
    for (int i = 0; i < 4; ++i) {
      const Vector<T> value = row(i, v);
      for (int s = 0; s < 1 << i; ++s) sums[(1 << i) + s] = s ? sums[s] + value : value;
    }
    for (int s = 0; s < kSubsets; ++s) store(table + (s * V + v) * lanes, sums[s]);
  }
}

// out[r] = sum of the rows chosen by the bits of bytes[r * byte_stride ...], for V vectors of columns. The tables are
// those of two times `count` groups of four rows.
template <class T, int V>
void sum_of_chosen_rows(const uint8_t* bytes, int64_t byte_stride, int64_t rows, int64_t count, const T* tables, T* out,
                        int64_t out_stride) {
  constexpr int64_t lanes = Lanes<T>::count, entry = V * lanes;
  constexpr int kBlock = 4;
  const auto block = [&](int64_t r, auto block_rows) {
    constexpr int R = decltype(block_rows)::value;
    Vector<T> sum[R][V] = {};
    const uint8_t* bits = bytes + r * byte_stride;
    const T* table = tables;
    for (int64_t k = 0; k < count; ++k, table += 2 * kSubsets * entry)
      for (int i = 0; i < R; ++i) {
        const int64_t byte = bits[i * byte_stride + k];
        const T *low = table + (byte & 15) * entry, *high = table + (kSubsets + (byte >> 4)) * entry;
        for (int v = 0; v < V; ++v) sum[i][v] += load(low + v * lanes);
        for (int v = 0; v < V; ++v) sum[i][v] += load(high + v * lanes);
      }
    for (int i = 0; i < R; ++i)
      for (int v = 0; v < V; ++v) store(out + (r + i) * out_stride + v * lanes, sum[i][v]);
  };
  int64_t r = 0;
  for (; r + kBlock <= rows; r += kBlock) block(r, std::integral_constant<int, kBlock>{});
  for (; r < rows; ++r) block(r, std::integral_constant<int, 1>{});
}

// total[j] += sum over groups g of table g's entry choice[g * choice_stride + j], for V vectors of columns.
template <class T, int V>
void add_chosen_sums(const uint8_t* choice, int64_t choice_stride, int64_t groups, int64_t outputs, const T* tables,
                     T* total, int64_t total_stride) {
  constexpr int64_t lanes = Lanes<T>::count, entry = V * lanes;
  constexpr int kBlock = 4;
  const auto block = [&](int64_t j, auto block_outputs) {
    constexpr int J = decltype(block_outputs)::value;
    Vector<T> sum[J][V];
    for (int i = 0; i < J; ++i)
      for (int v = 0; v < V; ++v) sum[i][v] = load(total + (j + i) * total_stride + v * lanes);
    const T* table = tables;
    const uint8_t* chosen = choice + j;
    for (int64_t g = 0; g < groups; ++g, table += kSubsets * entry, chosen += choice_stride)
      for (int i = 0; i < J; ++i) {
        const T* from = table + chosen[i] * entry;
        for (int v = 0; v < V; ++v) sum[i][v] += load(from + v * lanes);
      }
    for (int i = 0; i < J; ++i)
      for (int v = 0; v < V; ++v) store(total + (j + i) * total_stride + v * lanes, sum[i][v]);
  };
  int64_t j = 0;
  for (; j + kBlock <= outputs; j += kBlock) block(j, std::integral_constant<int, kBlock>{});
  for (; j < outputs; ++j) block(j, std::integral_constant<int, 1>{});
}

// Bit i of a byte in byte i of a word.
struct SpreadBits {
  uint64_t word[256];

  SpreadBits() {
    for (int byte = 0; byte < 256; ++byte) {
      word[byte] = 0;
      for (int i = 0; i < 8; ++i) word[byte] |= uint64_t(byte >> i & 1) << 8 * i;
    }
  }
};

// Turns the bits of a range of positions around: for each group of four positions, one byte per output holds the
// output's four bits. Also counts the positions whose bit is set, per output.
class BitsByOutput {
 public:
  explicit BitsByOutput(int64_t outputs) : bytes_((outputs + 7) / 8), counts_(8 * bytes_) {}

  void turn(const uint8_t* active, int64_t positions) {
    static const SpreadBits spread;
    const int64_t groups = (positions + 3) / 4;
    choice_.resize(groups * stride());
    std::fill(counts_.begin(), counts_.end(), 0);
    for (int64_t k = 0; k < bytes_; ++k) {
      uint64_t count = 0;  // eight counters of one byte
      const auto flush = [&] {
        for (int i = 0; i < 8; ++i) counts_[8 * k + i] += count >> 8 * i & 255;
        count = 0;
      };
      for (int64_t g = 0; g < groups; ++g) {
        uint64_t word = 0;
        const int64_t left = std::min<int64_t>(4, positions - 4 * g);
        for (int64_t i = 0; i < left; ++i) {
          const uint64_t bits = spread.word[active[(4 * g + i) * bytes_ + k]];
          word |= bits << i;
          count += bits;
        }
        std::memcpy(choice_.data() + g * stride() + 8 * k, &word, 8);  // little-endian
        if (g % 32 == 31) flush();
      }
      flush();
    }
  }

  int64_t stride() const { return 8 * bytes_; }
  const uint8_t* choice(int64_t group) const { return choice_.data() + group * stride(); }
  int64_t count(int64_t output) const { return counts_[output]; }

 private:
  int64_t bytes_;
  std::vector<int64_t> counts_;
  std::vector<uint8_t> choice_;
};

}  // namespace BTINET_ISA
}  // namespace btinet
