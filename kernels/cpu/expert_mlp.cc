extern "C" __attribute__((visibility("default"))) int moehive_abi() { return 1; }
