// The passes, compiled once per instruction set: the including file sets the compiler target, BTINET_ISA (the
// namespace), BTINET_VECTOR_BYTES and the register block BTINET_ROWS x BTINET_VECTORS of the small GEMM.
// Every standard header comes before that target is set (interaction_prelude.h).

namespace btinet {
namespace BTINET_ISA {

constexpr int kRows = BTINET_ROWS;
constexpr int kVectors = BTINET_VECTORS;
constexpr int64_t kTile = 48;  // positions a tile holds

template <class T>
struct Lanes {
  static constexpr int64_t count = BTINET_VECTOR_BYTES / sizeof(T);
  typedef T vector __attribute__((vector_size(BTINET_VECTOR_BYTES), aligned(alignof(T)), may_alias));
};

template <class T>
int64_t padded(int64_t columns) {
  return (columns + Lanes<T>::count - 1) / Lanes<T>::count * Lanes<T>::count;
}

// The left operand of a product: element (r, k) lies at data[r * row_step + k * inner_step].
template <class T>
struct Left {
  const T* data;
  int64_t row_step;
  int64_t inner_step;
};

// The right operand: element (k, j) lies at data[k * stride + j], and its rows are whole vectors.
template <class T>
struct Right {
  const T* data;
  int64_t stride;
};

// A block of R rows and V vectors of columns of the product stays in registers; `finish` starts it and disposes of it.
template <class T, int R, int V, class Finish>
inline void multiply_block(Left<T> a, Right<T> b, int64_t inner, int64_t row, int64_t column, const Finish& finish) {
  using vector = typename Lanes<T>::vector;
  constexpr int64_t lanes = Lanes<T>::count;
  const T *left = a.data + row * a.row_step, *right = b.data + column;
  vector sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = finish.start(row + r, column + v * lanes);
  for (int64_t k = 0; k < inner; ++k) {
    vector columns[V];
    for (int v = 0; v < V; ++v) columns[v] = *reinterpret_cast<const vector*>(right + k * b.stride + v * lanes);
    for (int r = 0; r < R; ++r) {
      const T factor = left[r * a.row_step + k * a.inner_step];
      for (int v = 0; v < V; ++v) sum[r][v] += factor * columns[v];
    }
  }
  for (int v = 0; v < V; ++v) {
    vector of_rows[R];
    for (int r = 0; r < R; ++r) of_rows[r] = sum[r][v];
    finish.template end<R>(row, column + v * lanes, of_rows);
  }
}

template <class T, int R, class Finish>
inline void multiply_rows(Left<T> a, Right<T> b, int64_t inner, int64_t row, int64_t columns, const Finish& finish) {
  constexpr int64_t lanes = Lanes<T>::count;
  int64_t j = 0;
  for (; j + kVectors * lanes <= columns; j += kVectors * lanes)
    multiply_block<T, R, kVectors>(a, b, inner, row, j, finish);
  for (; j + 2 * lanes <= columns; j += 2 * lanes) multiply_block<T, R, 2>(a, b, inner, row, j, finish);
  for (; j < columns; j += lanes) multiply_block<T, R, 1>(a, b, inner, row, j, finish);
}

// The product of A [rows, inner] and B [inner, columns]; `columns` is a whole number of vectors.
template <class T, class Finish>
void multiply(Left<T> a, Right<T> b, int64_t rows, int64_t inner, int64_t columns, const Finish& finish) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) multiply_rows<T, kRows>(a, b, inner, r, columns, finish);
  for (; r < rows; ++r) multiply_rows<T, 1>(a, b, inner, r, columns, finish);
}

template <class T>
inline typename Lanes<T>::vector& vector_at(T* data) {
  return *reinterpret_cast<typename Lanes<T>::vector*>(data);
}

template <class T>
inline const typename Lanes<T>::vector& vector_at(const T* data) {
  return *reinterpret_cast<const typename Lanes<T>::vector*>(data);
}

// out += product, or out = product.
template <class T, bool kAdd>
struct Store {
  using vector = typename Lanes<T>::vector;
  T* out;
  int64_t stride;

  vector start(int64_t row, int64_t column) const {
    return kAdd ? vector_at(out + row * stride + column) : vector{};
  }
  template <int R>
  void end(int64_t row, int64_t column, const vector (&sum)[R]) const {
    for (int r = 0; r < R; ++r) vector_at(out + (row + r) * stride + column) = sum[r];
  }
};

// out = ReLU(product + bias).
template <class T>
struct StoreReLU {
  using vector = typename Lanes<T>::vector;
  const T* bias;
  T* out;
  int64_t stride;

