"""Triton kernels, one file per operator, imported when the first tensor on CUDA comes (Triton takes half a second).

Everything is computed in float32. Rows are read with their strides; sums over tokens are taken block by block and then
over the blocks, in one order, so that a result does not change from run to run.
"""
