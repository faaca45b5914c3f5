"""What a step costs beside bytes and distance, each constant with where it comes from.

A machine's own speed is measured where it is at hand (moehive.kernels.speed): bytes of weights that the kernel of
q8_0 reads a second with one token, and products that kernels do a second with many tokens (q8_0) and with one (q4_k).
What is left for this file is nearly the same on every processor: how other formats compare with those two, and
seconds that are no reading of weights, of which a machine takes `step_factor` (estimate/this_machine.py) times as
many: fitted to `moehive bench estimate` on a Xeon at 2.5 GHz (Cascade Lake), where the factor is 1. They fit Zen 4
(0.26) as well. STEP_SHARE, COLUMN_S and what a hop costs are fitted on Zen 4 alone.
"""

# Products a second of one token with weights that lie in caches, beside q4_k's: means of the kernels of AVX2, of
# AVX-512, and of AVX-512 with VNNI and bf16, one thread and two, all on Zen 4, which differ by 5 to 15 %, of iq4 and
# q8_0 by 25.
TOKEN_PRODUCTS = {
    "f32": 0.2, "bf16": 0.47, "f16": 0.41, "q8_0": 0.8, "q4_0": 1.14, "q4_1": 1.11, "q5_0": 0.81, "q5_1": 0.78,
    "iq4_nl": 0.72, "iq4_xs": 0.7, "q2_k": 0.9, "q3_k": 0.72, "q4_k": 1.0, "q5_k": 0.74, "q6_k": 0.71,
    "int4_g32": 0.92, "int4_g64": 0.98, "int4_g128": 1.04, "mxfp4": 0.92, "fp8_block": 0.41,
}  # fmt: skip
OTHER_TOKEN_PRODUCTS = 0.8  # of a checkpoint in several formats
# Of latent attention's matrices, in 16 bits, and what it does beside them with a cache of some hundred tokens: one
# thread takes 0.8 ms for Kimi K2's 17 MB of a layer, two 0.45.
LATENT_PRODUCTS = 0.2
TOKEN_PRODUCTS_PER_BYTE = 6.0  # of q4_k while a byte is read, of some cores with AVX2: where nobody measured
# How reading and multiplying join (estimate/one_token.py). Of the same kernels, threads and formats, in experts of
# 2048 and 7168 columns, 3 to 4 fits best (9 % in the mean, from experts that are a fifth too slow, AVX-512 with one
# thread and 7168 columns, to some that are a tenth too quick); on two threads while memory gives 50 GB/s, 3 and less.
JOIN = 3.0
# Of both together, what is left within a step, where one matrix follows another and each begins with cold caches.
STEP_SHARE = 0.86

TOKEN_S = 0.4e-3  # sampling and the engine, a token
LAYER_S = 0.3e-3  # calls and small operations of one decoder layer in the trunk
HOP_S = 0.2e-3  # of one layer's experts: messages made and read, processes woken, beside the round trip
PROBE_S = 0.16e-3  # of that, what `moehive status` measures of a round trip: all but making and adding up messages
MESSAGE_S = 0.2e-3  # for each node beyond the first that a layer asks

# Products with weights that are at hand. The first token's are hidden behind the reading; the others' are not, for
# the next weights are not read before all tokens are multiplied with these. Processors do them at very different
# speeds; these are beside q8_0's, between AVX2's and VNNI's. Of floats they are means of four kernels on Zen 4: bf16
# and FP8 are at 0.6 and 0.7 with AVX2, 0.8 with AVX-512, 0.4 with VNNI, and 0.7 where bf16 is multiplied as well
# (vdpbf16ps); f32 and f16 at 0.4 to 0.8. Which of them a machine has is not known.
PRODUCTS = {
    "q8_0": 1.0, "q4_0": 1.1, "q2_k": 0.8, "q3_k": 0.78, "q4_k": 0.95, "q5_k": 0.9, "q6_k": 0.83, "iq4_xs": 0.82,
    "f32": 0.46, "bf16": 0.6, "f16": 0.52, "fp8_block": 0.61,
}  # fmt: skip
OTHER_PRODUCTS = 0.95  # of all other formats
PRODUCTS_PER_BYTE = 2.8  # of q8_0 while a byte is read, with AVX2 (Zen 3): where nobody measured products
COLUMN_S = 0.05e-6  # for each column of a prompt's token in a layer: norms, attention, recurrence, what is no product
CHUNK_TOKENS = 128  # of a prompt that go through the layers together

# Bytes that are not for weights.
COORDINATOR_BYTES = 700 * 10**6  # Python and its libraries (docs/benchmarks.md)
NODE_BYTES = 300 * 10**6
CONTEXT_TOKENS = 8192  # whose keys and values are kept room for

# Assumed of what a node has and has not measured; whoever writes them into a cluster.toml says so.
DISK_BYTES_PER_S = 0.5e9  # of a SATA SSD
VRAM_BYTES_PER_S = 360e9  # of a GPU with 12 GB of a few years ago

WIFI_RTT_S = 1.5e-3  # no wired home network has so long a round trip