  vector start(int64_t, int64_t column) const { return vector_at(bias + column); }
  template <int R>
  void end(int64_t row, int64_t column, const vector (&sum)[R]) const {
    for (int r = 0; r < R; ++r) vector_at(out + (row + r) * stride + column) = sum[r] < T(0) ? vector{} : sum[r];
  }
};

// total += ReLU(product + bias), summed over the rows: the product itself never reaches memory.
template <class T>
struct PoolReLU {
  using vector = typename Lanes<T>::vector;
  const T* bias;
  T* total;

  vector start(int64_t, int64_t column) const { return vector_at(bias + column); }
  template <int R>
  void end(int64_t, int64_t column, const vector (&sum)[R]) const {
    vector pooled = vector_at(total + column);
    for (int r = 0; r < R; ++r) pooled += sum[r] < T(0) ? vector{} : sum[r];  // lets NaN through, as torch does
    vector_at(total + column) = pooled;
  }
};

// out = gradient where product + bias > 0, else 0; total += out, summed over the rows.
template <class T>
struct ReLUGradient {
  using vector = typename Lanes<T>::vector;
  const T* bias;
  const T* gradient;
  T* out;
  int64_t stride;
  T* total;

  vector start(int64_t, int64_t column) const { return vector_at(bias + column); }
  template <int R>
  void end(int64_t row, int64_t column, const vector (&sum)[R]) const {
    const vector value = vector_at(gradient + column);
    vector all = vector_at(total + column);
    for (int r = 0; r < R; ++r) {
      const vector kept = sum[r] > T(0) ? value : vector{};
      vector_at(out + (row + r) * stride + column) = kept;
      all += kept;
    }
    vector_at(total + column) = all;
  }
};

// Where each position of a view lies, and which positions have a successor along each axis.
template <class T>
class Positions {
 public:
  explicit Positions(const Shape& shape) {
    step_[2] = 1;
    step_[1] = shape.size[2];
    step_[0] = shape.size[2] * shape.size[1];
    const int64_t n = shape.positions();
    for (int d = 0; d < 3; ++d) {
      if (shape.size[d] < 2) continue;
      axes_.push_back(d);
      has_next_[d].resize(n);
      for (int64_t i = 0; i < n; ++i)
        has_next_[d][i] = i / step_[d] % shape.size[d] + 1 < shape.size[d] ? T(1) : T(0);
    }
  }

  // The axes along which a position can have a neighbour, 0 to 3 of them.
  const std::vector<int>& axes() const { return axes_; }
  int64_t step(int d) const { return step_[d]; }
  const T* has_next(int d) const { return has_next_[d].data(); }

 private:
  int64_t step_[3];
  std::vector<int> axes_;
  std::vector<T> has_next_[3];
};

template <class T>
std::vector<int64_t> offsets_of(const View<T>& view) {
  std::vector<int64_t> offsets(view.shape.positions());
  for (size_t n = 0; n < offsets.size(); ++n) offsets[n] = view.offset(n);
  return offsets;
}

// tile[r][c] = view[sample, c, begin + r]; columns beyond the channels are zero.
template <class T>
void load_tile(const View<const T>& view, const std::vector<int64_t>& offsets, int64_t sample, int64_t begin,
               int64_t rows, T* tile, int64_t stride) {
  const int64_t channels = view.shape.channels;
  const T* base = view.data + sample * view.batch_stride;
  if (view.channel_stride == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      const T* source = base + offsets[begin + r];
      std::copy(source, source + channels, tile + r * stride);
    }
  } else {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t r = 0; r < rows; ++r) tile[r * stride + c] = base[offsets[begin + r] + c * view.channel_stride];
  }
  for (int64_t r = 0; r < rows; ++r) std::fill(tile + r * stride + channels, tile + (r + 1) * stride, T(0));
}

// view[sample, c, begin + r] += tile[r][c].
template <class T>
void add_tile(const View<T>& view, const std::vector<int64_t>& offsets, int64_t sample, int64_t begin, int64_t rows,
              const T* tile, int64_t stride) {
  const int64_t channels = view.shape.channels;
  T* base = view.data + sample * view.batch_stride;
  if (view.channel_stride == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      T* out = base + offsets[begin + r];
      for (int64_t c = 0; c < channels; ++c) out[c] += tile[r * stride + c];
    }
  } else {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t r = 0; r < rows; ++r) base[offsets[begin + r] + c * view.channel_stride] += tile[r * stride + c];
  }
}

template <class T>
T sign(T value) {
  return T(value > T(0)) - T(value < T(0));
}

