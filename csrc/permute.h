// unpermute for other kernels. See moe_engine/ops/permute.
#pragma once

#include <ATen/core/Tensor.h>

namespace moe_engine {

// y[t] = sum of rows[row_of[t, .]]; the second argument is not read.
at::Tensor unpermute(const at::Tensor& rows, const at::Tensor& assignment_of_row, const at::Tensor& row_of);

}  // namespace moe_engine
