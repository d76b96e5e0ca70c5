// SIMD without intrinsics: the compilers' vector types. Every loop is compiled three times, for
// x86-64-v4 (AVX-512), v3 (AVX2) and the baseline; the processor chooses at run time. On other
// architectures there is only the baseline.
#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__) && defined(__GNUC__)
#define MOTET_X86 1
#define MOTET_INLINE inline __attribute__((always_inline))
#define MOTET_LAMBDA __attribute__((always_inline))
#else
#define MOTET_X86 0
#define MOTET_INLINE inline
#define MOTET_LAMBDA
#endif

namespace motet {

// A vector of N numbers. It should fill one register: the compilers keep larger ones in memory.
template <typename T, std::size_t N>
struct Lanes {
    typedef T type __attribute__((vector_size(N * sizeof(T))));
};

// The signed integer as wide as a number of a vector. Comparisons of vectors give vectors of these,
// with all bits set where true, else none.
template <typename T>
using Integer = std::conditional_t<sizeof(T) == 8, std::int64_t, std::int32_t>;

template <typename Pack>
MOTET_INLINE Pack square_root(Pack x) {
    Pack root;  // compilers turn the loop into one instruction
    for (std::size_t i = 0; i < sizeof(x) / sizeof(x[0]); ++i) root[i] = std::sqrt(x[i]);
    return root;
}

// Keeps the compiler from fusing a product with a sum into one rounding: for products that must be
// rounded alike in whichever order they are added.
template <typename Pack>
MOTET_INLINE Pack rounded(Pack x) {
#if MOTET_X86
    asm("" : "+v"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#endif
    return x;
}

// Returns whether any bit is set.
template <typename Pack>
MOTET_INLINE bool any(Pack x) {
    if constexpr (sizeof(Pack) > 16) {
        using Half = typename Lanes<std::int64_t, sizeof(Pack) / 16>::type;
        const auto halves = std::bit_cast<std::array<Half, 2>>(x);
        return any(halves[0] | halves[1]);
    } else {
        const auto words = std::bit_cast<std::array<std::int64_t, sizeof(Pack) / 8>>(x);
        std::int64_t all = 0;
        for (const auto word : words) all |= word;
        return all != 0;
    }
}

// Returns the numbers I... of a and b, those of b counted from N on: one shuffle instruction.
template <typename Pack, std::size_t... I>
MOTET_INLINE Pack picked(Pack a, Pack b, std::index_sequence<I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, I...);
#else
    using T = std::remove_reference_t<decltype(a[0])>;
    return __builtin_shuffle(a, b, typename Lanes<Integer<T>, sizeof...(I)>::type{I...});
#endif
}

// N complex numbers, loaded as 2 N numbers (re, im, re, im, ...) and separated into a vector of
// real parts and one of imaginary parts. AVX shuffles within 128 bits take one instruction, across
// them several: so parts stay within their 128 bits, and are not in the order of memory. together()
// restores it.
template <typename T, std::size_t N>
struct Parts {
    using Pack = typename Lanes<T, N>::type;
    static constexpr std::size_t group = N < 16 / sizeof(T) ? N : 16 / sizeof(T);

    Pack re, im;

    static MOTET_INLINE Parts load(const T* z) {
        Pack low, high;
        std::memcpy(&low, z, sizeof(Pack));
        std::memcpy(&high, z + N, sizeof(Pack));
        return [&]<std::size_t... I>(std::index_sequence<I...>) MOTET_LAMBDA {
            return Parts{picked(low, high, std::index_sequence<apart(I)...>()),
                         picked(low, high, std::index_sequence<apart(I) + 1 ...>())};
        }(std::make_index_sequence<N>());
    }

    MOTET_INLINE std::array<Pack, 2> together() const {
        return [&]<std::size_t... I>(std::index_sequence<I...>) MOTET_LAMBDA {
            return std::array<Pack, 2>{
                picked(re, im, std::index_sequence<joined(I, 0)...>()),
                picked(re, im, std::index_sequence<joined(I, group / 2)...>())};
        }(std::make_index_sequence<N>());
    }

  private:
    static constexpr std::size_t apart(std::size_t i) {
        const auto j = 2 * (i % group);
        return i / group * group + (j < group ? j : N + j - group);
    }
    static constexpr std::size_t joined(std::size_t i, std::size_t from) {
        return i / group * group + i % group / 2 + from + i % 2 * N;
    }
};

// Compiles Body::run<Bytes>(arguments...), an inline function written for registers of `Bytes`, for
// 64, 32 and 16 bytes; chosen() is the largest that the processor has. The environment variable
// MOTET_SIMD limits it, so that tests can run each.
template <typename Body, typename... Arguments>
struct Compiled {
    using Function = void (*)(Arguments...);
#if MOTET_X86
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))) static void v4(
        Arguments... arguments) {
        Body::template run<64>(arguments...);
    }
    __attribute__((target("avx2,fma"))) static void v3(Arguments... arguments) {
        Body::template run<32>(arguments...);
    }
#endif
    static void baseline(Arguments... arguments) { Body::template run<16>(arguments...); }

    static Function chosen() {
#if MOTET_X86
        static const Function function = [] {
            const char* set = std::getenv("MOTET_SIMD");
            const int cap = set ? std::atoi(set) : 64;
            if (cap >= 64 && __builtin_cpu_supports("avx512f") &&
                __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512vl"))
                return &v4;
            if (cap >= 32 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
                return &v3;
            return &baseline;
        }();
        return function;
#else
        return &baseline;
#endif
    }
};

}  // namespace motet