// Sum over the channels of |next - here|, for A neighbours at once. A missing neighbour is `here` itself.
template <class T, int A>
T row_edge_sum(const T* here, const T* const (&next)[3], int64_t channels) {
  T sum = 0;
  const T *first = next[0], *second = next[A > 1 ? 1 : 0], *third = next[A > 2 ? 2 : 0];
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < channels; ++c) {
    sum += std::abs(first[c] - here[c]);
    if (A > 1) sum += std::abs(second[c] - here[c]);
    if (A > 2) sum += std::abs(third[c] - here[c]);
  }
  return sum;
}

// out[c] += factor * (sign(here - previous) - sign(next - here)), summed over A axes.
template <class T, int A>
void add_row_edge_gradient(const T* here, const T* const (&next)[3], const T* const (&previous)[3], int64_t channels,
                           T factor, T* out) {
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    T slope = 0;
    for (int a = 0; a < A; ++a) slope += sign(here[c] - previous[a][c]) - sign(next[a][c] - here[c]);
    out[c] += factor * slope;
  }
}

// Sum of |forward differences| of the range [begin, end) of one sample, over all axes and channels.
template <class T>
double edge_sum(const View<const T>& view, const std::vector<int64_t>& offsets, const Positions<T>& positions,
                const Range& range) {
  const T* base = view.data + range.sample * view.batch_stride;
  const int64_t channels = view.shape.channels;
  const int axes = int(positions.axes().size());
  double total = 0;
  if (view.channel_stride == 1) {
    for (int64_t n = range.begin; n < range.end; ++n) {
      const T* here = base + offsets[n];
      const T* next[3];
      for (int a = 0; a < axes; ++a) {
        const int d = positions.axes()[a];
        next[a] = positions.has_next(d)[n] != T(0) ? base + offsets[n + positions.step(d)] : here;
      }
      if (axes == 1) total += row_edge_sum<T, 1>(here, next, channels);
      if (axes == 2) total += row_edge_sum<T, 2>(here, next, channels);
      if (axes == 3) total += row_edge_sum<T, 3>(here, next, channels);
    }
    return total;
  }
  const bool dense = view.positions_lie_apart_by(1);
  for (const int d : positions.axes()) {
    const int64_t step = positions.step(d);
    const T* has_next = positions.has_next(d);
    const int64_t end = std::min(range.end, view.shape.positions() - step);
    for (int64_t c = 0; c < channels; ++c) {
      const T* plane = base + c * view.channel_stride;
      T sum = 0;
      if (dense) {
#pragma omp simd reduction(+ : sum)
        for (int64_t n = range.begin; n < end; ++n) sum += has_next[n] * std::abs(plane[n + step] - plane[n]);
      } else {
        for (int64_t n = range.begin; n < end; ++n)
          sum += has_next[n] * std::abs(plane[offsets[n + step]] - plane[offsets[n]]);
      }
      total += sum;
    }
  }
  return total;
}

// out[sample, c, begin + r] += factor * d(sum of |forward differences|) / d view[...]; sign(0) = 0.
template <class T>
void add_edge_gradient(const View<const T>& view, const std::vector<int64_t>& offsets, const View<T>& out,
                       const std::vector<int64_t>& out_offsets, const Positions<T>& positions, int64_t sample,
                       int64_t begin, int64_t rows, T factor) {
  const T* base = view.data + sample * view.batch_stride;
  T* target = out.data + sample * out.batch_stride;
  const int64_t channels = view.shape.channels;
  const int axes = int(positions.axes().size());
  if (view.channel_stride == 1 && out.channel_stride == 1) {
    for (int64_t n = begin; n < begin + rows; ++n) {
      const T* here = base + offsets[n];
      const T *next[3], *previous[3];
      for (int a = 0; a < axes; ++a) {
        const int d = positions.axes()[a];
        const int64_t step = positions.step(d);
        const T* has_next = positions.has_next(d);
        next[a] = has_next[n] != T(0) ? base + offsets[n + step] : here;
        previous[a] = n >= step && has_next[n - step] != T(0) ? base + offsets[n - step] : here;
      }
      T* result = target + out_offsets[n];
      if (axes == 1) add_row_edge_gradient<T, 1>(here, next, previous, channels, factor, result);
      if (axes == 2) add_row_edge_gradient<T, 2>(here, next, previous, channels, factor, result);
      if (axes == 3) add_row_edge_gradient<T, 3>(here, next, previous, channels, factor, result);
    }
    return;
  }
  // Without branches, so that the loops over positions vectorise when those lie side by side in memory.
  const bool dense = view.positions_lie_apart_by(1), dense_out = out.positions_lie_apart_by(1);
  const int64_t* at = offsets.data() + begin;
  for (int64_t c = 0; c < channels; ++c) {
    const T* plane = base + c * view.channel_stride;
    T slope[kTile] = {};
    for (const int d : positions.axes()) {
      const int64_t step = positions.step(d);
      const T* link = positions.has_next(d) + begin;
      const int64_t with_next = std::min(rows, view.shape.positions() - step - begin);
      const int64_t with_previous = std::max<int64_t>(0, step - begin);
      if (dense) {
        const T* here = plane + begin;
        for (int64_t r = 0; r < with_next; ++r) slope[r] -= link[r] * sign(here[r + step] - here[r]);
        for (int64_t r = with_previous; r < rows; ++r) slope[r] += link[r - step] * sign(here[r] - here[r - step]);
      } else {
        for (int64_t r = 0; r < with_next; ++r) slope[r] -= link[r] * sign(plane[at[r + step]] - plane[at[r]]);
        for (int64_t r = with_previous; r < rows; ++r)
          slope[r] += link[r - step] * sign(plane[at[r]] - plane[at[r - step]]);
      }
    }
    T* result = target + c * out.channel_stride;
    if (dense_out) {
      for (int64_t r = 0; r < rows; ++r) result[begin + r] += factor * slope[r];
    } else {
      for (int64_t r = 0; r < rows; ++r) result[out_offsets[begin + r]] += factor * slope[r];
    }
  }
}

