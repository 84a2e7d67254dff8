"""Megatron-core on CUDA + nccl or CPU + gloo: model, optimizer, loop. Knows neither `checkpoint` nor `report`."""
