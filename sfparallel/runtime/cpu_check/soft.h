/* Binary floating point in integers (IEEE 754): conversions and roundings that use no instruction for floating point. */
#ifndef SF_SOFT_H
#define SF_SOFT_H

#include <stdbool.h>
#include <stdint.h>

struct format {
    unsigned precision;      /* bits of the significand, the hidden one included */
    unsigned bits;           /* of the whole number */
};

extern const struct format half, single, twice;

/* Values as in MXCSR.RC and in the immediates of roundings. */
enum rounding { NEAREST, DOWN, UP, TRUNCATE };

/* A number: significand * 2^exponent, or one of the others. */
struct number {
    enum { FINITE, INFINITE, NOT_A_NUMBER } class;
    bool negative;
    int exponent;
    uint64_t significand;    /* of a NaN: its bits below the exponent, at the left end */
};

struct number unpack(uint64_t bits, const struct format *format);

/* The nearest number of that format; NaN become quiet. */
uint64_t pack(struct number number, const struct format *format, enum rounding rounding);

static inline uint64_t convert(uint64_t bits, const struct format *from, const struct format *to, enum rounding rounding)
{
    return pack(unpack(bits, from), to, rounding);
}

struct number from_integer(int64_t value);

/* To a signed integer of so many bits; what does not fit, or is no number, gives the most negative one. */
int64_t to_integer(struct number number, unsigned bits, enum rounding rounding);

/* To an integer in the same format. */
uint64_t to_integral(uint64_t bits, const struct format *format, enum rounding rounding);

#endif
