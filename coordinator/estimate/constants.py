"""What a step costs beside bytes and distance, each constant with where it comes from.

The kernels' shares are of `moehive bench experts` on an Intel Xeon at 2.5 GHz (Cascade Lake, AVX-512 VNNI), the
products of a core with AVX2 (Zen 3), as most machines at home have. The fixed seconds are fitted to `moehive bench
estimate` on the Xeon, which shows estimates beside measurements; another machine takes `step_factor`
(estimate/this_machine.py) times as long.
"""

# Of a kernel's bytes a second with one token, the share of what plain code reads (`moehive bench experts`). K-quants
# are between the Xeon's 0.88 to 0.93 and the Zen 3's 1.0.
KERNEL_SHARES = {
    "f32": 1.0, "bf16": 1.0, "f16": 1.0, "q8_0": 1.0, "q4_0": 1.0, "q4_1": 0.97, "q5_0": 0.98, "q5_1": 0.98,
    "iq4_nl": 0.98, "iq4_xs": 0.86, "q2_k": 0.72, "q3_k": 0.85, "q4_k": 0.95, "q5_k": 0.95, "q6_k": 0.97,
    "int4_g32": 0.91, "int4_g64": 0.87, "int4_g128": 0.88, "mxfp4": 0.89, "fp8_block": 0.81,
}  # fmt: skip
OTHER_SHARE = 0.9  # of a mixture of formats
# Of that, what is left within a step, where one matrix follows another and each begins with cold caches.
STEP_SHARE = 0.88

TOKEN_S = 0.4e-3  # sampling and the engine, a token
LAYER_S = 0.3e-3  # calls and small operations of one decoder layer in the trunk
HOP_S = 0.25e-3  # of one layer's experts: messages made and read, processes woken, beside the round trip
PROBE_S = 0.2e-3  # of that, what a round trip as `moehive status` has it holds: all but making and adding up messages
MESSAGE_S = 0.3e-3  # for each node beyond the first that a layer asks

# Multiplications with a weight that a machine does while it reads a byte: of one thread, what an expert takes longer
# with 128 tokens than with 16. The first token's are hidden behind the reading; the others' are not, for the next
# weights are not read before all tokens are multiplied with these.
PRODUCTS_PER_BYTE = {
    "f32": 2.3, "bf16": 1.9, "f16": 2.0, "fp8_block": 1.8, "q8_0": 2.8, "q4_0": 3.7, "q2_k": 2.5, "q3_k": 2.1,
    "q5_k": 2.7, "q6_k": 2.4, "iq4_nl": 2.6, "iq4_xs": 2.3, "mxfp4": 2.7,
}  # fmt: skip
OTHER_PRODUCTS = 3.1  # of all other formats; the Xeon's AVX-512 does 1.3 to 1.8 times as many
CHUNK_TOKENS = 128  # of a prompt that go through the layers together

# Bytes that are not for weights.
COORDINATOR_BYTES = 700 * 10**6  # Python and its libraries (docs/benchmarks.md)
NODE_BYTES = 300 * 10**6
CONTEXT_TOKENS = 8192  # whose keys and values are kept room for

# Assumed of what a node has and has not measured; whoever writes them into a cluster.toml says so.
DISK_BYTES_PER_S = 0.5e9  # of a SATA SSD
VRAM_BYTES_PER_S = 360e9  # of a GPU with 12 GB of a few years ago

WIFI_RTT_S = 1.5e-3  # no wired home network has so long a round trip
