// Minimax polynomials of the elementary functions, for every processor's Math. constexpr arrays: with constant indices
// they become immediates.
#pragma once

namespace kdkernels {

// 2^f = 1 + f·P(f) on |f| <= 1/2: minimax of relative error 1e-8 in P.
constexpr float kExp2[] = {0.693147188f, 0.2402264979f, 0.0555035722f, 0.009618237929f, 0.001339084985f, 0.0001540351233f};
// e^r = 1 + r + r²·Q(r) on |r| <= ln(2)/2: minimax of relative error 3e-9, so that e^r - 1 - r keeps its digits.
constexpr float kExp[] = {0.5000000013f, 0.1666666653f, 0.04166646513f, 0.00833336077f, 0.001393364232f, 0.000198578155f};
// log(1 + f) = f - f²·P(f) on sqrt(1/2) <= 1 + f <= sqrt(2): minimax of relative error 5e-8.
constexpr float kLog[] = {0.4999999764f, -0.3333332535f, 0.2500077885f, -0.200016369f, 0.1662708818f,
                          -0.1419612602f, 0.1311407334f, -0.1277750379f, 0.07778153897f};

}  // namespace kdkernels
