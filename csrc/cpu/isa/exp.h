// exp on a vector of floats, for sets that can round and scale by a power of two.
#pragma once

namespace m3oe {
namespace {

// 2^n p(r) with |r| <= ln(2) / 2 and p of degree 6: about 1 ulp on [-87.3, 88], clamped outside. NaN stays NaN, as it
// is the second operand of min and max.
template <class S>
inline typename S::Reg exp_by_parts(typename S::Reg v) {
  v = S::min(S::set1(88.0f), S::max(S::set1(-87.3f), v));
  const auto n = S::round(S::mul(v, S::set1(1.44269504088896341f)));
  // ln(2) in two parts, the first exact in few bits, so that n * ln(2) loses nothing.
  auto r = S::fma(n, S::set1(-0.693359375f), v);
  r = S::fma(n, S::set1(2.12194440e-4f), r);
  constexpr float kTaylor[] = {8.3333333e-3f, 4.1666667e-2f, 1.6666667e-1f, 0.5f, 1.0f, 1.0f};
  auto p = S::set1(1.3888889e-3f);
  for (const float coefficient : kTaylor) p = S::fma(p, r, S::set1(coefficient));
  return S::scale(p, n);
}

}  // namespace
}  // namespace m3oe
