"""Megatron-core on CUDA + nccl or CPU + gloo: model, optimizer, training loop. Does not know `checkpoint` or `report`."""