// Sum of exp(logit - top) * values over a range of positions, kept stable by the largest logit seen so far.
struct SoftmaxSum {
  double top = -std::numeric_limits<double>::infinity();
  double weight = 0;

  // Returns the factor by which everything summed so far shrinks.
  double raise(double candidate) {
    if (candidate <= top) return 1;
    const double factor = std::exp(top - candidate);
    top = candidate;
    weight *= factor;
    return factor;
  }
};

// Rows of positions of a view as operands of a product: in place where memory allows, else packed into `tile`.
template <class T>
class Rows {
 public:
  Rows(const View<const T>& view, const std::vector<int64_t>& offsets)
      : view_(view), offsets_(offsets), step_(view.shape.positions() > 1 ? offsets[1] - offsets[0] : 0) {
    even_ = view.positions_lie_apart_by(step_);
    whole_ = even_ && view.channel_stride == 1 && view.shape.channels % Lanes<T>::count == 0;
  }

  Left<T> left(int64_t sample, int64_t begin, int64_t rows, T* tile, int64_t stride) const {
    if (even_) return {view_.data + sample * view_.batch_stride + offsets_[begin], step_, view_.channel_stride};
    load_tile(view_, offsets_, sample, begin, rows, tile, stride);
    return {tile, stride, 1};
  }

  Right<T> right(int64_t sample, int64_t begin, int64_t rows, T* tile, int64_t stride) const {
    if (whole_) return {view_.data + sample * view_.batch_stride + offsets_[begin], step_};
    load_tile(view_, offsets_, sample, begin, rows, tile, stride);
    return {tile, stride};
  }

 private:
  const View<const T>& view_;
  const std::vector<int64_t>& offsets_;
  int64_t step_;
  bool even_;
  bool whole_;  // rows are whole vectors
};

template <class T>
std::vector<T> with_padding(const T* values, int64_t count, int64_t size) {
  std::vector<T> result(size, T(0));
  std::copy(values, values + count, result.begin());
  return result;
}

template <class T>
std::vector<T> transposed(const T* matrix, int64_t rows, int64_t columns, int64_t stride) {
  std::vector<T> result(columns * stride, T(0));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) result[c * stride + r] = matrix[r * columns + c];
  return result;
}

// Sums of (value - shift) and of its square over a range: no cancellation when the mean is far from zero.
template <class T>
void add_moments(const View<const T>& view, const std::vector<int64_t>& offsets, const Range& range, const T* shift,
                 double* sums, double* squares) {
  const int64_t channels = view.shape.channels;
  const T* base = view.data + range.sample * view.batch_stride;
  if (view.channel_stride == 1) {
    std::vector<T> sum(channels), square(channels);
    for (int64_t begin = range.begin; begin < range.end; begin += kTile) {
      std::fill(sum.begin(), sum.end(), T(0));
      std::fill(square.begin(), square.end(), T(0));
      for (int64_t n = begin; n < std::min(begin + kTile, range.end); ++n) {
        const T* row = base + offsets[n];
        for (int64_t c = 0; c < channels; ++c) sum[c] += row[c] - shift[c];
        if (squares)
          for (int64_t c = 0; c < channels; ++c) square[c] += (row[c] - shift[c]) * (row[c] - shift[c]);
      }
      for (int64_t c = 0; c < channels; ++c) sums[c] += sum[c];
      if (squares)
        for (int64_t c = 0; c < channels; ++c) squares[c] += square[c];
    }
    return;
  }
  const bool dense = view.positions_lie_apart_by(1);
  for (int64_t c = 0; c < channels; ++c) {
    const T* plane = base + c * view.channel_stride;
    const T origin = shift[c];
    T sum = 0, square = 0;
    if (dense) {
#pragma omp simd reduction(+ : sum, square)
      for (int64_t n = range.begin; n < range.end; ++n) {
        sum += plane[n] - origin;
        square += (plane[n] - origin) * (plane[n] - origin);
      }
    } else {
      for (int64_t n = range.begin; n < range.end; ++n) {
        const T difference = plane[offsets[n]] - origin;
        sum += difference;
        square += difference * difference;
      }
    }
    sums[c] += sum;
    if (squares) squares[c] += square;
  }
}

