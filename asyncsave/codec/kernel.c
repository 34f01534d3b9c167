/* The byte planes of planes.py, in one pass over the chunk. What each coding means is written there,
 * and tests compare the two on every byte; here is only how it is done at the speed of memory.
 *
 * Plain C, in loops that compilers vectorise: few streams each, no branch. On x86-64 every entry is
 * compiled for several instruction sets, of which the dynamic linker picks one when the library is
 * loaded; elsewhere there is one version (every aarch64 has NEON).
 *
 * No entry checks a length: kernel.py does, and is the only caller. Nothing is allocated, and no
 * address needs to be aligned.
 */

#include <stddef.h>
#include <stdint.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "chunks are little endian"
#endif

#if defined(__x86_64__) && defined(__linux__) && !defined(ASYNCSAVE_ONE_CPU)
#define FOR_EACH_CPU __attribute__((target_clones("arch=skylake-avx512", "avx2", "default")))
#else
#define FOR_EACH_CPU
#endif
#define ENTRY FOR_EACH_CPU __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

typedef uint8_t u8;
/* wherever they lie */
typedef uint16_t u16 __attribute__((aligned(1), may_alias));
typedef uint32_t u32 __attribute__((aligned(1), may_alias));
typedef uint64_t u64 __attribute__((aligned(1), may_alias));

enum { BLOCK = 2048 }; /* elements: what two loops hand on stays in the first-level cache */

/* -- exp16 and exp32: see planes.py ------------------------------------------------------------ */

enum { PIECES = 16, PIECE = 1024 }; /* as planes._base samples them */

/* What to add to the exponents: the first of the best, as planes._base chooses. */
static int choose_base(const u8 *bytes, size_t n, size_t width)
{
	size_t pieces = PIECES, piece = PIECE, stride = n / PIECES;
	int64_t counts[256] = {0}, best = -1;
	int base = 0;

	if (n < (size_t)PIECES * PIECE) {
		pieces = 1;
		piece = n;
	}
	for (size_t p = 0; p < pieces; p++)
		for (size_t i = 0; i < piece; i++) {
			const u8 *high = bytes + (p * stride + i + 1) * width - 2;
			counts[(*(const u16 *)high >> 7) & 255]++;
		}
	for (int b = 0; b < 16; b++) {
		int64_t sum = 0;
		for (int nibble = 0; nibble < 16; nibble++) {
			int64_t share = 0;
			for (int rest = 0; rest < 16; rest++)
				share += counts[(16 * nibble + rest - b) & 255];
			sum += share * share;
		}
		if (sum > best) {
			best = sum;
			base = b;
		}
	}
	return base;
}

/* A half rotated left by one bit: its low byte is mantissa * 2 + sign, its high byte the exponent. */
INLINE uint16_t rotated(uint16_t half)
{
	return (uint16_t)(half << 1 | half >> 15);
}

/* The half that these were made of. */
INLINE uint16_t half_of(u8 sign_mantissa, u8 exponent)
{
	return (uint16_t)(sign_mantissa << 15 | exponent << 7 | sign_mantissa >> 1);
}

/* The planes of pairs of halves, one of each from the two halves of a chunk. */
INLINE void split_pairs(const u16 *restrict first, const u16 *restrict second,
			u8 *restrict first_sm, u8 *restrict second_sm, u8 *restrict mixed,
			u8 *restrict rests, size_t count, u8 base)
{
	for (size_t i = 0; i < count; i++) {
		uint16_t a = rotated(first[i]), b = rotated(second[i]);
		u8 s = (u8)((a >> 8) + base), t = (u8)((b >> 8) + base);
		first_sm[i] = (u8)a;
		second_sm[i] = (u8)b;
		mixed[i] = (u8)(t << 4 | (s & 15));
		rests[i] = (u8)((t & 0xf0) | s >> 4);
	}
}

INLINE void split_words(const u32 *restrict words, u16 *restrict low, uint16_t *restrict high,
			size_t count)
{
	for (size_t i = 0; i < count; i++) {
		low[i] = (uint16_t)words[i];
		high[i] = (uint16_t)(words[i] >> 16);
	}
}

