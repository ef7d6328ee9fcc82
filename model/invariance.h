// Changes of a model that leave its function as it was and make its weights easier to round or to cut: norm weights folded into
// the linears behind them, the residual stream and the values of each head rotated, channels scaled. Everything is merged into
// the weights, so the result is a plain model of the same family. Computed in double, stored in the parameter's type.
//
// What is legal follows from the shape of the family. Each change has a function `..._obstacle` that says why it is not legal
// for a model; empty = legal. Making an illegal change is a std::logic_error.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "model/transformer.h"

namespace kompakt {

// What a norm multiplies by, double [d]: weight, or 1 + weight (Gemma).
at::Tensor norm_gain(const Norm& norm);
void set_norm_gain(Norm& norm, const at::Tensor& gain);

// W <- W diag(gain) for every linear that reads a norm in front of attention or MLP, and for an untied head behind the final
// norm; the gain becomes 1. A tied head leaves the final norm alone: its matrix is the embedding as well. Norms over query
// and key heads (Qwen3, Gemma 3) and those behind attention and MLP (Gemma 3) are followed by no linear and stay.
// Illegal for post-norm models (BERT): what the norm puts out also goes on along the residual, which has no weight to take it.
// Returns the gains that were folded, by the norm's name.
std::string fold_obstacle(const ModelConfig& config);
std::map<std::string, at::Tensor> fold_norms(Transformer& model);

// A tied head gets a matrix of its own, equal to the embedding.
void untie_head(Transformer& model);

// x -> x R for the whole residual stream (R1 of SpinQuant): embedding, and everything that reads or writes the stream.
// `rotation` double [d,d], orthogonal. RMSNorm commutes with it only where its gain is one number, hence fold_norms first.
//
// With a tied head the final norm keeps its gain g (fold_norms), and E' = E R must serve at both ends: the logits stay what
// they were for all x only if R diag(g') R^T = diag(g), g' the new gain. So g' holds the same numbers as g in some order, and
// R maps channels onto channels of equal gain: with a constant g any R does, with d different numbers only signed
// permutations, which mix nothing. Moving g elsewhere does not help: the embedding would have to hold E diag(g) R for the head
// and E R for the input. So a tied head with a gain that is not constant must be untied first, or the stream stays.
// Illegal for Gemma 3, whose norms behind attention and MLP put a gain per channel between block and stream, and for BERT.
std::string residual_rotation_obstacle(const Transformer& model);
void rotate_residual(Transformer& model, const at::Tensor& rotation);

// v -> v R for every key/value head (R2): rows of the value projection, columns of the output projection for every query
// head of the group. Softmax mixes tokens, never channels, so it is legal in every family, biases included.
// `rotation(layer, head)` double [hd,hd].
void rotate_values(Transformer& model, const std::function<at::Tensor(std::int64_t layer, std::int64_t head)>& rotation);

}  // namespace kompakt
