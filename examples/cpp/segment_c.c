/* The C ABI in one screen: a bright spot on a dark map, features that differ there, and the pixels it marks. */
#include <stdio.h>

#include "ttt4as/c_api.h"

enum { SIDE = 32, GRID = 8, CHANNELS = 2 };

int main(void) {
    static float map[SIDE * SIDE], features[CHANNELS * GRID * GRID], decision[SIDE * SIDE];
    static uint8_t mask[SIDE * SIDE];
    static int8_t labels[SIDE * SIDE];
    ttt4as_options options;
    ttt4as_segmenter* segmenter;
    int status, marked = 0;
    for (int i = 0; i < SIDE * SIDE; ++i) {
        const int y = i / SIDE - 12, x = i % SIDE - 20;
        map[i] = 1.0f / (float)(1 + y * y + x * x);
    }
    for (int i = 0; i < GRID * GRID; ++i) {
        const int y = i / GRID - 3, x = i % GRID - 5;
        const int inside = y * y + x * x <= 1;
        features[i] = inside ? 30.0f : 1.0f;
        features[GRID * GRID + i] = inside ? 0.0f : 30.0f;
    }
    ttt4as_default_options(&options);
    segmenter = ttt4as_segmenter_create(&options);
    if (!segmenter) {
        fprintf(stderr, "%s\n", ttt4as_last_error());
        return 1;
    }
    status = ttt4as_segment(segmenter, map, SIDE, SIDE, features, CHANNELS, GRID, GRID, 0, mask, decision, labels);
    ttt4as_segmenter_destroy(segmenter);
    if (status < 0) {
        fprintf(stderr, "%s\n", ttt4as_last_error());
        return 1;
    }
    for (int i = 0; i < SIDE * SIDE; ++i) marked += mask[i];
    printf("ttt4as %s: status %d, %d pixels marked\n", ttt4as_version(), status, marked);
    return marked > 0 && marked < SIDE * SIDE / 4 ? 0 : 1;
}