ENTRY int asyncsave_split_exp16(const u8 *restrict raw, u8 *restrict out, size_t n)
{
	const u16 *halves = (const u16 *)raw;
	const size_t half = n / 2, second = n - half;
	u8 *sm = out, *mixed = out + n, *rests = mixed + second;
	const int base = choose_base(raw, n, 2);

	split_pairs(halves, halves + second, sm, sm + second, mixed, rests, half, (u8)base);
	if (second > half) {
		uint16_t a = rotated(halves[half]);
		sm[half] = (u8)a;
		mixed[half] = (u8)((a >> 8) + base);
	}
	return base;
}

ENTRY int asyncsave_split_exp32(const u8 *restrict raw, u8 *restrict out, size_t n)
{
	const u32 *words = (const u32 *)raw;
	const size_t half = n / 2, second = n - half;
	u16 *low = (u16 *)out;
	u8 *sm = out + 2 * n, *mixed = sm + n, *rests = mixed + second;
	const int base = choose_base(raw, n, 4);

	for (size_t i = 0; i < half; i += BLOCK) {
		const size_t count = half - i < BLOCK ? half - i : BLOCK;
		uint16_t a[BLOCK], b[BLOCK];
		split_words(words + i, low + i, a, count);
		split_words(words + second + i, low + second + i, b, count);
		split_pairs(a, b, sm + i, sm + second + i, mixed + i, rests + i, count, (u8)base);
	}
	if (second > half) {
		uint16_t a = rotated((uint16_t)(words[half] >> 16));
		low[half] = (uint16_t)words[half];
		sm[half] = (u8)a;
		mixed[half] = (u8)((a >> 8) + base);
	}
	return base;
}

ENTRY void asyncsave_join_exp16(const u8 *restrict sm, const u8 *restrict mixed,
				const u8 *restrict rests, u8 *restrict out, size_t n, int base)
{
	const size_t half = n / 2, second = n - half;
	u16 *restrict halves = (u16 *)out;

	for (size_t i = 0; i < half; i++) {
		u8 s = (u8)(rests[i] << 4 | (mixed[i] & 15));
		u8 t = (u8)((rests[i] & 0xf0) | mixed[i] >> 4);
		halves[i] = half_of(sm[i], (u8)(s - base));
		halves[second + i] = half_of(sm[second + i], (u8)(t - base));
	}
	if (second > half)
		halves[half] = half_of(sm[half], (u8)(mixed[half] - base));
}

ENTRY void asyncsave_join_exp32(const u8 *restrict low_bytes, const u8 *restrict sm,
				const u8 *restrict mixed, const u8 *restrict rests,
				u8 *restrict out, size_t n, int base)
{
	const size_t half = n / 2, second = n - half;
	const u16 *restrict low = (const u16 *)low_bytes;
	u32 *restrict words = (u32 *)out;

	for (size_t i = 0; i < half; i++) {
		u8 s = (u8)(rests[i] << 4 | (mixed[i] & 15));
		u8 t = (u8)((rests[i] & 0xf0) | mixed[i] >> 4);
		words[i] = low[i] | (uint32_t)half_of(sm[i], (u8)(s - base)) << 16;
		words[second + i] =
			low[second + i] | (uint32_t)half_of(sm[second + i], (u8)(t - base)) << 16;
	}
	if (second > half)
		words[half] = low[half] | (uint32_t)half_of(sm[half], (u8)(mixed[half] - base)) << 16;
}

/* -- bytes2, bytes4, bytes8 ---------------------------------------------------------------------- */

INLINE void split_2(const u16 *restrict words, u8 *restrict p0, u8 *restrict p1, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		p0[i] = (u8)words[i];
		p1[i] = (u8)(words[i] >> 8);
	}
}

