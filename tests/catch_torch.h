// Catch2 beside torch: c10's logging header defines a CHECK of its own that aborts the whole program at the first failure.
// Include this in every test that includes a torch header; the order does not matter.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Logging.h>
#undef CHECK
#include <catch2/catch.hpp>
#ifndef CHECK  // catch.hpp came first and its CHECK was replaced
#define CHECK(...) INTERNAL_CATCH_TEST("CHECK", Catch::ResultDisposition::ContinueOnFailure, __VA_ARGS__)
#endif
