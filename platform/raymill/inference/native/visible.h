// What Python calls by name: C functions that leave the library.
#pragma once
#define RAYMILL_VISIBLE extern "C" __attribute__((visibility("default")))
