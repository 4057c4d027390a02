"""How the kernels are launched: pure functions of shapes, strides and settings."""