template <class T>
void statistics(const View<const T>& seg, const Context<T>& context, const Statistics<T>& out, int threads) {
  const int64_t channels = seg.shape.channels, hidden = context.hidden, count = seg.shape.positions();
  const int64_t channel_stride = padded<T>(channels), hidden_stride = padded<T>(hidden);
  const Partition partition(seg.shape, kTile);
  const Positions<T> positions(seg.shape);
  const std::vector<int64_t> offsets = offsets_of(seg);
  const Rows<T> seg_rows(seg, offsets);
  std::vector<T> weight, bias;
  if (hidden) {
    weight = transposed(context.weight, hidden, channels, hidden_stride);
    bias = with_padding(context.bias, hidden, hidden_stride);
  }

  const int64_t ranges = partition.ranges();
  std::vector<double> sums(ranges * channels), squares(out.variance ? ranges * channels : 0);
  std::vector<double> edges(ranges), pooled(ranges * hidden);
  std::vector<SoftmaxSum> softmax(ranges);

#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t index = 0; index < ranges; ++index) {
    const Range range = partition.range(index);
    std::vector<T> tile(hidden ? kTile * channel_stride : 0), shift(channels);
    std::vector<T> activations(context.pool_weight ? kTile * hidden_stride : 0), tile_pooled(hidden_stride);
    const T* first = seg.data + range.sample * seg.batch_stride;
    for (int64_t c = 0; c < channels; ++c) shift[c] = first[c * seg.channel_stride];
    double* range_pooled = pooled.data() + index * hidden;

    for (int64_t begin = range.begin; begin < range.end; begin += kTile) {
      const int64_t rows = std::min(kTile, range.end - begin);
      add_moments(seg, offsets, Range{range.sample, begin, begin + rows}, shift.data(), &sums[index * channels],
                  out.variance ? &squares[index * channels] : nullptr);
      if (!hidden) continue;
      const Left<T> left = seg_rows.left(range.sample, begin, rows, tile.data(), channel_stride);
      const Right<T> right{weight.data(), hidden_stride};
      std::fill(tile_pooled.begin(), tile_pooled.end(), T(0));
      if (!context.pool_weight) {
        multiply(left, right, rows, channels, hidden_stride, PoolReLU<T>{bias.data(), tile_pooled.data()});
      } else {
        multiply(left, right, rows, channels, hidden_stride,
                 StoreReLU<T>{bias.data(), activations.data(), hidden_stride});
        T logits[kTile], top = -std::numeric_limits<T>::infinity();
        for (int64_t r = 0; r < rows; ++r) {
          T logit = 0;
          for (int64_t j = 0; j < hidden; ++j) logit += context.pool_weight[j] * activations[r * hidden_stride + j];
          logits[r] = logit;
          top = std::max(top, logit);
        }
        const double shrink = softmax[index].raise(top);
        for (int64_t j = 0; j < hidden; ++j) range_pooled[j] *= shrink;
        for (int64_t r = 0; r < rows; ++r) {
          const T share = T(std::exp(logits[r] - softmax[index].top));
          softmax[index].weight += share;
          for (int64_t j = 0; j < hidden; ++j) tile_pooled[j] += share * activations[r * hidden_stride + j];
        }
      }
      for (int64_t j = 0; j < hidden; ++j) range_pooled[j] += tile_pooled[j];
    }
    if (out.edges) edges[index] = edge_sum(seg, offsets, positions, range);
  }

  for (int64_t b = 0; b < seg.shape.batch; ++b) {
    const int64_t first = b * partition.per_sample(), last = first + partition.per_sample();
    for (int64_t c = 0; c < channels; ++c) {
      double sum = 0, square = 0;
      for (int64_t i = first; i < last; ++i) {
        sum += sums[i * channels + c];
        if (out.variance) square += squares[i * channels + c];
      }
      const T origin = seg.data[b * seg.batch_stride + c * seg.channel_stride];
      const double shifted_mean = sum / count;
      out.mean[b * channels + c] = T(origin + shifted_mean);
      if (out.variance)
        out.variance[b * channels + c] = T(std::max(0.0, square / count - shifted_mean * shifted_mean));
    }
    if (out.edges) {
      double sum = 0;
      for (int64_t i = first; i < last; ++i) sum += edges[i];
      out.edges[b] = T(sum / (double(channels) * count));
    }
    if (!hidden) continue;
    SoftmaxSum all;
    if (context.pool_weight) {
      for (int64_t i = first; i < last; ++i) all.raise(softmax[i].top);
      for (int64_t i = first; i < last; ++i) all.weight += softmax[i].weight * std::exp(softmax[i].top - all.top);
      out.log_sum_exp[b] = T(all.top + std::log(all.weight));
    }
    for (int64_t j = 0; j < hidden; ++j) {
      double sum = 0;
      for (int64_t i = first; i < last; ++i)
        sum += pooled[i * hidden + j] * (context.pool_weight ? std::exp(softmax[i].top - all.top) : 1.0);
      out.pooled[b * hidden + j] = T(sum / (context.pool_weight ? all.weight : double(count)));
    }
  }
}

