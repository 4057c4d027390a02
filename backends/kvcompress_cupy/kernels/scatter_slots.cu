// Tokens into the slots of a pool: kvcompress.ops.scatter_slots. Copies words, whatever they hold.
#include "slots.cuh"

template <class Word>
__global__ void __launch_bounds__(256)
    scatter_slots(const int *slots, const Word *x, Word *pool, long long tokens, int tile, int heads,
                  int words, unsigned token_reciprocal, unsigned head_reciprocal,
                  long long pool_head_stride, long long pool_token_stride, long long head_stride,
                  long long token_stride) {
    const Layout from{head_stride, token_stride}, to{pool_head_stride, pool_token_stride};
    each_word(slots, tokens, tile, heads, words, token_reciprocal, head_reciprocal,
              [&](int head, long long token, int slot, int word) {
                  store(pool + to.at(head, slot, word), load(x + from.at(head, token, word)));
              });
}
