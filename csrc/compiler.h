// What compilers spell differently, in one place; all else is the same for GCC and clang.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)  // clang defines both
#define RETRO_X86 1
#endif

#define RETRO_PRAGMA(text) _Pragma(#text)

// GCC's own headers leave registers unset on purpose (`_mm512_undefined_ps`) and are warned of at each use of them.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

// Functions between the two are compiled for a processor that has `features`.
#ifdef __clang__
#define RETRO_TARGET_BEGIN(features) RETRO_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define RETRO_TARGET_END RETRO_PRAGMA(clang attribute pop)
#else
#define RETRO_TARGET_BEGIN(features) RETRO_PRAGMA(GCC push_options) RETRO_PRAGMA(GCC target(features))
#define RETRO_TARGET_END RETRO_PRAGMA(GCC pop_options)
#endif

// The loop that follows, `times` over.
#ifdef __clang__
#define RETRO_UNROLL(times) RETRO_PRAGMA(clang loop unroll_count(times))
#else
#define RETRO_UNROLL(times) RETRO_PRAGMA(GCC unroll times)
#endif

// The lanes of a, then of b, by constant numbers, as many as `integers` has.
#ifdef __clang__
#define RETRO_SHUFFLE(integers, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define RETRO_SHUFFLE(integers, a, b, ...) __builtin_shuffle(a, b, integers{__VA_ARGS__})
#endif

// In asm, a float that is read and written: in its register, or in memory.
#ifdef RETRO_X86
#define RETRO_FLOAT_REGISTER "+x"
#elif defined(__aarch64__)
#define RETRO_FLOAT_REGISTER "+w"
#else
#define RETRO_FLOAT_REGISTER "+m"
#endif

// A copy of the function for each of these instruction sets, chosen when the library is loaded.
#if defined(RETRO_X86) && defined(__gnu_linux__) && __has_attribute(target_clones)
#define RETRO_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define RETRO_CLONES
#endif
