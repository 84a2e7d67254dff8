"""Megatron-core on CUDA + nccl or CPU + gloo: model, optimizer, training loop. Knows neither `checkpoint` nor `report`."""
