/* Read bandwidth of main memory, the roof of decoding: every thread given reads its share of 1 GiB as fast as it can.
 *
 *     cc -O3 -march=native -pthread bandwidth.c -o bandwidth && ./bandwidth THREADS
 *
 * Prints bytes per second of the best of several passes. */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

enum { PASSES = 5, LANES = 64 };
static const size_t BYTES = (size_t)1 << 30;

typedef struct {
    const uint64_t *from, *to;
    uint64_t sum;
} Share;

/* Sixty-four sums at once: more than enough independent loads for the memory to be what is waited for. */
static void *read_share(void *given) {
    Share *share = given;
    uint64_t sums[LANES] = {0};
    for (const uint64_t *at = share->from; at + LANES <= share->to; at += LANES)
        for (int lane = 0; lane < LANES; lane++) sums[lane] ^= at[lane];
    for (int lane = 0; lane < LANES; lane++) share->sum ^= sums[lane];
    return NULL;
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

int main(int count, char **words) {
    int threads = count > 1 ? atoi(words[1]) : 1;
    uint64_t *memory = aligned_alloc((size_t)1 << 21, BYTES);
    pthread_t *running = calloc(threads < 1 ? 1 : threads, sizeof *running);
    Share *shares = calloc(threads < 1 ? 1 : threads, sizeof *shares);
    if (threads < 1 || !memory || !running || !shares) return fputs("usage: bandwidth THREADS; it takes 1 GiB\n", stderr), 2;
    madvise(memory, BYTES, MADV_HUGEPAGE);
    size_t words_all = BYTES / sizeof *memory, each = words_all / threads;
    for (size_t i = 0; i < words_all; i++) memory[i] = i * 0x9E3779B97F4A7C15u;
    double best = 1e9;
    uint64_t sum = 0;
    for (int pass = 0; pass < PASSES; pass++) {
        double began = now();
        for (int i = 0; i < threads; i++) {
            shares[i] = (Share){memory + i * each, memory + (i + 1) * each, 0};
            pthread_create(&running[i], NULL, read_share, &shares[i]);
        }
        for (int i = 0; i < threads; i++) pthread_join(running[i], NULL), sum ^= shares[i].sum;
        double taken = now() - began;
        if (taken < best) best = taken;
    }
    if (!sum) puts("");  /* what is computed has to be used */
    printf("%.0f\n", (double)(each * threads * sizeof *memory) / best);
    return 0;
}
