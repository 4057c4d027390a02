// Tokens out of the slots of a pool: kvcompress.ops.gather_slots. Copies words, whatever they hold.
#include "slots.cuh"

template <class Word>
__global__ void __launch_bounds__(256)
    gather_slots(const Word *pool, const int *slots, Word *out, long long tokens, int tile, int heads,
                 int words, unsigned token_reciprocal, unsigned head_reciprocal,
                 long long pool_head_stride, long long pool_token_stride) {
    const Layout from{pool_head_stride, pool_token_stride}, to{tokens * words, words};
    each_word(slots, tokens, tile, heads, words, token_reciprocal, head_reciprocal,
              [&](int head, long long token, int slot, int word) {
                  store(out + to.at(head, token, word), load(pool + from.at(head, slot, word)));
              });
}
