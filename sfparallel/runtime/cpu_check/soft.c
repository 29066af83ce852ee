#include "soft.h"

const struct format half = { 11, 16 }, single = { 24, 32 }, twice = { 53, 64 };

static int bias(const struct format *format)
{
    return (1 << (format->bits - format->precision - 1)) - 1;
}

static uint64_t low_bits(unsigned n)
{
    return n >= 64 ? UINT64_MAX : (UINT64_C(1) << n) - 1;
}

struct number unpack(uint64_t bits, const struct format *format)
{
    unsigned fraction_bits = format->precision - 1;
    uint64_t fraction = bits & low_bits(fraction_bits);
    int exponent = (int)(bits >> fraction_bits & low_bits(format->bits - format->precision));
    struct number number = { .negative = bits >> (format->bits - 1) & 1 };
    if (exponent == 2 * bias(format) + 1) {
        number.class = fraction ? NOT_A_NUMBER : INFINITE;
        number.significand = fraction << (64 - fraction_bits);
    } else {
        number.significand = fraction | (exponent ? UINT64_C(1) << fraction_bits : 0);
        number.exponent = (exponent ? exponent : 1) - bias(format) - (int)fraction_bits;
    }
    return number;
}

/* significand / 2^shift, rounded. */
static uint64_t shifted(uint64_t significand, unsigned shift, bool negative, enum rounding rounding)
{
    if (shift == 0)
        return significand;
    uint64_t whole = shift < 64 ? significand >> shift : 0;
    bool at_least_half = shift <= 64 && significand >> (shift - 1) & 1;
    bool below = (significand & low_bits(shift - 1)) != 0;
    switch (rounding) {
    case NEAREST:
        return whole + (at_least_half && (below || (whole & 1)));
    case DOWN:
        return whole + (negative && (at_least_half || below));
    case UP:
        return whole + (!negative && (at_least_half || below));
    default:
        return whole;
    }
}

uint64_t pack(struct number number, const struct format *format, enum rounding rounding)
{
    unsigned fraction_bits = format->precision - 1;
    uint64_t sign = number.negative ? UINT64_C(1) << (format->bits - 1) : 0;
    uint64_t infinity = low_bits(format->bits - format->precision) << fraction_bits;
    if (number.class == INFINITE)
        return sign | infinity;
    if (number.class == NOT_A_NUMBER)
        return sign | infinity | UINT64_C(1) << (fraction_bits - 1) | number.significand >> (64 - fraction_bits);
    if (number.significand == 0)
        return sign;
    int zeros = __builtin_clzll(number.significand);
    uint64_t significand = number.significand << zeros;
    int exponent = number.exponent - zeros + 63; /* of the first bit */
    int lowest = 1 - bias(format);
    unsigned drop = 64 - format->precision + (exponent < lowest ? (unsigned)(lowest - exponent) : 0);
    uint64_t kept = shifted(significand, drop, number.negative, rounding);
    /* A carry out of the significand goes into the exponent, where it belongs. */
    uint64_t field = exponent < lowest ? 0 : (uint64_t)(exponent - lowest);
    uint64_t bits = (field << fraction_bits) + kept;
    if (bits >= infinity || exponent > bias(format)) {
        bool to_infinity = rounding == NEAREST || (rounding == UP && !number.negative) || (rounding == DOWN && number.negative);
        return sign | (to_infinity ? infinity : infinity - 1);
    }
    return sign | bits;
}

struct number from_integer(int64_t value)
{
    return (struct number){ .negative = value < 0, .significand = value < 0 ? -(uint64_t)value : (uint64_t)value };
}

int64_t to_integer(struct number number, unsigned bits, enum rounding rounding)
{
    int64_t indefinite = -(int64_t)(low_bits(bits - 1)) - 1;
    uint64_t whole = number.significand;
    if (number.class != FINITE)
        return indefinite;
    if (number.exponent < 0) {
        whole = shifted(whole, (unsigned)-number.exponent, number.negative, rounding);
    } else if (whole != 0) {
        if (number.exponent > __builtin_clzll(whole))
            return indefinite;
        whole <<= number.exponent;
    }
    if (whole > low_bits(bits - 1) + number.negative)
        return indefinite;
    return (int64_t)(number.negative ? -whole : whole);
}

uint64_t to_integral(uint64_t bits, const struct format *format, enum rounding rounding)
{
    struct number number = unpack(bits, format);
    if (number.class == FINITE && number.exponent < 0) {
        number.significand = shifted(number.significand, (unsigned)-number.exponent, number.negative, rounding);
        number.exponent = 0;
    }
    return pack(number, format, NEAREST);
}