INLINE void split_4(const u32 *restrict words, u8 *restrict p0, u8 *restrict p1, u8 *restrict p2,
		    u8 *restrict p3, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		p0[i] = (u8)words[i];
		p1[i] = (u8)(words[i] >> 8);
		p2[i] = (u8)(words[i] >> 16);
		p3[i] = (u8)(words[i] >> 24);
	}
}

INLINE void join_4(const u8 *restrict p0, const u8 *restrict p1, const u8 *restrict p2,
		   const u8 *restrict p3, u32 *restrict words, size_t count)
{
	for (size_t i = 0; i < count; i++)
		words[i] = p0[i] | (uint32_t)p1[i] << 8 | (uint32_t)p2[i] << 16 | (uint32_t)p3[i] << 24;
}

ENTRY void asyncsave_split_bytes2(const u8 *restrict raw, u8 *restrict out, size_t n)
{
	split_2((const u16 *)raw, out, out + n, n);
}

ENTRY void asyncsave_split_bytes4(const u8 *restrict raw, u8 *restrict out, size_t n)
{
	split_4((const u32 *)raw, out, out + n, out + 2 * n, out + 3 * n, n);
}

/* Eight bytes at once are too many streams for a loop to be vectorised; twice four are not. */
ENTRY void asyncsave_split_bytes8(const u8 *restrict raw, u8 *restrict out, size_t n)
{
	const u64 *restrict words = (const u64 *)raw;

	for (size_t i = 0; i < n; i += BLOCK) {
		const size_t count = n - i < BLOCK ? n - i : BLOCK;
		uint32_t low[BLOCK], high[BLOCK];
		for (size_t j = 0; j < count; j++) {
			low[j] = (uint32_t)words[i + j];
			high[j] = (uint32_t)(words[i + j] >> 32);
		}
		u8 *to = out + i;
		split_4((const u32 *)low, to, to + n, to + 2 * n, to + 3 * n, count);
		to += 4 * n;
		split_4((const u32 *)high, to, to + n, to + 2 * n, to + 3 * n, count);
	}
}

ENTRY void asyncsave_join_bytes2(const u8 *restrict p0, const u8 *restrict p1, u8 *restrict out,
				 size_t n)
{
	u16 *restrict words = (u16 *)out;

	for (size_t i = 0; i < n; i++)
		words[i] = (uint16_t)(p0[i] | p1[i] << 8);
}

ENTRY void asyncsave_join_bytes4(const u8 *restrict p0, const u8 *restrict p1,
				 const u8 *restrict p2, const u8 *restrict p3, u8 *restrict out,
				 size_t n)
{
	join_4(p0, p1, p2, p3, (u32 *)out, n);
}

ENTRY void asyncsave_join_bytes8(const u8 *p0, const u8 *p1, const u8 *p2, const u8 *p3,
				 const u8 *p4, const u8 *p5, const u8 *p6, const u8 *p7,
				 u8 *restrict out, size_t n)
{
	u64 *restrict words = (u64 *)out;

	for (size_t i = 0; i < n; i += BLOCK) {
		const size_t count = n - i < BLOCK ? n - i : BLOCK;
		uint32_t low[BLOCK], high[BLOCK];
		join_4(p0 + i, p1 + i, p2 + i, p3 + i, (u32 *)low, count);
		join_4(p4 + i, p5 + i, p6 + i, p7 + i, (u32 *)high, count);
		for (size_t j = 0; j < count; j++)
			words[i + j] = low[j] | (uint64_t)high[j] << 32;
	}
}

/* -- what a sample says ------------------------------------------------------------------------ */

/* The sum of the squares of how often each byte occurs in pieces: see planes.collisions. */
__attribute__((visibility("default"))) int64_t asyncsave_collisions(const u8 *bytes, size_t pieces,
								     size_t piece, size_t stride)
{
	int64_t counts[256] = {0}, sum = 0;

	for (size_t p = 0; p < pieces; p++)
		for (size_t i = 0; i < piece; i++)
			counts[bytes[p * stride + i]]++;
	for (int b = 0; b < 256; b++)
		sum += counts[b] * counts[b];
	return sum;
}