// Calls element(c, offset in first, offset in second, offset in out) with the innermost loop along memory.
template <class A, class B, class O, class F>
void for_each_element(const View<A>& first, const View<B>& second, const View<O>& out,
                      const std::vector<int64_t> (&offsets)[3], const Range& range, const F& element) {
  const int64_t channels = first.shape.channels;
  if (first.channel_stride == 1 && second.channel_stride == 1 && out.channel_stride == 1) {
    for (int64_t n = range.begin; n < range.end; ++n) {
      const int64_t i = offsets[0][n], j = offsets[1][n], k = offsets[2][n];
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) element(c, i + c, j + c, k + c);
    }
  } else if (first.positions_lie_apart_by(1) && second.positions_lie_apart_by(1) &&
             out.positions_lie_apart_by(1)) {
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t i = c * first.channel_stride, j = c * second.channel_stride, k = c * out.channel_stride;
#pragma omp simd
      for (int64_t n = range.begin; n < range.end; ++n) element(c, i + n, j + n, k + n);
    }
  } else {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t n = range.begin; n < range.end; ++n)
        element(c, offsets[0][n] + c * first.channel_stride, offsets[1][n] + c * second.channel_stride,
                offsets[2][n] + c * out.channel_stride);
  }
}

template <class T>
void scale_channels(const View<const T>& seg, const T* scale, const View<T>& out, int threads) {
  const Partition partition(seg.shape, kTile);
  const std::vector<int64_t> offsets[3] = {offsets_of(seg), offsets_of(seg), offsets_of(out)};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t index = 0; index < partition.ranges(); ++index) {
    const Range range = partition.range(index);
    const T* source = seg.data + range.sample * seg.batch_stride;
    const T* factor = scale + range.sample * seg.shape.channels;
    T* target = out.data + range.sample * out.batch_stride;
    for_each_element(seg, seg, out, offsets, range, [=](int64_t c, int64_t i, int64_t, int64_t k) {
      target[k] = source[i] * factor[c];
    });
  }
}

template <class T>
void interpolate(const View<const T>& base, const View<const T>& enhanced, const T* weight, const View<T>& out,
                 int threads) {
  const Partition partition(base.shape, kTile);
  const std::vector<int64_t> offsets[3] = {offsets_of(base), offsets_of(enhanced), offsets_of(out)};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t index = 0; index < partition.ranges(); ++index) {
    const Range range = partition.range(index);
    const T* from = base.data + range.sample * base.batch_stride;
    const T* to = enhanced.data + range.sample * enhanced.batch_stride;
    T* target = out.data + range.sample * out.batch_stride;
    const T share = weight[range.sample];
    for_each_element(base, enhanced, out, offsets, range, [=](int64_t, int64_t i, int64_t j, int64_t k) {
      target[k] = from[i] + share * (to[j] - from[i]);
    });
  }
}

