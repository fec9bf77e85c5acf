#include "program.h"

#include <algorithm>
#include <stdexcept>

namespace toptwo {

void Program::add(InstructionPtr instruction) {
  scratch_bytes_ = std::max(scratch_bytes_, round_up(instruction->scratch_bytes(max_tokens_), 64));
  own_floats_ = std::max(own_floats_, round_up(instruction->own_floats(), 16));
  instructions_.push_back(std::move(instruction));
}

void Program::run(Step& step) {
  if (step.num_tokens > max_tokens_ || step.num_selected > max_tokens_)
    throw std::invalid_argument("the step is larger than the recorded one");
  step.cut_tiles();
  // A resize after recording; pages that small steps never touch are never made resident.
  size_t bytes = size_t(scratch_bytes_ + own_floats_ * 4 * team_.size() + 64);
  if (scratch_.size() < bytes) scratch_.resize(bytes);
  uint8_t* scratch = reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<int64_t>(scratch_.data()), 64));
  float* own = reinterpret_cast<float*>(scratch + scratch_bytes_);
  team_.run([&](Team::Member& member) {
    Instruction::Context context{step, kernels_, member, scratch, own + own_floats_ * member.index()};
    for (const InstructionPtr& instruction : instructions_) instruction->run(context);
  });
}

}  // namespace toptwo
