#include "layout.h"

#include <algorithm>

namespace m3oe {
namespace {

// Hands out aligned ranges of one buffer.
class Carver {
 public:
  int64_t take(int64_t elements) {
    constexpr int64_t kAlign = 16;  // a cache line of float
    const int64_t at = used_;
    used_ += (elements + kAlign - 1) / kAlign * kAlign;
    return at;
  }
  int64_t used() const { return used_; }

 private:
  int64_t used_ = 0;
};

}  // namespace

Layout::Layout(const NetworkShape& shape, int64_t lanes, const OperandFormat& format, int64_t element_size,
               int64_t tile_rows, bool backward)
    : size{}, pack{}, grad{}, tile{}, lanes_(lanes), line_(64 / element_size) {
  size.format = format;
  plan_size(shape);
  plan_pack(backward);
  if (backward) plan_grad();
  plan_tile(tile_rows, backward);
}

int64_t Layout::stride(int64_t n) const {
  int64_t lines = (padded(n) + line_ - 1) / line_;
  if (lines % 2 == 0) ++lines;
  return lines * line_;
}

void Layout::plan_size(const NetworkShape& s) {
  const int64_t depth = static_cast<int64_t>(s.widths.size()) - 1;
  size.inputs = s.inputs;
  size.hidden = s.widths.front();
  size.domains = s.domains;
  size.tasks = s.tasks;
  size.experts = s.experts;
  size.gated = s.gated;
  size.width = s.widths.back();
  size.tower = s.tower;
  size.representation = s.representation;
  size.star_linear = s.star_linear;
  size.gate_detach = s.gate_detach;
  size.masked = s.masked;
  size.table_grad = s.table_grad;
  size.inputs_pad = padded(size.inputs);
  size.hidden_pad = padded(size.hidden);
  size.gates_pad = padded(size.tasks * size.gated);
  size.width_pad = expert_padded(size.width);
  size.tower_pad = padded(size.tower);
  size.ld_input = stride(size.inputs);
  size.ld_hidden = size.representation ? stride(size.hidden) : size.ld_input;
  size.ld_gate = size.gates_pad;
  size.ld_width = stride(size.tasks * size.width_pad);
  size.ld_tower = stride(size.tasks * size.tower_pad);
  size.depth = depth;
  for (int64_t l = 0; l < depth; ++l) {
    const int64_t out_pad = expert_padded(s.widths[l + 1]);
    layer_sizes_.push_back({s.widths[l], s.widths[l + 1], out_pad, stride(s.experts * out_pad)});
  }
  size.layers = layer_sizes_.data();
}

void Layout::plan_pack(bool backward) {
  const NetworkSize& s = size;
  Carver common;
  const int64_t rep = s.representation ? 1 : 0;
  const int64_t back = backward ? 1 : 0;
  for (int64_t* vector : {&pack.star_gain, &pack.star_offset, &pack.skip_bias, &pack.skip_gain, &pack.skip_offset}) {
    *vector = common.take(rep * s.hidden_pad);
  }
  pack.skip_weight = common.take(rep * packed(s.inputs, s.hidden_pad));
  pack.skip_weight_t = common.take(rep * back * packed(s.hidden, s.inputs_pad));
  for (int64_t l = 0; l < s.depth; ++l) {
    const LayerSize& layer = s.layers[l];
    LayerOffsets offsets{};
    offsets.weight = common.take(s.experts * packed(layer.in, layer.out_pad));
    // The first layer of all experts is one matrix; deeper ones are one matrix per expert.
    const int64_t transposed = l == 0 ? packed(s.experts * layer.out_pad, s.hidden_pad)
                                      : s.experts * packed(layer.out, s.layers[l - 1].out_pad);
    offsets.weight_t = common.take(back * transposed);
    offsets.bias = common.take(s.experts * layer.out_pad);
    offsets.gain = common.take(s.experts * layer.out_pad);
    offsets.offset = common.take(s.experts * layer.out_pad);
    pack_layers_.push_back(offsets);
  }
  pack.layers = pack_layers_.data();
  pack.common_size = common.used();

  Carver own;
  pack.star_weight = own.take(rep * packed(s.inputs, s.hidden_pad));
  pack.star_weight_t = own.take(rep * back * packed(s.hidden, s.inputs_pad));
  pack.star_bias = own.take(rep * s.hidden_pad);
  pack.gate_weight = own.take(packed(s.hidden, s.gates_pad));
  pack.gate_weight_t = own.take(back * packed(s.tasks * s.gated, s.hidden_pad));
  pack.gate_bias = own.take(s.gates_pad);
  pack.gate_mask = own.take(s.tasks * s.gated);
  pack.table = own.take(s.tasks * s.experts);
  pack.used = own.take(s.experts + 2);
  pack.tower_weight = own.take(s.tasks * packed(s.width, s.tower_pad));
  pack.tower_weight_t = own.take(back * s.tasks * packed(s.tower, s.width_pad));
  pack.tower_vectors = own.take(s.tasks * 4 * s.tower_pad);
  pack.head_bias = own.take(s.tasks);
  pack.domain_size = own.used();
}

void Layout::plan_grad() {
  const NetworkSize& s = size;
  const int64_t rep = s.representation ? 1 : 0;
  Carver common;
  for (int64_t* vector : {&grad.star_gain, &grad.star_offset, &grad.skip_bias, &grad.skip_gain, &grad.skip_offset}) {
    *vector = common.take(rep * s.hidden_pad);
  }
  grad.skip_weight = common.take(rep * s.inputs * s.hidden_pad);
  for (int64_t l = 0; l < s.depth; ++l) {
    const LayerSize& layer = s.layers[l];
    LayerOffsets offsets{};
    offsets.weight = common.take(s.experts * layer.in * layer.out_pad);
    offsets.bias = common.take(s.experts * layer.out_pad);
    offsets.gain = common.take(s.experts * layer.out_pad);
    offsets.offset = common.take(s.experts * layer.out_pad);
    grad_layers_.push_back(offsets);
  }
  grad.layers = grad_layers_.data();
  grad.common_size = common.used();

  Carver own;
  grad.star_weight = own.take(rep * s.inputs * s.hidden_pad);
  grad.star_bias = own.take(rep * s.hidden_pad);
  grad.gate_weight = own.take(s.hidden * s.gates_pad);
  grad.gate_bias = own.take(s.gates_pad);
  grad.table = own.take(s.tasks * s.experts);
  grad.tower_weight = own.take(s.tasks * s.width * s.tower_pad);
  grad.tower_vectors = own.take(s.tasks * 4 * s.tower_pad);
  grad.head_bias = own.take(s.tasks);
  grad.domain_size = own.used();
}

void Layout::plan_tile(int64_t tile_rows, bool backward) {
  const NetworkSize& s = size;
  const int64_t rows = round_up(tile_rows, s.format.row_align);
  Carver c;
  const int64_t hidden = s.representation ? rows * s.ld_hidden : 0;
  const int64_t kept = backward ? rows : 0;
  tile.x = c.take(rows * s.ld_input);
  tile.star_hat = c.take(hidden);
  tile.star_rstd = c.take(kept);
  tile.skip_hat = c.take(hidden);
  tile.skip_rstd = c.take(kept);
  tile.r = s.representation ? c.take(hidden) : tile.x;
  int64_t widest = 0;
  for (int64_t l = 0; l < s.depth; ++l) {
    const int64_t ld = s.layers[l].ld;
    widest = std::max(widest, ld);
    LayerBuffers buffers{};
    buffers.hat = c.take(rows * ld);
    buffers.out = c.take(kept * ld);
    buffers.rstd = c.take(kept * s.experts);
    tile_layers_.push_back(buffers);
  }
  tile.layers = tile_layers_.data();
  tile.gate = c.take(rows * s.ld_gate);
  tile.coef = c.take(rows * s.tasks * s.experts);
  tile.u = c.take(rows * s.ld_width);
  tile.tower_hat = c.take(rows * s.ld_tower);
  tile.tower_rstd = c.take(kept * s.tasks);
  tile.h = c.take(kept * s.ld_tower);
  tile.logit = c.take(rows * s.tasks);
  tile.d_logit = c.take(kept * s.tasks);
  tile.d_h = c.take(kept * s.ld_tower);
  tile.d_u = c.take(kept * s.ld_width);
  tile.d_coef = c.take(backward ? s.tasks * s.experts : 0);
  int64_t sums = std::max({4 * s.tower_pad, s.tasks * s.experts, s.gates_pad, 6 * s.hidden_pad});
  for (int64_t l = 0; l < s.depth; ++l) sums = std::max(sums, 3 * s.layers[l].out_pad);
  tile.d_sums = c.take(backward ? sums : 0);
  tile.d_gate = c.take(kept * s.ld_gate);
  for (int64_t& d_z : tile.d_z) d_z = c.take(kept * widest);
  tile.d_r = c.take(kept * s.ld_hidden);
  tile.d_star = c.take(backward ? hidden : 0);
  tile.d_skip = c.take(backward ? hidden : 0);
  tile.d_x = s.representation ? c.take(kept * s.ld_input) : tile.d_r;
  // An operand is the rows or the row pairs of one buffer, rounded up to whole blocks of 32 rows and 32 columns; the
  // left one of a sum over rows also transposed.
  const int64_t widest_buffer = std::max({widest, s.ld_input, s.ld_hidden, s.ld_gate, s.ld_width, s.ld_tower}) + 32;
  const bool converts = s.format.operand != Operand::kElement;
  for (int64_t& operand : tile.operand) {
    operand = c.take(converts ? 2 * planes(s.format.operand) * round_up(rows, 32) / 2 * widest_buffer : 0);
  }
  tile.size = c.used();
}

}  // namespace m3oe
