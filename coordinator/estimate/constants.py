"""What a step costs beside bytes and distance, each constant with where it comes from.

A machine's own speed is measured where it is at hand (moehive.kernels.speed): bytes of weights that the kernel of
q8_0 reads a second with one token, and products that it does a second with many. What is left for this file is nearly
the same on every processor: how other formats compare with q8_0, measured on a Xeon at 2.5 GHz (Cascade Lake), on
Zen 3 and on Zen 4, and seconds that are no reading of weights, of which a machine takes `step_factor`
(estimate/this_machine.py) times as many: fitted to `moehive bench estimate` on the Xeon, where the factor is 1. They
fit Zen 4 (0.26) as well. STEP_SHARE and COLUMN_S are fitted on Zen 4 alone.
"""

# Of a kernel's bytes a second with one token, beside q8_0's. On Zen 4 two threads, for which memory is the bound,
# read 0.91 to 1.06; one thread, and Zen 3, read q2_k at 0.6 to 0.9, FP8 at 0.8 to 1.0, other K-quants at 0.8 to 1.1.
KERNEL_SHARES = {
    "f32": 1.0, "bf16": 1.0, "f16": 1.0, "q8_0": 1.0, "q4_0": 1.0, "q4_1": 0.99, "q5_0": 0.99, "q5_1": 0.93,
    "iq4_nl": 0.98, "iq4_xs": 0.88, "q2_k": 0.76, "q3_k": 0.87, "q4_k": 0.98, "q5_k": 0.98, "q6_k": 0.96,
    "int4_g32": 0.97, "int4_g64": 0.95, "int4_g128": 0.94, "mxfp4": 0.95, "fp8_block": 0.88,
}  # fmt: skip
OTHER_SHARE = 0.93  # of a mixture of formats
# Of that, what is left within a step, where one matrix follows another and each begins with cold caches.
STEP_SHARE = 0.86

TOKEN_S = 0.4e-3  # sampling and the engine, a token
LAYER_S = 0.3e-3  # calls and small operations of one decoder layer in the trunk
HOP_S = 0.25e-3  # of one layer's experts: messages made and read, processes woken, beside the round trip
PROBE_S = 0.2e-3  # of that, what a round trip as `moehive status` has it holds: all but making and adding up messages
MESSAGE_S = 0.3e-3  # for each node beyond the first that a layer asks

# Products with weights that are at hand. The first token's are hidden behind the reading; the others' are not, for
# the next weights are not read before all tokens are multiplied with these. Blocks of 8 bits and less are multiplied
# as integers, which processors do at very different speeds; these are beside q8_0's, between AVX2's and VNNI's.
INTEGER_PRODUCTS = {
    "q8_0": 1.0, "q4_0": 1.1, "q2_k": 0.8, "q3_k": 0.78, "q4_k": 0.95, "q5_k": 0.9, "q6_k": 0.83, "iq4_xs": 0.82,
}  # fmt: skip
OTHER_PRODUCTS = 0.95  # of all other formats
PRODUCTS_PER_BYTE = 2.8  # of q8_0 while a byte is read, with AVX2 (Zen 3): where nobody measured products
# Others are multiplied in f32: products while a machine reads a byte, on Zen 3 and Zen 4 alike. Processors that
# multiply bf16 (vdpbf16ps) do twice as many of bf16 and FP8; which do is not known of a machine.
FLOAT_PRODUCTS_PER_BYTE = {"f32": 2.3, "bf16": 2.2, "f16": 2.2, "fp8_block": 2.0}
COLUMN_S = 0.11e-6  # for each column of a prompt's token in a layer: norms, attention, recurrence, what is no product
CHUNK_TOKENS = 128  # of a prompt that go through the layers together

# Bytes that are not for weights.
COORDINATOR_BYTES = 700 * 10**6  # Python and its libraries (docs/benchmarks.md)
NODE_BYTES = 300 * 10**6
CONTEXT_TOKENS = 8192  # whose keys and values are kept room for

# Assumed of what a node has and has not measured; whoever writes them into a cluster.toml says so.
DISK_BYTES_PER_S = 0.5e9  # of a SATA SSD
VRAM_BYTES_PER_S = 360e9  # of a GPU with 12 GB of a few years ago

WIFI_RTT_S = 1.5e-3  # no wired home network has so long a round trip
