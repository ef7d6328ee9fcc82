// The searches behind KQuant::fit (kquant.h), one per type.
#pragma once

namespace kompakt {

float kquant_fit_q2(const float* w, const float* importance, float* scales, float* offsets);
float kquant_fit_q3(const float* w, const float* importance, float* scales, float* offsets);
float kquant_fit_q4(const float* w, const float* importance, float* scales, float* offsets);
float kquant_fit_q5(const float* w, const float* importance, float* scales, float* offsets);
float kquant_fit_q6(const float* w, const float* importance, float* scales, float* offsets);
float kquant_fit_iq4(const float* w, const float* importance, float* scales, float* offsets);

}  // namespace kompakt