template <class T>
void channel_dot(const View<const T>& grad, const View<const T>& seg, T* out, int threads) {
  const int64_t channels = seg.shape.channels;
  const Partition partition(seg.shape, kTile);
  const std::vector<int64_t> grad_offsets = offsets_of(grad), seg_offsets = offsets_of(seg);
  const bool dense = grad.positions_lie_apart_by(1) && seg.positions_lie_apart_by(1);
  std::vector<double> sums(partition.ranges() * channels);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t index = 0; index < partition.ranges(); ++index) {
    const Range range = partition.range(index);
    const T* left = grad.data + range.sample * grad.batch_stride;
    const T* right = seg.data + range.sample * seg.batch_stride;
    double* total = sums.data() + index * channels;
    if (grad.channel_stride == 1 && seg.channel_stride == 1) {
      std::vector<T> tile_sum(channels);
      for (int64_t begin = range.begin; begin < range.end; begin += kTile) {
        std::fill(tile_sum.begin(), tile_sum.end(), T(0));
        for (int64_t n = begin; n < std::min(begin + kTile, range.end); ++n) {
          const T *g = left + grad_offsets[n], *d = right + seg_offsets[n];
          for (int64_t c = 0; c < channels; ++c) tile_sum[c] += g[c] * d[c];
        }
        for (int64_t c = 0; c < channels; ++c) total[c] += tile_sum[c];
      }
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        const T *g = left + c * grad.channel_stride, *d = right + c * seg.channel_stride;
        T sum = 0;
        if (dense) {
#pragma omp simd reduction(+ : sum)
          for (int64_t n = range.begin; n < range.end; ++n) sum += g[n] * d[n];
        } else {
          for (int64_t n = range.begin; n < range.end; ++n) sum += g[grad_offsets[n]] * d[seg_offsets[n]];
        }
        total[c] = sum;
      }
    }
  }
  for (int64_t b = 0; b < seg.shape.batch; ++b)
    for (int64_t c = 0; c < channels; ++c) {
      double sum = 0;
      for (int64_t i = 0; i < partition.per_sample(); ++i)
        sum += sums[(b * partition.per_sample() + i) * channels + c];
      out[b * channels + c] = T(sum);
    }
}

template <class T>
void statistics_backward(const View<const T>& seg, const View<const T>& grad, const T* scale,
                         const Context<T>& context, const Statistics<const T>& saved,
                         const StatisticsGradient<T>& gradient, const View<T>& out,
                         const ContextGradient<T>& context_gradient, int threads) {
  const int64_t channels = seg.shape.channels, hidden = context.hidden, count = seg.shape.positions();
  const int64_t stride = padded<T>(channels), hidden_stride = padded<T>(hidden);
  const Partition partition(seg.shape, kTile);
  const Positions<T> positions(seg.shape);
  std::vector<T> weight_by_channel, weight_rows, bias;
  if (hidden) {
    weight_by_channel = transposed(context.weight, hidden, channels, hidden_stride);
    bias = with_padding(context.bias, hidden, hidden_stride);
    weight_rows.assign(hidden * stride, T(0));
    for (int64_t j = 0; j < hidden; ++j)
      std::copy(context.weight + j * channels, context.weight + (j + 1) * channels, &weight_rows[j * stride]);
  }
  const std::vector<int64_t> offsets[3] = {offsets_of(seg), offsets_of(grad), offsets_of(out)};
  const Rows<T> seg_rows(seg, offsets[0]);
  // Rows of the result that are whole vectors take their products in place.
  const bool whole_rows = out.channel_stride == 1 && out.positions_lie_apart_by(channels) && channels == stride;
  const int64_t groups = partition.groups();
  std::vector<T> weight_sum(groups * hidden * stride);
  std::vector<double> bias_sum(groups * hidden), pool_sum(context.pool_weight ? groups * hidden : 0);

#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t group = 0; group < groups; ++group) {
    std::vector<T> tile(hidden ? kTile * stride : 0), result(hidden && !whole_rows ? kTile * stride : 0);
    std::vector<T> activations(kTile * hidden_stride), tile_bias(hidden_stride), pooled_share(hidden_stride);
    std::vector<T> constant(channels), slope(channels), centre(channels);
    for (int64_t index = partition.group_begin(group); index < partition.group_end(group); ++index) {
      const Range range = partition.range(index);
      const int64_t b = range.sample;
      const T* pooled_gradient = hidden ? gradient.pooled + b * hidden : nullptr;
      T pooled_dot = 0;  // dp . p, the softmax's share of the gradient of every logit
      if (hidden && context.pool_weight)
        for (int64_t j = 0; j < hidden; ++j) pooled_dot += pooled_gradient[j] * saved.pooled[b * hidden + j];
      // Through mean and variance: constant + slope * (value - mean); multiplied out it would cancel.
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t v = b * channels + c;
        slope[c] = gradient.variance ? T(2) * gradient.variance[v] / T(count) : T(0);
        centre[c] = gradient.variance ? saved.mean[v] : T(0);
        constant[c] = gradient.mean[v] / T(count);
      }

      for (int64_t j = 0; j < hidden; ++j) pooled_share[j] = pooled_gradient[j] / T(count);

      for (int64_t begin = range.begin; begin < range.end; begin += kTile) {
        const int64_t rows = std::min(kTile, range.end - begin);
        const T *value = seg.data + b * seg.batch_stride, *up = grad.data + b * grad.batch_stride;
        const T *factor = scale + b * channels, *add = constant.data(), *times = slope.data();
        const T* origin = centre.data();
        T* target = out.data + b * out.batch_stride;
        for_each_element(seg, grad, out, offsets, Range{b, begin, begin + rows},
                         [=](int64_t c, int64_t i, int64_t j, int64_t k) {
                           target[k] = up[j] * factor[c] + (add[c] + times[c] * (value[i] - origin[c]));
                         });
        if (gradient.edges)
          add_edge_gradient(seg, offsets[0], out, offsets[2], positions, b, begin, rows,
                            gradient.edges[b] / (T(channels) * T(count)));
        if (!hidden) continue;

        const Left<T> left = seg_rows.left(b, begin, rows, tile.data(), stride);
        const Right<T> by_channel{weight_by_channel.data(), hidden_stride};
        std::fill(tile_bias.begin(), tile_bias.end(), T(0));
        if (!context.pool_weight) {
          multiply(left, by_channel, rows, channels, hidden_stride,
                   ReLUGradient<T>{bias.data(), pooled_share.data(), activations.data(), hidden_stride,
                                   tile_bias.data()});
        } else {
          multiply(left, by_channel, rows, channels, hidden_stride,
                   StoreReLU<T>{bias.data(), activations.data(), hidden_stride});
          for (int64_t r = 0; r < rows; ++r) {
            T* active = activations.data() + r * hidden_stride;
            T logit = 0, dot = 0;
            for (int64_t j = 0; j < hidden; ++j) {
              logit += context.pool_weight[j] * active[j];
              dot += pooled_gradient[j] * active[j];
            }
            const T share = std::exp(logit - saved.log_sum_exp[b]);
            const T logit_gradient = share * (dot - pooled_dot);
            for (int64_t j = 0; j < hidden; ++j) pool_sum[group * hidden + j] += logit_gradient * active[j];
            for (int64_t j = 0; j < hidden; ++j) {
              const T through = share * pooled_gradient[j] + logit_gradient * context.pool_weight[j];
              active[j] = active[j] > T(0) ? through : T(0);
              tile_bias[j] += active[j];
            }
          }
        }
        for (int64_t j = 0; j < hidden; ++j) bias_sum[group * hidden + j] += tile_bias[j];

        // seg += activations W, and W's gradient += activations^T seg
        const Left<T> by_position{activations.data(), hidden_stride, 1};
        const Right<T> by_hidden{weight_rows.data(), stride};
        if (whole_rows) {
          multiply(by_position, by_hidden, rows, hidden, stride,
                   Store<T, true>{target + offsets[2][begin], channels});
        } else {
          multiply(by_position, by_hidden, rows, hidden, stride, Store<T, false>{result.data(), stride});
          add_tile(out, offsets[2], b, begin, rows, result.data(), stride);
        }
        multiply(Left<T>{activations.data(), 1, hidden_stride},
                 seg_rows.right(b, begin, rows, tile.data(), stride), hidden, rows, stride,
                 Store<T, true>{weight_sum.data() + group * hidden * stride, stride});
      }
    }
  }

