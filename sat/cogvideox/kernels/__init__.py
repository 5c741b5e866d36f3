"""The element-wise work of a transformer layer, each piece in as few passes over the tokens as its arithmetic needs.

An operation is a function of tensors with three forms, registered with torch as one operator (``torch.library``), so
that a compiled graph, a checkpointing policy and a counter see one step:

    a Triton kernel, forward and backward (on_cuda/)     on CUDA, eager and compiled
    plain PyTorch, in place on buffers of its own        on a CPU, and on CUDA where Triton is missing
    a formula (``*_formula``), the reference             in a graph compiled for a CPU, which fuses it as it likes

On the meta device an operator has the shapes, and keeps for its gradients what it does on CUDA.
"""
