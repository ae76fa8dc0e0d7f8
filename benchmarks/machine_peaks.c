/* Loops for machine_peaks.py: multiply-accumulates that touch registers only, and a streaming read.
 *
 * Each rate_* function runs `rounds` rounds of independent chains, enough of them to hide the latency of one
 * instruction, and returns how many operations it did; a multiply and an add count as two.  It returns 0 where the
 * compiler was not told of the instruction or the system does not allow it.
 */
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AMX_TILE__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* Registers hold the chains and two operands. */
#if defined(__AVX512F__)
#define BYTES 64
#define CHAINS 24
#elif defined(__AVX__)
#define BYTES 32
#define CHAINS 12
#elif defined(__aarch64__)
#define BYTES 16
#define CHAINS 24
#else
#define BYTES 16
#define CHAINS 12
#endif

typedef float vector __attribute__((vector_size(BYTES)));
typedef float unaligned_vector __attribute__((vector_size(BYTES), aligned(4)));

/* The asm keeps a value in a register and its chain alive. */
#if defined(__x86_64__)
#define KEEP(x) __asm__ volatile("" : "+v"(x))
#else
#define KEEP(x) __asm__ volatile("" : "+w"(x))
#endif

double rate_f32(long rounds)
{
    vector chain[CHAINS], factor, term;
    for (int lane = 0; lane < BYTES / 4; ++lane) {
        factor[lane] = 0.999f;
        term[lane] = 0.001f * lane;
    }
    KEEP(factor);
    KEEP(term);
#pragma GCC unroll 32
    for (int i = 0; i < CHAINS; ++i) {
        chain[i] = term;
        KEEP(chain[i]); /* or the compiler sees equal chains and keeps one of them */
    }
    for (long round = 0; round < rounds; ++round) {
#pragma GCC unroll 32
        for (int i = 0; i < CHAINS; ++i)
            chain[i] = chain[i] * factor + term; /* contracted to one instruction by -ffp-contract=fast */
    }
#pragma GCC unroll 32
    for (int i = 0; i < CHAINS; ++i)
        KEEP(chain[i]);
    return 2.0 * (BYTES / 4) * CHAINS * rounds;
}

/* An instruction on 64-byte registers that multiplies `products` pairs a lane and adds them to 16 lanes. */
#define RATE_512(name, type, zero, instruction, products)                                                             \
    double name(long rounds)                                                                                          \
    {                                                                                                                 \
        type chain[24];                                                                                               \
        __m512i left = _mm512_set1_epi32(0x3c003c00), right = left;                                                   \
        KEEP(left);                                                                                                   \
        KEEP(right);                                                                                                  \
        _Pragma("GCC unroll 32") for (int i = 0; i < 24; ++i)                                                         \
        {                                                                                                             \
            chain[i] = zero();                                                                                        \
            KEEP(chain[i]);                                                                                           \
        }                                                                                                             \
        for (long round = 0; round < rounds; ++round) {                                                               \
            _Pragma("GCC unroll 32") for (int i = 0; i < 24; ++i) chain[i] = instruction(chain[i], left, right);      \
        }                                                                                                             \
        _Pragma("GCC unroll 32") for (int i = 0; i < 24; ++i) KEEP(chain[i]);                                         \
        return 2.0 * 16 * products * 24 * rounds;                                                                     \
    }
#define ABSENT(name)                                                                                                  \
    double name(long rounds)                                                                                          \
    {                                                                                                                 \
        (void)rounds;                                                                                                 \
        return 0;                                                                                                     \
    }

#if defined(__AVX512BF16__)
#define DOT_BF16(sum, left, right) _mm512_dpbf16_ps(sum, (__m512bh)(left), (__m512bh)(right))
RATE_512(rate_bf16_avx512, __m512, _mm512_setzero_ps, DOT_BF16, 2)
#else
ABSENT(rate_bf16_avx512)
#endif

#if defined(__AVX512VNNI__)
RATE_512(rate_int8_avx512, __m512i, _mm512_setzero_si512, _mm512_dpbusd_epi32, 4)
#else
ABSENT(rate_int8_avx512)
#endif

#if defined(__AMX_TILE__)
/* Tiles 0 to 3 are sums of 16 x 16, 4 and 5 the left operands, 6 and 7 the right ones, all of 16 rows of 64 bytes. */
static int configure_tiles(void)
{
    struct __attribute__((packed)) {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config;
    const long request_permission = 0x1023, tile_data = 18; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA */
    if (syscall(SYS_arch_prctl, request_permission, tile_data) != 0)
        return 0;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
        config.row_bytes[i] = 64;
        config.rows[i] = 16;
    }
    __asm__ volatile("" : : "r"(&config) : "memory"); /* GCC's intrinsic says it reads 8 bytes; it reads them all */
    _tile_loadconfig(&config);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    return 1;
}
#define RATE_AMX(name, instruction, products)                                                                         \
    double name(long rounds)                                                                                          \
    {                                                                                                                 \
        if (!configure_tiles())                                                                                       \
            return 0;                                                                                                 \
        for (long round = 0; round < rounds; ++round) {                                                               \
            instruction(0, 4, 6);                                                                                     \
            instruction(1, 4, 7);                                                                                     \
            instruction(2, 5, 6);                                                                                     \
            instruction(3, 5, 7);                                                                                     \
        }                                                                                                             \
        _tile_release();                                                                                              \
        return 2.0 * 4 * 16 * 16 * 16 * products * rounds;                                                            \
    }
#endif

#if defined(__AMX_BF16__)
RATE_AMX(rate_bf16_amx, _tile_dpbf16ps, 2)
#else
ABSENT(rate_bf16_amx)
#endif

#if defined(__AMX_INT8__)
RATE_AMX(rate_int8_amx, _tile_dpbusd, 4)
#else
ABSENT(rate_int8_amx)
#endif

/* Read `count` floats once; returns how many bytes that were. */
double stream_read(const float *data, long count)
{
    vector sum[8] = {{0}};
    const long step = 8 * (BYTES / 4);
    for (long at = 0; at + step <= count; at += step) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i)
            sum[i] += *(const unaligned_vector *)(data + at + i * (BYTES / 4));
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
        KEEP(sum[i]);
    return 4.0 * count;
}
