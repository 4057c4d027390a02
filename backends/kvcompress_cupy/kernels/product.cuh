// Codebooks of product quantization, one for every sub-vector, as kernels take them: by value.
#pragma once
#include "device.cuh"

constexpr int CENTROIDS = 256;

struct Codebook {
    const float *centroids;  // [heads, CENTROIDS, dim]
    int column;              // of the codes
    unsigned short start, dim;  // channels of its sub-vector
};

struct Codebooks {
    Codebook books[240];
};
