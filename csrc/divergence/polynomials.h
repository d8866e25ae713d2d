// Minimax polynomials of the elementary functions, for every processor's Math. constexpr arrays: with constant indices
// they become immediates.
#pragma once

namespace kdkernels {

// 2^f = 1 + f·P(f) on |f| <= 1/2: minimax of relative error 1e-8 in P.
constexpr float kExp2[] = {0.693147188f, 0.2402264979f, 0.0555035722f, 0.009618237929f, 0.001339084985f, 0.0001540351233f};
// 2^f = 1 + f·P(f) on |f| <= 1/32: minimax of relative error 2e-9.
constexpr float kExp2Short[] = {0.69314718f, 0.24023429f, 0.055502135f};
constexpr float kSixteenths[] = {1.0f, 1.04427373f, 1.09050775f, 1.13878858f, 1.18920708f, 1.24185777f, 1.29683959f, 1.35425556f,
                                1.41421354f, 1.47682619f, 1.54221082f, 1.61049032f, 1.68179286f, 1.75625217f, 1.8340081f, 1.91520655f};  // 2^(i/16)
// e^r = 1 + r + r²·Q(r) on |r| <= ln(2)/2: minimax of relative error 3e-9, so that e^r - 1 - r keeps its digits.
constexpr float kExp[] = {0.5000000013f, 0.1666666653f, 0.04166646513f, 0.00833336077f, 0.001393364232f, 0.000198578155f};
// log(1 + f) = f - f²·P(f) on sqrt(1/2) <= 1 + f <= sqrt(2): minimax of relative error 5e-8.
constexpr float kLog[] = {0.4999999764f, -0.3333332535f, 0.2500077885f, -0.200016369f, 0.1662708818f,
                          -0.1419612602f, 0.1311407334f, -0.1277750379f, 0.07778153897f};

}  // namespace kdkernels
