// The kernels of planted.cu, by name, each with one block of `size` threads.
#pragma once

#include <string>

void planted(const std::string& name, float* out, int size);
