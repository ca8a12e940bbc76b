/* The steps that `dsv3_project` is made of. */
#ifndef DSV3_PROJECT_H
#define DSV3_PROJECT_H

#include "products.h"

int dsv3_linear(const void *x, int x_type, ptrdiff_t ldx, const void *w, int w_type, ptrdiff_t ldw, const float *w_scale,
                const void *bias, void *y, ptrdiff_t ldy, int64_t M, int64_t N, int64_t K, int int8_activations,
                int threads);
int dsv3_rms_norm(const void *x, int type, ptrdiff_t ldx, const void *weight, float eps, void *y, int64_t rows, int64_t n,
                  int threads);
void dsv3_rotate(const void *x, const ptrdiff_t *x_of, const void *cos, const void *sin, const ptrdiff_t *angle_of,
                 int type, int interleave, void *y, const ptrdiff_t *y_of, int64_t B, int64_t H, int64_t Q, int64_t P,
                 int threads);

#endif