#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t j = 0; j < hidden; ++j) {
    double bias = 0, pool = 0;
    std::vector<double> row(channels);
    for (int64_t group = 0; group < groups; ++group) {
      bias += bias_sum[group * hidden + j];
      if (context.pool_weight) pool += pool_sum[group * hidden + j];
      const T* part = weight_sum.data() + (group * hidden + j) * stride;
      for (int64_t c = 0; c < channels; ++c) row[c] += part[c];
    }
    context_gradient.bias[j] = T(bias);
    if (context.pool_weight) context_gradient.pool_weight[j] = T(pool);
    std::copy(row.begin(), row.end(), context_gradient.weight + j * channels);
  }
}

#define BTINET_INSTANTIATE(T)                                                                                 \
  template void statistics<T>(const View<const T>&, const Context<T>&, const Statistics<T>&, int);           \
  template void scale_channels<T>(const View<const T>&, const T*, const View<T>&, int);                      \
  template void interpolate<T>(const View<const T>&, const View<const T>&, const T*, const View<T>&, int);   \
  template void channel_dot<T>(const View<const T>&, const View<const T>&, T*, int);                         \
  template void statistics_backward<T>(const View<const T>&, const View<const T>&, const T*,                 \
                                       const Context<T>&, const Statistics<const T>&,                        \
                                       const StatisticsGradient<T>&, const View<T>&,                         \
                                       const ContextGradient<T>&, int);
BTINET_INSTANTIATE(float)
BTINET_INSTANTIATE(double)
#undef BTINET_INSTANTIATE

}  // namespace BTINET_ISA
}  // namespace btinet
