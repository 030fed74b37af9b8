// The least of a test framework: CHECK counts and prints failures, main returns them.
#pragma once

#include <cstdio>
#include <stdexcept>
#include <string>

inline int check_failures = 0;

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      ++check_failures;                                                    \
    }                                                                      \
  } while (0)

// The statement throws Type with `text` in its message.
#define CHECK_THROWS(statement, Type, text)                                             \
  do {                                                                                  \
    std::string got = "nothing was thrown";                                             \
    try {                                                                               \
      statement;                                                                        \
    } catch (const Type& error) {                                                       \
      got = error.what();                                                               \
    }                                                                                   \
    if (got.find(text) == std::string::npos) {                                          \
      std::fprintf(stderr, "%s:%d: expected \"%s\" in: %s\n", __FILE__, __LINE__, text, \
                   got.c_str());                                                        \
      ++check_failures;                                                                 \
    }                                                                                   \
  } while (0)
