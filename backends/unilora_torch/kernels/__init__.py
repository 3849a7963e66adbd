"""Triton kernels for CUDA: P and Pᵀ of ``balanced`` with the groups in registers, 0 bytes for each LoRA parameter."""
